"""The `fused` backend: Triton kernels that never write a logit.

Forward: one kernel computes tiles of both heads' logits and the statistics of both distributions
(`triton.forward`). Backward recomputes the tiles, writes the gradient of a chunk of rows in 16 bits
[C, V] (fp32 for fp32 inputs) and multiplies it by the head and by the hidden states. Rows are never
added atomically: results repeat bit for bit.

Cost in head GEMMs (2 N V D flop): 2 in forward (JSD 4: it needs both normalizers before its terms),
3 in backward with a frozen head, 4 with a trainable one. A shared head in 16 bits takes one more
per pass over the tiles: the difference of hidden states is split into a high and a low part, so
that its rounding does not limit the loss.
Scratch: nothing of size V in forward; in backward the [C, V] tile, beside the fp32 gradients.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, library

from opsdc_kernels.plan import default_workspace_bytes
from opsdc_kernels.problem import Problem, reduce_tokens

DIVERGENCES = ("reverse_kl", "forward_kl", "jsd")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NO_DOUBLE_BACKWARD = (
    "the gradient of the fused backend cannot be differentiated again; "
    'use backend="reference" for second derivatives'
)


def fused_divergence(problem: Problem) -> tuple[Tensor, tuple[Tensor, ...] | None]:
    """Loss and, if asked for, the tensors of `DivergenceStats`.

    Raises:
        TypeError: float64 inputs.
        ValueError: the tensors are not on a GPU (and `TRITON_INTERPRET=1` is not set).
        ImportError: triton is not installed.
    """
    _require_device(problem.student_hidden)
    value_N, statistics, *_ = _forward(
        problem.student_hidden,
        problem.student_weight,
        problem.teacher_hidden,
        problem.teacher_weight,
        problem.student_bias,
        problem.teacher_bias,
        problem.token_weight,
        problem.target_ids,
        problem.shared_logits,
        problem.vocab_size,
        problem.divergence,
        problem.beta,
        folded_transform(problem),
        problem.workspace_bytes,
    )
    loss = reduce_tokens(value_N, problem.token_weight, problem.reduction)
    if not problem.return_stats:
        return loss, None
    kept = 5 if problem.target_ids is None else 7
    return loss, (value_N.detach(), *statistics.detach()[:kept].unbind(0))


def folded_transform(problem: Problem) -> list[float]:
    """(pre, post) of student, then teacher: a logit is post * tanh(pre * x), or where post is 0
    (no soft-cap) pre * x, x being h W' + b."""
    folded = []
    for scale, cap in zip(problem.logit_scale, problem.logit_softcap, strict=True):
        folded += [scale / (cap or problem.temperature), (cap or 0.0) / problem.temperature]
    return folded


def _require_device(hidden: Tensor) -> None:
    if hidden.dtype not in DTYPES:
        raise TypeError(
            f"backend='fused' computes in fp32, but student_hidden is {hidden.dtype}; use "
            "backend='chunked' or 'reference' for float64"
        )
    if importlib.util.find_spec("triton") is None:
        raise ImportError("backend='fused' needs triton; install it, or use backend='chunked'")
    from opsdc_kernels.fused.heads import INTERPRETED

    if hidden.device.type != "cuda" and not INTERPRETED:
        raise ValueError(
            f"backend='fused' needs a GPU, but student_hidden is on {hidden.device}; move the "
            "tensors to the GPU, use backend='chunked', or set TRITON_INTERPRET=1 before Python "
            "starts, to run the kernels slowly on a CPU"
        )


