"""`chunked` as custom operators of PyTorch: what autograd and `torch.compile` see of it.

Gradients come out of the forward operator and wait, in fp32, for the upstream gradient. They are
scaled in place only when the graph is freed with it, so backward may run twice. Only
`reduction="none"` with a trainable head or bias, whose per-token upstream gradient is unknown until
backward, runs the chunks a second time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, library

from opsdc_kernels.chunked.run import Needs, run_chunks
from opsdc_kernels.columns.kept import exact, run_columns
from opsdc_kernels.problem import Problem, mean_factor, reduce_tokens

if TYPE_CHECKING:
    from opsdc_kernels.vocab_parallel import Shard

NO_DOUBLE_BACKWARD = (
    "the gradient of the chunked backend cannot be differentiated again; "
    'use backend="reference" for second derivatives'
)
TENSORS = (
    "student_hidden",
    "student_weight",
    "teacher_hidden",
    "teacher_weight",
    "student_bias",
    "teacher_bias",
    "token_weight",
    "target_ids",
)


def chunked_divergence(problem: Problem) -> tuple[Tensor, tuple[Tensor, ...] | None]:
    """Loss and, if asked for, the tensors of `DivergenceStats`; those that `skip_tolerance` adds
    come last, per token and then 0-dim."""
    enabled = torch.is_grad_enabled()
    bias = problem.student_bias
    needs = [
        enabled and problem.student_hidden.requires_grad,
        enabled and problem.student_weight.requires_grad,
        enabled and bias is not None and bias.requires_grad,
    ]
    loss, per_token, statistics, *_, scalars = _forward(*_pack(problem), needs)
    if not problem.return_stats:
        return loss, None
    return loss, (per_token.detach(), *statistics.detach(), *scalars.detach())


def _pack(problem: Problem) -> tuple[Any, ...]:
    return (
        *(getattr(problem, name) for name in TENSORS),
        problem.divergence,
        problem.beta,
        problem.temperature,
        list(problem.logit_scale),
        [cap or 0.0 for cap in problem.logit_softcap],
        problem.own_teacher_bias,
        problem.vocab_size,
        problem.reduction,
        problem.return_stats,
        problem.workspace_bytes,
        problem.process_group,
        problem.skip_tolerance,
        problem.exact_value,
    )


def _unpack(*arguments: Any) -> Problem:
    tensors, rest = arguments[: len(TENSORS)], arguments[len(TENSORS) :]
    divergence, beta, temperature, scale, softcap, own_bias, size, reduction = rest[:8]
    stats, budget, group, tolerance, exact_value = rest[8:]
    return Problem(
        **dict(zip(TENSORS, tensors, strict=True)),
        divergence=divergence,
        beta=beta,
        temperature=temperature,
        logit_scale=(scale[0], scale[1]),
        logit_softcap=(softcap[0] or None, softcap[1] or None),
        own_teacher_bias=own_bias,
        vocab_size=size,
        reduction=reduction,
        return_stats=stats,
        workspace_bytes=budget,
        process_group=group,
        skip_tolerance=tolerance,
        exact_value=exact_value,
    )


def _recomputes(reduction: str, needs: Sequence[bool]) -> bool:
    return reduction == "none" and (needs[1] or needs[2])


def _shard(problem: Problem, needs: Sequence[bool]) -> tuple[Shard | None, Problem]:
    """This rank's part of a sharded vocabulary, and the problem with the whole one's size."""
    if problem.process_group is None:
        return None, problem
    from opsdc_kernels.vocab_parallel import agree

    return agree(problem, tuple(needs))


def _or_empty(tensor: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if tensor is None else tensor


@library.custom_op("opsdc_kernels::chunked_forward", mutates_args=())
def _forward(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor | None,
    student_bias: Tensor | None,
    teacher_bias: Tensor | None,
    token_weight: Tensor | None,
    target_ids: Tensor | None,
    divergence: str,
    beta: float,
    temperature: float,
    logit_scale: Sequence[float],
    logit_softcap: Sequence[float],
    own_teacher_bias: bool,
    vocab_size: int,
    reduction: str,
    return_stats: bool,
    workspace_bytes: int | None,
    process_group: str | None,
    skip_tolerance: float | None,
    exact_value: bool,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, per token [N], statistics [5 | 7, N] or empty, dH, dW, db or empty each, and with
    `skip_tolerance` the scalars of `columns.Realised` [4], whose two rows end the statistics)."""
    problem = _unpack(
        student_hidden, student_weight, teacher_hidden, teacher_weight, student_bias, teacher_bias,
        token_weight, target_ids, divergence, beta, temperature, logit_scale, logit_softcap,
        own_teacher_bias, vocab_size, reduction, return_stats, workspace_bytes,
        process_group, skip_tolerance, exact_value,
    )  # fmt: skip
    wanted = Needs(*([False] * 3 if _recomputes(reduction, needs) else needs))
    shard, problem = _shard(problem, needs)
    kept = problem.kept_rows()
    with torch.autocast(student_hidden.device.type, enabled=False):
        row_weight = None if reduction == "none" else token_weight
        if reduction == "mean":
            n_tokens = student_hidden.shape[0]
            if token_weight is None:
                share = 1 / max(n_tokens, 1)
                row_weight = student_hidden.new_full((n_tokens,), share, dtype=problem.dtype)
            else:
                row_weight = token_weight * mean_factor(token_weight)
        realised = None
        if skip_tolerance is None:
            result = run_chunks(problem, wanted, row_weight, kept, shard=shard)
        elif wanted:
            result, realised = run_columns(
                problem, wanted, row_weight, kept, tolerance=skip_tolerance, exact_value=exact_value
            )
        else:  # nothing that a tolerance of the gradients could save
            result = run_chunks(problem, wanted, row_weight, kept)
            realised = exact(result)
        loss = reduce_tokens(result.per_token, token_weight, reduction)
    if reduction == "none":
        loss = loss.clone()  # outputs of an operator must not alias
    like = result.per_token
    rows, scalars = result.statistics, like.new_empty(0)
    if realised is not None:
        rows = (*rows, realised.token_bound, realised.divergence_error)
        scalars = torch.stack(realised.scalars)
    return (
        loss,
        result.per_token,
        torch.stack(rows) if return_stats else like.new_empty(0),
        _or_empty(result.hidden_gradient, like),
        _or_empty(result.weight_gradient, like),
        _or_empty(result.bias_gradient, like),
        scalars,
    )


