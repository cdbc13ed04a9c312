"""The `fused` backend: Triton kernels that never write a logit. Experimental: it is checked in
Triton's interpreter and by compiling, and has not run on a GPU yet.

Forward: one kernel computes tiles of both heads' logits and the statistics of both distributions
(`fused.forward`). Backward recomputes the tiles, writes the gradient of a chunk of rows in 16 bits
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
from typing import Any

import torch
from torch import Tensor, library

from opsdc_kernels.memory import default_workspace_bytes
from opsdc_kernels.problem import (
    SCHEMA,
    TENSORS,
    TRAINED,
    GradientsWanted,
    Problem,
    Stat,
    among_inputs,
    like_inputs,
    named,
    reduce_tokens,
)
from opsdc_kernels.triton.launch import INTERPRETED

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NO_DOUBLE_BACKWARD = (
    "the gradient of the fused backend cannot be differentiated again; "
    'use backend="reference" for second derivatives'
)


def fused_divergence(problem: Problem) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and, if asked for, the tensors of `DivergenceStats`.

    Raises:
        TypeError: float64 inputs.
        ValueError: the tensors are not on a GPU (and `TRITON_INTERPRET=1` is not set).
        ImportError: triton is not installed.
    """
    _require_device(problem.student_hidden)
    per_token_N, values, *_ = _forward(*problem.arguments)
    loss = reduce_tokens(per_token_N, problem.token_weight, problem.options.reduction)
    return loss, named(values[: problem.stat_count]) if problem.options.return_stats else {}


def _require_device(hidden: Tensor) -> None:
    if hidden.dtype not in DTYPES:
        raise TypeError(
            f"backend='fused' computes in fp32, but student_hidden is {hidden.dtype}; use "
            "backend='chunked' or 'reference' for float64"
        )
    if importlib.util.find_spec("triton") is None:
        raise ImportError("backend='fused' needs triton; install it, or use backend='chunked'")
    if hidden.device.type != "cuda" and not INTERPRETED:
        raise ValueError(
            f"backend='fused' needs a GPU, but student_hidden is on {hidden.device}; move the "
            "tensors to the GPU, use backend='chunked', or set TRITON_INTERPRET=1 before Python "
            "starts, to run the kernels slowly on a CPU"
        )


@library.custom_op(
    "opsdc_kernels::fused_forward",
    mutates_args=(),
    schema=f"({SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Divergence [N], every `Stat` [8, N], rows saved for backward [5, N], kept rows [N] and their
    count.

    Rows of weight 0 are dropped before any GEMM and are 0 in the results. Finding them is the one
    synchronization; the count stays on the CPU, so that backward needs none.
    """
    from opsdc_kernels.fused.forward import forward
    from opsdc_kernels.fused.heads import Heads
    from opsdc_kernels.triton.scaling import gradient_scale
    from opsdc_kernels.triton.statistics import FOR_GRADIENT, JOINT_KL

    problem = Problem.of(arguments)
    N, weight = problem.student_hidden.shape[0], problem.token_weight
    rows = None if weight is None else torch.nonzero(weight).squeeze(1)
    count = N if rows is None else rows.shape[0]
    values = problem.student_hidden.new_zeros((len(Stat), N), dtype=torch.float32)
    saved = values.new_zeros((FOR_GRADIENT.stop - FOR_GRADIENT.start + 2, N))
    if count > 0:
        targets = problem.target_ids
        if targets is not None and rows is not None:
            targets = targets[rows]
        results, mean = forward(
            Heads.of(problem, rows), targets, problem.options, problem.vocab_size
        )
        divergence, dtype = results[Stat.DIVERGENCE], problem.student_weight.dtype
        scale = gradient_scale(divergence, results[JOINT_KL], problem.options, dtype)
        tokens = slice(None) if rows is None else rows
        values[:, tokens] = results[: len(Stat)]
        saved[:, tokens] = torch.cat([results[FOR_GRADIENT], mean[None], scale[None]])
    kept = values.new_zeros(0 if rows is None else N, dtype=torch.int64)
    if rows is not None:
        kept[:count] = rows
    return values[Stat.DIVERGENCE].clone(), values, saved, kept, torch.tensor(count)


@_forward.register_fake
def _forward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    problem = Problem.of(arguments)
    N = problem.student_hidden.shape[0]
    single = problem.student_hidden.new_empty((), dtype=torch.float32)
    kept = single.new_empty(0 if problem.token_weight is None else N, dtype=torch.int64)
    count = torch.empty((), dtype=torch.int64, device="cpu")
    return single.new_empty(N), single.new_empty(len(Stat), N), single.new_empty(5, N), kept, count


@library.custom_op(
    "opsdc_kernels::fused_backward",
    mutates_args=(),
    schema=f"(Tensor upstream, Tensor saved, Tensor kept, Tensor count, {SCHEMA}, bool[] wanted)"
    " -> (Tensor, Tensor, Tensor)",
)
def _backward(
    upstream: Tensor, saved: Tensor, kept: Tensor, count: Tensor, *inputs: Any
) -> tuple[Tensor, ...]:
    """Return (dH, dW, db), each of its input's shape and dtype, or empty where not needed."""
    from opsdc_kernels.fused.backward import backward
    from opsdc_kernels.fused.heads import Heads

    problem, wanted = Problem.of(inputs[:-1]), GradientsWanted(*inputs[-1])
    options, beta = problem.options, problem.options.beta
    jsd = options.divergence == "jsd"
    gradients: tuple[Tensor | None, ...] = (None, None, None)
    if int(count) > 0:
        rows = None if problem.token_weight is None else kept[: int(count)]
        heads = Heads.of(problem, rows)
        if rows is not None:
            saved, upstream = saved[:, rows].contiguous(), upstream[rows]
        student = problem.side(0)
        slope = student.pre * (student.post or 1.0) * (1 - beta if jsd else 1)
        budget = options.workspace_bytes
        budget = default_workspace_bytes(saved.device) if budget is None else budget
        coefficient_K = upstream.float() * slope / saved[4]
        with torch.autocast(saved.device.type, enabled=False):
            gradients = backward(
                heads, saved, coefficient_K, options, problem.vocab_size, wanted, budget
            )
        if rows is not None and gradients[0] is not None:
            dh = gradients[0].new_zeros(problem.student_hidden.shape)
            gradients = (dh.index_copy_(0, rows, gradients[0]), *gradients[1:])
    trained = (inputs[position] for position in TRAINED)
    return tuple(
        upstream.new_empty(0)
        if not need or x is None
        else torch.zeros_like(x, memory_format=torch.contiguous_format)
        if gradient is None
        else gradient.to(x.dtype)
        for x, gradient, need in zip(trained, gradients, wanted, strict=True)
    )


@_backward.register_fake
def _backward_fake(
    upstream: Tensor, saved: Tensor, kept: Tensor, count: Tensor, *inputs: Any
) -> tuple[Tensor, ...]:
    return like_inputs(upstream, inputs, inputs[-1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[2:], *inputs[: len(TENSORS)])
    ctx.options = inputs[len(TENSORS) :]


def _propagate(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    count = len(TENSORS) + len(ctx.options)
    if upstream is None:
        return (None,) * count
    wanted = [ctx.needs_input_grad[position] for position in TRAINED]
    gradients = _backward(upstream, *ctx.saved_tensors, *ctx.options, wanted)
    return among_inputs(gradients, wanted, count)


def _refuse(ctx: Any, *_: Any) -> None:
    raise RuntimeError(NO_DOUBLE_BACKWARD)


_forward.register_autograd(_propagate, setup_context=_setup_context)
_backward.register_autograd(_refuse)
