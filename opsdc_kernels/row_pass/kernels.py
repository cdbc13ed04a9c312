"""The row pass in Triton, for fp32 logits on a GPU: statistics, then the gradient in place.

The counterpart of `row_pass.eager`, with its contract. One program reads a row once for all
statistics (twice for JSD) and once more to write the gradient.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from opsdc_kernels.problem import Problem, Stat
from opsdc_kernels.row_pass.result import RowResult
from opsdc_kernels.triton.launch import ENABLE_FP_FUSION, INTERPRETED, ROWS
from opsdc_kernels.triton.logits import SideOfTriton, logit_gradient, logits
from opsdc_kernels.triton.scaling import gradient_scale
from opsdc_kernels.triton.statistics import (
    FOR_GRADIENT,
    JOINT_KL,
    RESULTS,
    at_target,
    empty_statistics,
    jsd_terms,
    merge,
    store_results,
    tile_statistics,
)


@triton.jit
def load_products(student_ptr, other_ptr, row, stride, cols, V):
    """Load both rows' products of some columns, [1, BV] each."""
    offsets = tl.cast(row, tl.int64) * stride + cols
    inside = cols < V
    acc = tl.load(student_ptr + offsets, mask=inside, other=0.0)
    return acc[None, :], tl.load(other_ptr + offsets, mask=inside, other=0.0)[None, :]


@triton.jit
def rows_statistics_kernel(
    student_ptr, other_ptr, student, teacher, target_ptr, out_ptr, mean_ptr, value_ptr, beta, N, V,
    stride,
    SHARED: tl.constexpr, DIVERGENCE: tl.constexpr, MASKED: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Write out[field, row] by `store_results`; for JSD also value[row] and mean[row], the sums of
    `jsd_terms`."""
    row = tl.program_id(0)
    rows = row + tl.arange(0, 1)
    one = tl.full([1], 1.0, tl.float32)
    stats = empty_statistics(1)
    s_target = stats.student.peak
    t_target = stats.teacher.peak
    if target_ptr is not None:
        target = tl.load(target_ptr + rows)
    for col0 in range(0, V, BV):
        cols = col0 + tl.arange(0, BV)
        acc, other = load_products(student_ptr, other_ptr, row, stride, cols, V)
        s, t, d, _ = logits(student, teacher, acc, other, one, cols, V, SHARED)
        if target_ptr is not None:
            s_target = at_target(s_target, s, cols, target)
            t_target = at_target(t_target, t, cols, target)
        new = tile_statistics(s, t, d, cols, V, DIVERGENCE == 1, MASKED)
        stats = merge(stats, new, DIVERGENCE == 1, MASKED)
    lse_s, lse_t, anchor, offset = store_results(
        stats, s_target, t_target, out_ptr + rows, N, rows < N, DIVERGENCE
    )
    if DIVERGENCE == 2:
        beta = tl.cast(beta, tl.float32)
        value = tl.zeros([1], tl.float32)
        mean = tl.zeros([1], tl.float32)
        for col0 in range(0, V, BV):
            cols = col0 + tl.arange(0, BV)
            acc, other = load_products(student_ptr, other_ptr, row, stride, cols, V)
            s, t, d, _ = logits(student, teacher, acc, other, one, cols, V, SHARED)
            more, more_mean = jsd_terms(s, t, d, lse_s, lse_t, anchor, offset, beta)
            value += more
            mean += more_mean
        tl.store(mean_ptr + rows, mean)
        tl.store(value_ptr + rows, value)


@triton.jit
def rows_gradient_kernel(
    student_ptr, other_ptr, student, teacher, normalizer_ptr, anchor_ptr, offset_ptr, mean_ptr,
    scale_ptr, beta, V, stride,
    SHARED: tl.constexpr, DIVERGENCE: tl.constexpr, MASKED: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Replaces the student's products by the scaled logit gradient."""
    row = tl.program_id(0)
    rows = row + tl.arange(0, 1)
    cols = tl.program_id(1) * BV + tl.arange(0, BV)
    one = tl.full([1], 1.0, tl.float32)
    acc, other = load_products(student_ptr, other_ptr, row, stride, cols, V)
    s, t, d, u = logits(student, teacher, acc, other, one, cols, V, SHARED)
    normalizer = tl.load(normalizer_ptr + rows)
    anchor, offset = tl.load(anchor_ptr + rows), tl.load(offset_ptr + rows)
    mean, scale = tl.load(mean_ptr + rows), tl.load(scale_ptr + rows)
    beta = tl.cast(beta, tl.float32)
    g = logit_gradient(s, t, d, normalizer, anchor, offset, mean, beta, DIVERGENCE, MASKED)
    if student.post is not None:
        g *= 1 - u * u
    offsets = tl.cast(row, tl.int64) * stride + cols
    tl.store(student_ptr + offsets[None, :], g * scale[:, None], mask=(cols < V)[None, :])


def divergence_rows_(
    student_BV: Tensor,
    other_BV: Tensor,
    problem: Problem,
    *,
    gradient: bool,
    target_ids_B: Tensor | None = None,
    tile_dtype: torch.dtype = torch.float32,
) -> RowResult:
    """The same as `eager.divergence_rows_`; `tile_dtype` is what the gradient will be rounded to,
    for which the buffer is scaled by a power of two per row (the result's factor undoes it)."""
    n_rows, V = student_BV.shape
    sides = [
        SideOfTriton(bias=side.bias, pre=side.pre, post=side.post)
        for side in (problem.side(0), problem.side(1))
    ]
    open_ended = [side.bias is not None and side.post is None for side in sides]
    jsd, beta = problem.options.divergence == "jsd", problem.options.beta
    results, mean = student_BV.new_empty((RESULTS, n_rows)), student_BV.new_zeros(n_rows)
    value = student_BV.new_empty(n_rows) if jsd else results[Stat.DIVERGENCE]
    launch = {
        "SHARED": problem.shared_logits,
        "DIVERGENCE": problem.options.kind,
        "MASKED": any(open_ended) and not problem.shared_logits,
        "BV": 64 if INTERPRETED else ROWS.BV,
        "num_warps": ROWS.num_warps,
        "enable_fp_fusion": ENABLE_FP_FUSION,
    }
    stride = student_BV.stride(0)
    rows_statistics_kernel[(n_rows,)](
        student_BV, other_BV, *sides, target_ids_B, results, mean, value, beta, n_rows, V, stride,
        **launch,
    )  # fmt: skip
    slope = sides[0].pre * (sides[0].post or 1.0) * (1 - beta if jsd else 1.0)
    scale = gradient_scale(value, results[JOINT_KL], problem.options, tile_dtype)
    if gradient:
        rows_gradient_kernel[(n_rows, triton.cdiv(V, launch["BV"]))](
            student_BV, other_BV, *sides, *results[FOR_GRADIENT], mean, scale, beta, V, stride,
            **launch,
        )  # fmt: skip
    results[Stat.DIVERGENCE] = value
    return RowResult(results[: problem.stat_count], slope / scale)