@_forward.register_fake
def _forward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    *packed, needs = arguments
    problem = _unpack(*packed)
    tokens = problem.student_hidden.shape[0]
    like = problem.student_hidden.new_empty(0, dtype=problem.dtype)
    wanted = [False] * 3 if _recomputes(problem.reduction, needs) else needs
    size, dim = problem.student_weight.shape
    skips = problem.skip_tolerance is not None
    count = (5 if problem.target_ids is None else 7) + 2 * skips
    return (
        like.new_empty(tokens if problem.reduction == "none" else ()),
        like.new_empty(tokens),
        like.new_empty((count, tokens) if problem.return_stats else 0),
        like.new_empty((tokens, dim) if wanted[0] else 0),
        like.new_empty((size, dim) if wanted[1] else 0),
        like.new_empty(size if wanted[2] else 0),
        like.new_empty(4 if skips else 0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *packed, needs = inputs
    ctx.set_materialize_grads(False)
    ctx.n_inputs = len(inputs)
    ctx.recomputes = _recomputes(packed[15], needs)
    ctx.needs = needs
    ctx.dtypes = [None if x is None else x.dtype for x in (packed[0], packed[1], packed[4])]
    if ctx.recomputes:
        ctx.save_for_backward(*packed[: len(TENSORS)])
        ctx.options = packed[len(TENSORS) :]
    else:
        ctx.save_for_backward(*output[3:6])


def _backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    gradients: list[Tensor | None] = [None] * ctx.n_inputs
    if upstream is None:
        return tuple(gradients)
    if ctx.recomputes:
        found = _recompute(upstream, *ctx.saved_tensors, *ctx.options, ctx.needs)
    else:
        per_row = upstream[:, None] if upstream.dim() else upstream
        last_use = _graph_is_freed(upstream)
        found = [
            None
            if not need
            else _scaled_in_place(x, per_row)
            if last_use and x.dtype == dtype
            else _times_upstream(x, per_row, dtype)
            for x, dtype, need in zip(ctx.saved_tensors, ctx.dtypes, ctx.needs, strict=True)
        ]
    for position, gradient, need in zip((0, 1, 4), found, ctx.needs, strict=True):
        if need:
            gradients[position] = gradient
    return tuple(gradients)


def _scaled_in_place(saved: Tensor, upstream: Tensor) -> Tensor:
    if upstream.device.type == "cpu" and upstream.dim() == 0 and upstream == 1:
        return saved  # and its pages as they are, of which columns left out touched few
    return saved.mul_(upstream)


def _graph_is_freed(upstream: Tensor) -> bool:
    """True when this backward is the graph's last: what it saved may then be used up.

    Spares a second buffer of the head's size in every training step. With `retain_graph`, under
    tracing (tensor subclasses), or if PyTorch ever drops the query, gradients are copied instead.
    """
    kept = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)
    return type(upstream) is Tensor and not kept()


@library.custom_op("opsdc_kernels::chunked_backward", mutates_args=())
def _recompute(
    upstream: Tensor,
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor | None,
    student_bias: Tensor | None,
    teacher_bias: Tensor | None,
    token_weight: Tensor | None,
    target_ids: Tensor | None,
    divergence: str,
    beta: float,
    temperature: float,
    logit_scale: Sequence[float],
    logit_softcap: Sequence[float],
    own_teacher_bias: bool,
    vocab_size: int,
    reduction: str,
    return_stats: bool,
    workspace_bytes: int | None,
    process_group: str | None,
    skip_tolerance: float | None,
    exact_value: bool,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """(dH, dW, db or empty each) of Σ upstream·divergence, by a second run over the chunks."""
    problem = _unpack(
        student_hidden, student_weight, teacher_hidden, teacher_weight, student_bias, teacher_bias,
        token_weight, None, divergence, beta, temperature, logit_scale, logit_softcap,
        own_teacher_bias, vocab_size, reduction, False, workspace_bytes, process_group,
        skip_tolerance, exact_value,
    )  # fmt: skip
    shard, problem = _shard(problem, needs)
    with torch.autocast(student_hidden.device.type, enabled=False):
        result = run_chunks(problem, Needs(*needs), upstream, problem.kept_rows(), shard=shard)
    pairs = (
        (result.hidden_gradient, student_hidden),
        (result.weight_gradient, student_weight),
        (result.bias_gradient, student_bias),
    )
    return tuple(  # type: ignore[return-value]
        upstream.new_empty(0) if x is None or of is None else x.to(of.dtype) for x, of in pairs
    )


@_recompute.register_fake
def _recompute_fake(upstream: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *packed, needs = arguments
    return tuple(
        torch.empty_like(packed[i], memory_format=torch.contiguous_format)
        if need
        else upstream.new_empty(0)
        for i, need in zip((0, 1, 4), needs, strict=True)
    )


@library.custom_op("opsdc_kernels::times_upstream", mutates_args=())
def _times_upstream(saved: Tensor, upstream: Tensor, dtype: torch.dtype) -> Tensor:
    """saved · upstream, multiplied in the saved dtype and rounded once to `dtype`."""
    return torch.mul(saved, upstream, out=saved.new_empty(saved.shape, dtype=dtype))


@_times_upstream.register_fake
def _times_upstream_fake(saved: Tensor, upstream: Tensor, dtype: torch.dtype) -> Tensor:
    return saved.new_empty(saved.shape, dtype=dtype)


def _refuse(ctx: Any, *_: Any) -> None:
    raise RuntimeError(NO_DOUBLE_BACKWARD)


_forward.register_autograd(_backward, setup_context=_setup_context)
_recompute.register_autograd(_refuse)
_times_upstream.register_autograd(_refuse)
