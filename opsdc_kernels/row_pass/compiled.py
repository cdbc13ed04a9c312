"""Row passes of a chunk of logits in C: the counterpart of `opsdc_kernels.row_pass.eager`, with its contract,
for fp32 on a CPU and logits that lie tokens last. Rows that the C code leaves alone (infinite
logits, log-ratios that overflow) go to `rows_exact`.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from opsdc_kernels.problem import Problem
from opsdc_kernels.row_pass import threads
from opsdc_kernels.row_pass.build import native
from opsdc_kernels.row_pass.eager import Rows, exact_rows_, transform_
from opsdc_kernels.row_pass.threads import address

DIVERGENCES = ("reverse_kl", "forward_kl", "jsd")
FIELDS = 8
"""Divergence, the five statistics, the two log-probabilities of targets."""


class Side(ctypes.Structure):
    """As `Side` in rows.c."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        ("stride", ctypes.c_int64),
        ("bias", ctypes.c_void_p),
        ("factor", ctypes.c_float),
        ("range", ctypes.c_float),
    )


class Job(ctypes.Structure):
    """As `Job` in rows.c."""

    _fields_ = (
        ("student", Side),
        ("other", Side),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("shared", ctypes.c_int32),
        ("divergence", ctypes.c_int32),
        ("gradient", ctypes.c_int32),
        ("statistics", ctypes.c_int32),
        ("beta", ctypes.c_float),
        ("targets", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("out_stride", ctypes.c_int64),
    )


def divergence_rows_(
    student_BV: Tensor,
    other_BV: Tensor,
    problem: Problem,
    *,
    gradient: bool,
    target_ids_B: Tensor | None = None,
) -> Rows:
    """As `opsdc_kernels.row_pass.eager.divergence_rows_`, of [B, V] with stride (1, any)."""
    results = _run(student_BV, other_BV, problem, gradient, target_ids_B)
    sign = -(1 - problem.beta) if problem.divergence == "jsd" else -1.0
    for row in results[0].isnan().nonzero().squeeze(1).tolist():
        block = slice(row, row + 1)
        x, other = student_BV[block].clone(), other_BV[block].clone()
        s, t, d, slope = transform_(x, other, problem, None)
        targets = None if target_ids_B is None else target_ids_B[block]
        t = s + d if t is None else t
        value, statistics = exact_rows_(s, t, d, problem, gradient, targets)
        if gradient:
            student_BV[block] = (s if slope is None else s.mul_(slope)) / sign
        results[0, block] = value
        for field, found in zip(results[1:], statistics or (), strict=False):
            field[block] = found
    statistics = None
    if problem.return_stats:
        statistics = tuple(results[1 : 6 if target_ids_B is None else FIELDS])
    return Rows(results[0], torch.full_like(results[0], sign * problem.logit_factor), statistics)


def side(x_BV: Tensor, problem: Problem, which: int, bias_V: Tensor | None) -> Side:
    """The logits of the student (0) or of the other (1); `bias_V` contiguous fp32, to keep alive
    as long as this."""
    cap = problem.logit_softcap[which]
    scale = problem.logit_scale[which]
    return Side(
        x=address(x_BV),
        stride=x_BV.stride(1),
        bias=address(bias_V),
        factor=scale / (problem.temperature if cap is None else cap),
        range=0.0 if cap is None else cap / problem.temperature,
    )


def as_given(bias: Tensor | None, columns: int) -> Tensor | None:
    """A bias as `side` wants it."""
    return None if bias is None else bias.detach()[:columns].float().contiguous()


def _run(
    student_BV: Tensor,
    other_BV: Tensor,
    problem: Problem,
    gradient: bool,
    target_ids: Tensor | None,
) -> Tensor:
    """[FIELDS, B]; NaN in the first for rows left alone."""
    library = native().dll
    assert library is not None
    rows, columns = student_BV.shape
    results = student_BV.new_empty(FIELDS, rows)
    shared = problem.shared_logits
    own = as_given(problem.student_bias, columns)
    other = None if shared else as_given(problem.teacher_bias, columns)
    targets = None if target_ids is None else target_ids.contiguous()
    jobs = [
        Job(
            student=side(student_BV[start:], problem, 0, own),
            other=side(other_BV[start:], problem, 1, other),
            rows=stop - start,
            columns=columns,
            shared=shared,
            divergence=DIVERGENCES.index(problem.divergence),
            gradient=gradient,
            statistics=problem.return_stats,
            beta=problem.beta,
            targets=address(targets, start),
            out=address(results, start),
            out_stride=rows,
        )
        for start, stop in threads.parts(student_BV)
    ]
    threads.run(library, "opsdc_rows", jobs)
    return results
