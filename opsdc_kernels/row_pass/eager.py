"""The row pass in torch: `fast` where every logit is finite, on a CPU; else `exact`."""

from __future__ import annotations

import torch
from torch import Tensor

from opsdc_kernels.problem import Problem
from opsdc_kernels.row_pass.exact import exact_rows_
from opsdc_kernels.row_pass.fast import fast_rows_
from opsdc_kernels.row_pass.result import BUFFERS, RowResult
from opsdc_kernels.row_pass.transform import transform_

SMALLEST = 2.0**-100
"""Gradients below it would make denormals of the sums they enter."""


def divergence_rows_(
    student_BV: Tensor,
    other_BV: Tensor,
    problem: Problem,
    *,
    gradient: bool,
    target_ids_B: Tensor | None = None,
    buffers: Tensor | None = None,
) -> RowResult:
    """Turn raw products of some rows into their values, and the student's into its gradient.

    The products are student_BV = h·Wᵀ and other_BV = the teacher's h·Wᵀ or, where
    `problem.shared_logits`, (teacher hidden − student hidden)·Wᵀ. Both are overwritten, and so are
    the `buffers` [BUFFERS, ≥ B, V] that spare a CPU fresh pages (None: allocated here).
    """
    if buffers is None:
        buffers = student_BV.new_empty(BUFFERS, *student_BV.shape)
    difference, *free = buffers[:, : student_BV.shape[0]]
    s, t, d, slope = transform_(student_BV, other_BV, problem, difference)
    on_cpu = s.device.type == "cpu"
    result = None
    if on_cpu and not _masked_by_shared_bias(problem):
        result = fast_rows_(s, d, problem, gradient=gradient, target_ids_B=target_ids_B, free=free)
    if result is None:
        t = s + d if t is None else t
        values = exact_rows_(s, t, d, problem, gradient, target_ids_B)
        result = RowResult(values, torch.ones_like(values[0]))
    if gradient:
        if slope is not None:
            s.mul_(slope)
        if on_cpu:
            without_denormals_(s)
        if s is not student_BV:
            student_BV.copy_(s)
    return result._replace(factor=result.factor * problem.logit_factor)


def without_denormals_(gradient_BV: Tensor) -> None:
    """Replace by 0 what makes denormal sums, with which a CPU computes at a hundredth of its speed:
    a few in a thousand numbers, in rows of real vocabularies, slow the products that read the
    gradient 1.4 times."""
    torch.hardshrink(gradient_BV, SMALLEST, out=gradient_BV)


def _masked_by_shared_bias(problem: Problem) -> bool:
    """True for −inf logits that t − s does not show, as the bias of a shared head cancels in it."""
    bias = problem.side(0).bias
    if bias is None or not problem.shared_logits:
        return False
    return not bool(torch.isfinite(bias).all())
