"""The row pass in C, for fp32 on a CPU and logits that lie by column: the counterpart of `eager`,
with its contract. Rows that the C code leaves alone (infinite logits, log-ratios that overflow) go
to `exact`.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from opsdc_kernels.problem import Problem, Side, Stat
from opsdc_kernels.row_pass import build, threads
from opsdc_kernels.row_pass.exact import exact_rows_
from opsdc_kernels.row_pass.result import RowResult
from opsdc_kernels.row_pass.threads import address
from opsdc_kernels.row_pass.transform import transform_

SOURCE = Path(__file__).with_name("rows.c")


def native() -> build.Build:
    """`rows.c` as a library, or why there is none. Compiles in the first call that needs to."""
    return build.built(SOURCE)


class SideOfC(ctypes.Structure):
    """`Side` of common.h."""

    _fields_ = (
        *threads.pointers("x"),
        *threads.integers("stride"),
        *threads.pointers("bias"),
        ("factor", ctypes.c_float),
        ("range", ctypes.c_float),
    )

    @classmethod
    def of(cls, x_BV: Tensor, side: Side) -> SideOfC:
        """`side` as `for_c` gives it; the tensors must live as long as this."""
        return cls(
            x=address(x_BV),
            stride=x_BV.stride(1),
            bias=address(side.bias),
            factor=side.pre,
            range=side.post or 0.0,
        )


class Job(ctypes.Structure):
    """`Job` of rows.c."""

    _fields_ = (
        ("student", SideOfC),
        ("other", SideOfC),
        *threads.integers("rows", "columns"),
        *((name, ctypes.c_int32) for name in ("shared", "divergence", "gradient", "statistics")),
        ("beta", ctypes.c_float),
        *threads.pointers("targets", "out"),
        *threads.integers("out_stride"),
    )


def divergence_rows_(
    student_BV: Tensor,
    other_BV: Tensor,
    problem: Problem,
    *,
    gradient: bool,
    target_ids_B: Tensor | None = None,
) -> RowResult:
    """The same as `eager.divergence_rows_`, for [B, V] with stride (1, any)."""
    values = _run(student_BV, other_BV, problem, gradient, target_ids_B)
    options = problem.options
    # The gradient comes without its sign and β, and so must that of the rows left alone.
    sign = -(1 - options.beta) if options.divergence == "jsd" else -1.0
    for row in values[Stat.DIVERGENCE].isnan().nonzero().squeeze(1).tolist():
        only = slice(row, row + 1)
        x, other = student_BV[only].clone(), other_BV[only].clone()
        s, t, d, slope = transform_(x, other, problem, None)
        targets = None if target_ids_B is None else target_ids_B[only]
        t = s + d if t is None else t
        values[: problem.stat_count, only] = exact_rows_(s, t, d, problem, gradient, targets)
        if gradient:
            student_BV[only] = (s if slope is None else s.mul_(slope)) / sign
    factor = torch.full_like(values[0], sign * problem.logit_factor)
    return RowResult(values[: problem.stat_count], factor)


def for_c(side: Side) -> Side:
    """The same with a bias as C reads it: contiguous, fp32."""
    bias = None if side.bias is None else side.bias.float().contiguous()
    return Side(side.scale, side.cap, side.temperature, bias)


def _run(
    student_BV: Tensor,
    other_BV: Tensor,
    problem: Problem,
    gradient: bool,
    target_ids: Tensor | None,
) -> Tensor:
    """Run the C code; every `Stat` [8, B], NaN in the first for rows left alone."""
    rows, columns = student_BV.shape
    values = student_BV.new_empty(len(Stat), rows)
    student, other = for_c(problem.side(0)), for_c(problem.side(1))
    targets = None if target_ids is None else target_ids.contiguous()
    jobs = [
        Job(
            student=SideOfC.of(student_BV[start:], student),
            other=SideOfC.of(other_BV[start:], other),
            rows=stop - start,
            columns=columns,
            shared=problem.shared_logits,
            divergence=problem.options.kind,
            gradient=gradient,
            statistics=problem.options.return_stats,
            beta=problem.options.beta,
            targets=address(targets, start),
            out=address(values, start),
            out_stride=rows,
        )
        for start, stop in threads.parts(student_BV)
    ]
    threads.run(native(), "opsdc_rows", jobs)
    return values