@library.custom_op("opsdc_kernels::fused_forward", mutates_args=())
def _forward(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor | None,
    student_bias: Tensor | None,
    teacher_bias: Tensor | None,
    token_weight: Tensor | None,
    target_ids: Tensor | None,
    shared: bool,
    vocab_size: int,
    divergence: str,
    beta: float,
    transform: Sequence[float],
    workspace_bytes: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """value [N], statistics [7, N], rows saved for backward [5, N], kept rows [N] and their count.

    Rows of weight 0 are dropped before any GEMM and are 0 in the results. Finding them is the one
    synchronization; the count stays on the CPU, so that backward needs none.
    """
    from opsdc_kernels.fused.forward import forward
    from opsdc_kernels.fused.heads import Heads
    from opsdc_kernels.triton.scaling import gradient_scale

    N = student_hidden.shape[0]
    rows = None if token_weight is None else torch.nonzero(token_weight).squeeze(1)
    count = N if rows is None else rows.shape[0]
    out = student_hidden.new_zeros((13, N), dtype=torch.float32)
    if count > 0:
        heads = Heads.of(
            student_hidden, student_weight, teacher_hidden, teacher_weight,
            student_bias, teacher_bias, rows, shared, transform,
        )  # fmt: skip
        if target_ids is not None and rows is not None:
            target_ids = target_ids[rows]
        kind = DIVERGENCES.index(divergence)
        results, mean = forward(heads, target_ids, kind, beta, vocab_size)
        scale = gradient_scale(results[0], results[11], divergence, beta, student_weight.dtype)
        found = torch.cat([results[:11], torch.stack([mean, scale])])
        out = found if rows is None else out.index_copy_(1, rows, found)
    kept = out.new_zeros(0 if rows is None else N, dtype=torch.int64)
    if rows is not None:
        kept[:count] = rows
    return out[0].clone(), out[1:8].clone(), out[8:].clone(), kept, torch.tensor(count)


@_forward.register_fake
def _forward_fake(student_hidden: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    N, token_weight = student_hidden.shape[0], inputs[5]
    single = student_hidden.new_empty((), dtype=torch.float32)
    kept = single.new_empty(0 if token_weight is None else N, dtype=torch.int64)
    count = torch.empty((), dtype=torch.int64, device="cpu")
    return single.new_empty(N), single.new_empty(7, N), single.new_empty(5, N), kept, count


@library.custom_op("opsdc_kernels::fused_backward", mutates_args=())
def _backward(
    upstream: Tensor,
    saved: Tensor,
    kept: Tensor,
    count: Tensor,
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor | None,
    student_bias: Tensor | None,
    teacher_bias: Tensor | None,
    compacted: bool,
    shared: bool,
    vocab_size: int,
    divergence: str,
    beta: float,
    transform: Sequence[float],
    workspace_bytes: int | None,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """(dH, dW, db), each of its input's shape and dtype, or empty where not needed."""
    from opsdc_kernels.fused.backward import backward
    from opsdc_kernels.fused.heads import Heads

    inputs = (student_hidden, student_weight, student_bias)
    rows = kept[: int(count)] if compacted else None
    if int(count) == 0:
        found: tuple[Tensor | None, ...] = (None, None, None)
    else:
        heads = Heads.of(
            student_hidden, student_weight, teacher_hidden, teacher_weight,
            student_bias, teacher_bias, rows, shared, transform,
        )  # fmt: skip
        if rows is not None:
            saved, upstream = saved[:, rows].contiguous(), upstream[rows]
        slope = transform[0] * (transform[1] or 1.0) * (1 - beta if divergence == "jsd" else 1)
        budget = default_workspace_bytes(saved.device)
        budget = budget if workspace_bytes is None else workspace_bytes
        kind, coefficient = DIVERGENCES.index(divergence), upstream.float() * slope / saved[4]
        with torch.autocast(saved.device.type, enabled=False):
            found = backward(heads, saved, coefficient, kind, beta, vocab_size, needs, budget)
        if rows is not None and found[0] is not None:
            dh = found[0].new_zeros(student_hidden.shape).index_copy_(0, rows, found[0])
            found = (dh, *found[1:])
    return tuple(  # type: ignore[return-value]
        upstream.new_empty(0)
        if not need or x is None
        else torch.zeros_like(x, memory_format=torch.contiguous_format)
        if gradient is None
        else gradient.to(x.dtype)
        for x, gradient, need in zip(inputs, found, needs, strict=True)
    )


@_backward.register_fake
def _backward_fake(upstream: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    return tuple(
        torch.empty_like(inputs[i], memory_format=torch.contiguous_format)
        if need
        else upstream.new_empty(0)
        for i, need in zip((3, 4, 7), inputs[-1], strict=True)
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[2:], *inputs[:6])
    ctx.options = (inputs[6] is not None, *inputs[8:])
    ctx.n_inputs = len(inputs)


def _propagate(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    gradients: list[Tensor | None] = [None] * ctx.n_inputs
    if upstream is None:
        return tuple(gradients)
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 4)]
    found = _backward(upstream, *ctx.saved_tensors, *ctx.options, needs)
    for position, gradient, need in zip((0, 1, 4), found, needs, strict=True):
        if need:
            gradients[position] = gradient
    return tuple(gradients)


def _refuse(ctx: Any, *_: Any) -> None:
    raise RuntimeError(NO_DOUBLE_BACKWARD)


_forward.register_autograd(_propagate, setup_context=_setup_context)
_backward.register_autograd(_refuse)
