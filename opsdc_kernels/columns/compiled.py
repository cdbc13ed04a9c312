"""`columns.sums` in C, for fp32 on a CPU and logits that lie by column; and the distances of
`columns.bound`."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from opsdc_kernels.problem import Problem
from opsdc_kernels.row_pass import build, threads
from opsdc_kernels.row_pass.compiled import SideOfC, for_c
from opsdc_kernels.row_pass.threads import address

SOURCE = Path(__file__).with_name("columns.c")


def native() -> build.Build:
    """`columns.c` as a library, or why there is none. Compiles in the first call that needs to."""
    return build.built(SOURCE)


def serves(x: Tensor) -> bool:
    """True for tensors that the passes here can read."""
    on_cpu = x.device.type == "cpu" and x.dtype == torch.float32
    return on_cpu and native().dll is not None


class ColumnJob(ctypes.Structure):
    """`ColumnJob` of columns.c."""

    _fields_ = (
        ("student", SideOfC),
        *threads.integers("rows", "columns"),
        *threads.pointers("square", "keeps", "along", "apart"),
        *threads.pointers("lse", "entropy", "spread", "mass", "product"),
        *threads.pointers("peak", "slope", "rest"),
    )


class SampleJob(ctypes.Structure):
    """`SampleJob` of columns.c."""

    _fields_ = (
        ("student", SideOfC),
        ("other", SideOfC),
        *threads.integers("rows", "columns"),
        ("shared", ctypes.c_int32),
        ("statistics", ctypes.c_int32),
        *threads.pointers("weight", "doubt", "lse", "base", "targets", "out"),
        *threads.integers("out_stride"),
    )


class RowsJob(ctypes.Structure):
    """`RowsJob` of columns.c."""

    _fields_ = (
        *threads.pointers("block"),
        *threads.integers("rows", "columns"),
        *threads.pointers("to", "matrix"),
        *threads.integers("stride"),
        *threads.pointers("touched", "square"),
    )


class NumbersJob(ctypes.Structure):
    """`NumbersJob` of columns.c."""

    _fields_ = (*threads.integers("start", "size"), *threads.pointers("out"))


class DistanceJob(ctypes.Structure):
    """`DistanceJob` of columns.c."""

    _fields_ = (
        *threads.pointers("weight"),
        *threads.integers("rows", "columns", "stride"),
        *threads.pointers("centre", "out"),
    )


def student_sums(
    problem: Problem, x_CV: Tensor, square_V: Tensor, along_C: Tensor, apart_C: Tensor
) -> tuple[Tensor, ...]:
    """The fields of `sums.StudentSums`."""
    rows = x_CV.new_empty(3, len(x_CV))
    columns = x_CV.new_empty(len(threads.parts(x_CV)), 3, x_CV.shape[1])  # of every thread
    rowwise = {"along": along_C, "apart": apart_C, **_named(("lse", "entropy", "spread"), rows)}
    columnwise = [{"square": square_V, **_named(("peak", "slope", "rest"), x)} for x in columns]
    _run("opsdc_student", problem, x_CV, rowwise, columnwise)
    return (*rows, columns[:, 0].amax(0), *columns[:, 1:].sum(0))


def student_masses(problem: Problem, x_CV: Tensor, reach_C: Tensor) -> tuple[Tensor, ...]:
    """The fields of `sums.StudentMasses`."""
    rows = x_CV.new_empty(2, len(x_CV))
    columns = x_CV.new_empty(len(threads.parts(x_CV)), x_CV.shape[1])  # of every thread
    rowwise = {"along": reach_C, **_named(("lse", "entropy"), rows)}
    nothing_V = torch.zeros_like(columns[0])
    columnwise = [{"square": nothing_V, "rest": x} for x in columns]
    _run("opsdc_student", problem, x_CV, rowwise, columnwise)
    return (*rows, columns.sum(0).sqrt_())


def dropped_sums(
    problem: Problem, x_CV: Tensor, lse_C: Tensor, keeps_V: Tensor, square_V: Tensor
) -> tuple[Tensor, Tensor]:
    """The same as `sums.dropped_sums`."""
    mass_C, product_C = rows = x_CV.new_empty(2, len(x_CV))
    rowwise = {"lse": lse_C, **_named(("mass", "product"), rows)}
    columnwise = {"square": square_V, "keeps": keeps_V.to(x_CV.dtype)}
    _run("opsdc_dropped", problem, x_CV, rowwise, [columnwise] * len(threads.parts(x_CV)))
    return mass_C, product_C


def sample_sums_(
    problem: Problem,
    x_CK: Tensor,
    other_CK: Tensor,
    factors_2K: Tensor,
    lse_C: Tensor,
    base_C: Tensor,
    targets_C: Tensor | None,
    fields: int,
) -> Tensor:
    """The fields of `sums.SampleSums` [fields, C]."""
    student, other = for_c(problem.side(0)), for_c(problem.side(1))
    out, (weight_K, doubt_K) = x_CK.new_empty(fields, len(x_CK)), factors_2K.contiguous()
    lse_C, base_C = lse_C.contiguous(), base_C.contiguous()
    targets_C = None if targets_C is None else targets_C.contiguous()
    jobs = [
        SampleJob(
            student=SideOfC.of(x_CK[start:], student),
            other=SideOfC.of(other_CK[start:], other),
            rows=stop - start,
            columns=x_CK.shape[1],
            shared=problem.shared_logits,
            statistics=problem.options.return_stats,
            weight=address(weight_K),
            doubt=address(doubt_K),
            lse=address(lse_C, start),
            base=address(base_C, start),
            targets=address(targets_C, start),
            out=address(out, start),
            out_stride=len(x_CK),
        )
        for start, stop in threads.parts(x_CK)
    ]
    threads.run(native(), "opsdc_sample", jobs)
    return out


def add_rows_(matrix_VD: Tensor, rows_K: Tensor, block_KD: Tensor, *, touched_V: Tensor) -> Tensor:
    """The same as `products.add_rows_`, for rows that are each named once. Those that are not
    touched are zero, and are not read: reading new pages makes them come twice."""
    square_K = block_KD.new_empty(len(rows_K))
    jobs = [
        RowsJob(
            block=address(block_KD, start * block_KD.stride(0)),
            rows=stop - start,
            columns=block_KD.shape[1],
            to=address(rows_K, start),
            matrix=address(matrix_VD),
            stride=matrix_VD.stride(0),
            touched=address(touched_V),
            square=address(square_K, start),
        )
        for start, stop in threads.parts(block_KD)
    ]
    threads.run(native(), "opsdc_add_rows", jobs)
    return square_K


def uniforms(start: int, size: int) -> Tensor:
    """The numbers of `draw.uniforms` from a mixed seed and place."""
    out_V = torch.empty(size, dtype=torch.float64)
    threads.run(
        native(), "opsdc_uniforms", [NumbersJob(start=start, size=size, out=address(out_V))]
    )
    return out_V


def square_distances(weight_VD: Tensor, centre_D: Tensor) -> Tensor:
    """‖row − centre‖² of every row [V]."""
    (size, dim), stride = weight_VD.shape, weight_VD.stride(0)
    centre_D, out_V = centre_D.contiguous(), weight_VD.new_empty(size)
    jobs = [
        DistanceJob(
            weight=address(weight_VD, start * stride),
            rows=stop - start,
            columns=dim,
            stride=stride,
            centre=address(centre_D),
            out=address(out_V, start),
        )
        for start, stop in threads.parts(weight_VD)
    ]
    threads.run(native(), "opsdc_distances", jobs)
    return out_V


def _named(names: tuple[str, ...], rows: Tensor) -> dict[str, Tensor]:
    return dict(zip(names, rows, strict=True))


def _run(
    function: str,
    problem: Problem,
    x_CV: Tensor,
    rowwise: dict[str, Tensor],
    columnwise: list[dict[str, Tensor]],
) -> None:
    """`columnwise`: for every thread."""
    student = for_c(problem.side(0))
    rowwise = {name: x.contiguous() for name, x in rowwise.items()}
    jobs = [
        ColumnJob(
            student=SideOfC.of(x_CV[start:], student),
            rows=stop - start,
            columns=x_CV.shape[1],
            **{name: address(x, start) for name, x in rowwise.items()},
            **{name: address(x) for name, x in of_thread.items()},
        )
        for (start, stop), of_thread in zip(threads.parts(x_CV), columnwise, strict=True)
    ]
    threads.run(native(), function, jobs)
