"""`opsdc_kernels.columns.sums` in C, for fp32 on a CPU and logits that lie tokens last; and the
distances of `column_bound`."""

from __future__ import annotations

import ctypes

from torch import Tensor

from opsdc_kernels.columns.sums import Student
from opsdc_kernels.problem import Problem
from opsdc_kernels.row_pass import threads
from opsdc_kernels.row_pass.build import native
from opsdc_kernels.row_pass.compiled import Side, as_given, side
from opsdc_kernels.row_pass.threads import address


class ColumnJob(ctypes.Structure):
    """As `ColumnJob` in rows.c."""

    _fields_ = (
        ("student", Side),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("square", ctypes.c_void_p),
        ("keeps", ctypes.c_void_p),
        ("along", ctypes.c_void_p),
        ("apart", ctypes.c_void_p),
        ("lse", ctypes.c_void_p),
        ("entropy", ctypes.c_void_p),
        ("spread", ctypes.c_void_p),
        ("mass", ctypes.c_void_p),
        ("product", ctypes.c_void_p),
        ("peak", ctypes.c_void_p),
        ("slope", ctypes.c_void_p),
        ("rest", ctypes.c_void_p),
    )


def student(
    problem: Problem, x_CV: Tensor, square_V: Tensor, along_C: Tensor, apart_C: Tensor
) -> Student:
    rows = x_CV.new_empty(3, len(x_CV))
    columns = x_CV.new_empty(len(threads.parts(x_CV)), 3, x_CV.shape[1])  # one of each per thread
    rowwise = {"along": along_C, "apart": apart_C, **_named(("lse", "entropy", "spread"), rows)}
    columnwise = [{"square": square_V, **_named(("peak", "slope", "rest"), own)} for own in columns]
    _run("opsdc_student", problem, x_CV, rowwise, columnwise)
    lse_C, entropy_C, spread_C = rows
    slope_V, rest_V = columns[:, 1:].sum(0)
    return Student(lse_C, entropy_C, spread_C, columns[:, 0].amax(0), slope_V, rest_V)


def dropped(
    problem: Problem, x_CV: Tensor, lse_C: Tensor, keeps_V: Tensor, square_V: Tensor
) -> tuple[Tensor, Tensor]:
    mass_C, product_C = rows = x_CV.new_empty(2, len(x_CV))
    rowwise = {"lse": lse_C, **_named(("mass", "product"), rows)}
    columnwise = {"square": square_V, "keeps": keeps_V.to(x_CV.dtype)}
    _run("opsdc_dropped", problem, x_CV, rowwise, [columnwise] * len(threads.parts(x_CV)))
    return mass_C, product_C


class DistanceJob(ctypes.Structure):
    """As `DistanceJob` in rows.c."""

    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("stride", ctypes.c_int64),
        ("centre", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
    )


def square_distances(weight_VD: Tensor, centre_D: Tensor) -> Tensor:
    """‖row − centre‖² of every row [V]."""
    library = native().dll
    assert library is not None
    (size, dim), stride = weight_VD.shape, weight_VD.stride(0)
    centre_D, found_V = centre_D.contiguous(), weight_VD.new_empty(size)
    jobs = [
        DistanceJob(
            weight=address(weight_VD, start * stride),
            rows=stop - start,
            columns=dim,
            stride=stride,
            centre=address(centre_D),
            out=address(found_V, start),
        )
        for start, stop in threads.parts(weight_VD)
    ]
    threads.run(library, "opsdc_distances", jobs)
    return found_V


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
    library = native().dll
    assert library is not None
    size = x_CV.shape[1]
    bias = as_given(problem.student_bias, size)
    rowwise = {name: x.contiguous() for name, x in rowwise.items()}

    jobs = [
        ColumnJob(
            student=side(x_CV[start:], problem, 0, bias),
            rows=stop - start,
            columns=size,
            **{name: address(x, start) for name, x in rowwise.items()},
            **{name: address(x) for name, x in own.items()},
        )
        for (start, stop), own in zip(threads.parts(x_CV), columnwise, strict=True)
    ]
    threads.run(library, function, jobs)
