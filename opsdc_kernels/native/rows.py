"""Row passes of a chunk of logits in C: the counterpart of `opsdc_kernels.rows`, with its contract,
for fp32 on a CPU. Rows that the C code leaves alone (infinite logits, log-ratios that overflow) go
to `rows_exact`, soft-capped logits through torch first.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from opsdc_kernels.native import threads
from opsdc_kernels.native.build import native
from opsdc_kernels.native.threads import address
from opsdc_kernels.problem import Problem
from opsdc_kernels.rows import Rows, exact_rows_, transform_

DIVERGENCES = ("reverse_kl", "forward_kl", "jsd")
FIELDS = 8
"""Divergence, the five statistics, the two log-probabilities of targets."""


class Job(ctypes.Structure):
    """As `Job` in rows.c."""

    _fields_ = (
        ("student", ctypes.c_void_p),
        ("other", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("student_stride", ctypes.c_int64),
        ("other_stride", ctypes.c_int64),
        ("student_bias", ctypes.c_void_p),
        ("teacher_bias", ctypes.c_void_p),
        ("student_factor", ctypes.c_float),
        ("other_factor", ctypes.c_float),
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
    """As `opsdc_kernels.rows.divergence_rows_`."""
    raw = problem.logit_softcap == (None, None)
    slope = t_BV = None
    s, other, shared = student_BV, other_BV, problem.shared_logits
    if not raw:
        s, t_BV, other, slope = transform_(student_BV, other_BV, problem, None)
        shared = True
    results = _run(s, other, shared, raw, problem, gradient, target_ids_B)
    for row in results[0].isnan().nonzero().squeeze(1).tolist():
        block = slice(row, row + 1)
        d = other[block] if shared else other[block] - s[block]
        if t_BV is not None:
            t = t_BV[block]
        else:
            t = s[block] + d if shared else other[block]
        targets = None if target_ids_B is None else target_ids_B[block]
        value, statistics = exact_rows_(s[block], t, d, problem, gradient, targets)
        if gradient:
            s[block] /= _sign(problem)
        results[0, block] = value
        for field, found in zip(results[1:], statistics or (), strict=False):
            field[block] = found
    if gradient and slope is not None:
        s.mul_(slope)
    if gradient and s is not student_BV:
        student_BV.copy_(s)
    statistics = None
    if problem.return_stats:
        statistics = tuple(results[1 : 6 if target_ids_B is None else FIELDS])
    factor = torch.full_like(results[0], _sign(problem) * problem.logit_factor)
    return Rows(results[0], factor, statistics)


def _sign(problem: Problem) -> float:
    """What the gradient that the C code leaves is still to be multiplied by."""
    return -(1 - problem.beta) if problem.divergence == "jsd" else -1.0


def _run(
    s: Tensor,
    other: Tensor,
    shared: bool,
    raw: bool,
    problem: Problem,
    gradient: bool,
    target_ids: Tensor | None,
) -> Tensor:
    """[FIELDS, B]; NaN in the first for rows left alone. `raw`: biases and factors are to apply."""
    library = native().dll
    assert library is not None
    rows, columns = s.shape
    results = s.new_empty(FIELDS, rows)
    given = (problem.student_bias, None if shared else problem.teacher_bias)
    biases = [None if x is None else x.detach()[:columns].float().contiguous() for x in given]
    targets = None if target_ids is None else target_ids.contiguous()

    def job(start: int, stop: int) -> Job:
        return Job(
            student=address(s, start * s.stride(0)),
            other=address(other, start * other.stride(0)),
            rows=stop - start,
            columns=columns,
            student_stride=s.stride(0),
            other_stride=other.stride(0),
            student_bias=address(biases[0]) if raw else None,
            teacher_bias=address(biases[1]) if raw else None,
            student_factor=problem.logit_scale[0] / problem.temperature if raw else 1.0,
            other_factor=problem.logit_scale[1] / problem.temperature if raw else 1.0,
            shared=shared,
            divergence=DIVERGENCES.index(problem.divergence),
            gradient=gradient,
            statistics=problem.return_stats,
            beta=problem.beta,
            targets=address(targets, start),
            out=address(results, start),
            out_stride=rows,
        )

    threads.run(library, "opsdc_rows", [job(*part) for part in threads.parts(s)])
    return results
