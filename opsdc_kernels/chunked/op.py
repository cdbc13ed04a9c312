"""`chunked` as custom operators of PyTorch: what autograd and `torch.compile` see of it.

Gradients come out of the forward operator and wait, in fp32, for the upstream gradient. They are
scaled in place only when the graph is freed with it, so backward may run twice. Only
`reduction="none"` with a trainable head or bias, whose per-token upstream gradient is unknown until
backward, runs the chunks a second time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, library

from opsdc_kernels.chunked.run import Result, run_chunks
from opsdc_kernels.problem import (
    SCHEMA,
    TENSORS,
    TRAINED,
    GradientsWanted,
    Options,
    Problem,
    among_inputs,
    like_inputs,
    mean_factor,
    named,
    reduce_tokens,
)
from opsdc_kernels.transforms import batched
from opsdc_kernels.vocab_parallel import Shard, agree

NO_DOUBLE_BACKWARD = (
    "the gradient of the chunked backend cannot be differentiated again; "
    'use backend="reference" for second derivatives'
)
RESULTS = ", ".join(["Tensor"] * 5)
"""Results of a forward operator: loss, values per token, dH, dW, db; those not wanted are empty."""


def chunked_divergence(problem: Problem) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and, if asked for, the tensors of `DivergenceStats`."""
    loss, values, *_ = _forward(*problem.arguments, problem.wanted)
    return loss, named(values) if problem.options.return_stats else {}


@library.custom_op(
    "opsdc_kernels::chunked_forward",
    mutates_args=(),
    schema=f"({SCHEMA}, bool[] wanted) -> ({RESULTS})",
)
def _forward(*inputs: Any) -> tuple[Tensor, ...]:
    problem, wanted = Problem.of(inputs[:-1]), GradientsWanted(*inputs[-1])
    shard, problem = _sharded(problem, wanted)
    now = GradientsWanted(False, False, False) if recomputes(problem.options, wanted) else wanted
    with torch.autocast(problem.student_hidden.device.type, enabled=False):
        result = run_chunks(problem, now, row_weight(problem), problem.kept_tokens(), shard=shard)
        return outputs(problem, result)


def _sharded(problem: Problem, wanted: GradientsWanted) -> tuple[Shard | None, Problem]:
    """This rank's part of a sharded vocabulary, and the problem with the whole one's size."""
    return (None, problem) if problem.options.process_group is None else agree(problem, wanted)


def recomputes(options: Options, wanted: Sequence[bool]) -> bool:
    """True where no gradient can be computed before the upstream gradient is known."""
    return options.reduction == "none" and (wanted[1] or wanted[2])


def row_weight(problem: Problem) -> Tensor | None:
    """The factor of each token's gradient in the loss [N]; None for 1."""
    weight, reduction = problem.token_weight, problem.options.reduction
    if reduction != "mean":
        return weight if reduction == "sum" else None
    if weight is not None:
        return weight * mean_factor(weight)
    tokens = problem.student_hidden.shape[0]
    share = 1 / max(tokens, 1)
    return problem.student_hidden.new_full((tokens,), share, dtype=problem.dtype)


def outputs(problem: Problem, result: Result) -> tuple[Tensor, ...]:
    """`RESULTS` of a forward operator."""
    reduction = problem.options.reduction
    loss = reduce_tokens(result.per_token, problem.token_weight, reduction)
    gradients = (result.hidden_gradient, result.weight_gradient, result.bias_gradient)
    return (
        loss.clone() if reduction == "none" else loss,  # outputs of an operator must not alias
        result.values,
        *(result.values.new_empty(0) if x is None else x for x in gradients),
    )


def fake_outputs(problem: Problem, wanted: Sequence[bool]) -> tuple[Tensor, ...]:
    """Tensors of the shapes of `RESULTS`."""
    tokens, (size, dim) = problem.student_hidden.shape[0], problem.student_weight.shape
    new = problem.student_hidden.new_empty(0, dtype=problem.dtype)
    now = [x and not recomputes(problem.options, wanted) for x in wanted]
    return (
        new.new_empty(tokens if problem.options.reduction == "none" else ()),
        new.new_empty((problem.stat_count, tokens)),
        new.new_empty((tokens, dim) if now[0] else 0),
        new.new_empty((size, dim) if now[1] else 0),
        new.new_empty(size if now[2] else 0),
    )


@_forward.register_fake
def _forward_fake(*inputs: Any) -> tuple[Tensor, ...]:
    return fake_outputs(Problem.of(inputs[:-1]), inputs[-1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    problem, ctx.wanted = Problem.of(inputs[:-1]), inputs[-1]
    ctx.n_inputs = len(inputs)
    ctx.recomputes = recomputes(problem.options, ctx.wanted)
    if ctx.recomputes:
        ctx.save_for_backward(*inputs[: len(TENSORS)])
        ctx.options = inputs[len(TENSORS) : -1]
    else:
        trained = (inputs[position] for position in TRAINED)
        ctx.dtypes = [None if x is None else x.dtype for x in trained]
        ctx.save_for_backward(*output[2:5])


def _backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if upstream is None:
        return (None,) * ctx.n_inputs
    if ctx.recomputes:
        gradients = _recompute(upstream, *ctx.saved_tensors, *ctx.options, ctx.wanted)
    else:
        gradients = _times_upstream_each(ctx, upstream)
    return among_inputs(gradients, ctx.wanted, ctx.n_inputs)


def _times_upstream_each(ctx: Any, upstream: Tensor) -> list[Tensor | None]:
    """The saved gradients times the upstream one; in place where nobody needs them again."""
    per_row = upstream[:, None] if upstream.dim() else upstream
    last_use = _graph_is_freed(upstream)
    return [
        None
        if not need
        else _scaled_in_place(x, per_row)
        if last_use and x.dtype == dtype
        else _times_upstream(x, per_row, dtype)
        for x, dtype, need in zip(ctx.saved_tensors, ctx.dtypes, ctx.wanted, strict=True)
    ]


def _scaled_in_place(saved: Tensor, upstream: Tensor) -> Tensor:
    if upstream.device.type == "cpu" and upstream.dim() == 0 and upstream == 1:
        return saved  # and its pages as they are, some of which may never have been touched
    return saved.mul_(upstream)


def _graph_is_freed(upstream: Tensor) -> bool:
    """True when this backward is the graph's last: what it saved may then be used up.

    Spares a second buffer of the head's size in every training step. With `retain_graph`, under
    tracing (tensor subclasses), for a batch of upstream gradients, or if PyTorch ever drops the
    query, gradients are copied instead.
    """
    kept = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)
    return type(upstream) is Tensor and not kept() and not batched(upstream)


@library.custom_op(
    "opsdc_kernels::chunked_backward",
    mutates_args=(),
    schema=f"(Tensor upstream, {SCHEMA}, bool[] wanted) -> (Tensor, Tensor, Tensor)",
)
def _recompute(upstream: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    """(dH, dW, db or empty each) of Σ upstream·divergence, by a second run over the chunks."""
    problem, wanted = Problem.of(inputs[:-1]), GradientsWanted(*inputs[-1])
    options = replace(problem.options, return_stats=False)
    shard, problem = _sharded(replace(problem, target_ids=None, options=options), wanted)
    with torch.autocast(problem.student_hidden.device.type, enabled=False):
        result = run_chunks(problem, wanted, upstream, problem.kept_tokens(), shard=shard)
    gradients = (result.hidden_gradient, result.weight_gradient, result.bias_gradient)
    return tuple(
        upstream.new_empty(0) if x is None else x.to(inputs[position].dtype)
        for x, position in zip(gradients, TRAINED, strict=True)
    )


@_recompute.register_fake
def _recompute_fake(upstream: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    return like_inputs(upstream, inputs, inputs[-1])


@library.custom_op("opsdc_kernels::times_upstream", mutates_args=())
def _times_upstream(saved: Tensor, upstream: Tensor, dtype: torch.dtype) -> Tensor:
    """saved · upstream, multiplied in the saved dtype and rounded once to `dtype`."""
    return torch.mul(saved, upstream, out=saved.new_empty(saved.shape, dtype=dtype))


@_times_upstream.register_fake
def _times_upstream_fake(saved: Tensor, upstream: Tensor, dtype: torch.dtype) -> Tensor:
    return saved.new_empty(saved.shape, dtype=dtype)


def _refuse(ctx: Any, *_: Any) -> None:
    raise RuntimeError(NO_DOUBLE_BACKWARD)


def register_backward(forward: Any) -> None:
    """Teach autograd the backward of a forward operator whose outputs begin with `RESULTS`."""
    forward.register_autograd(_backward, setup_context=_setup_context)


register_backward(_forward)
_recompute.register_autograd(_refuse)
_times_upstream.register_autograd(_refuse)
