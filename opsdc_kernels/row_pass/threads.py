"""Passes in C over the rows of a tensor, on the threads that torch computes with."""

from __future__ import annotations

import ctypes
import functools
import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from opsdc_kernels.row_pass.build import Build

PANEL = 16
"""`W` in common.h."""
THREAD_LOGITS = 1 << 17
"""Fewer logits per thread than this (0.2 ms) are not worth waking one."""


def pointers(*names: str) -> list[tuple[str, type]]:
    """Fields of a structure."""
    return [(name, ctypes.c_void_p) for name in names]


def integers(*names: str) -> list[tuple[str, type]]:
    """Fields of 64 bits of a structure."""
    return [(name, ctypes.c_int64) for name in names]


class Queue(ctypes.Structure):
    """`Queue` of common.h."""

    _fields_ = (*pointers("work", "jobs"), *integers("size", "count", "next"))


def parts(x_BV: Tensor) -> list[tuple[int, int]]:
    """(first row, one past the last) of each thread; all but the last are whole panels."""
    rows, columns = x_BV.shape
    panels = -(-rows // PANEL)
    threads = max(min(torch.get_num_threads(), panels, rows * columns // THREAD_LOGITS), 1)
    cuts = [min(panels * i // threads * PANEL, rows) for i in range(threads + 1)]
    return list(itertools.pairwise(cuts))


def run(build: Build, name: str, jobs: Sequence[ctypes.Structure]) -> None:
    """Run the pass `name` of every job, a thread each."""
    library = build.dll
    assert library is not None
    if len(jobs) == 1:
        getattr(library, name)(ctypes.byref(jobs[0]))
        return
    array = (type(jobs[0]) * len(jobs))(*jobs)
    queue = Queue(
        work=ctypes.cast(getattr(library, name), ctypes.c_void_p),
        jobs=ctypes.addressof(array),
        size=ctypes.sizeof(array[0]),
        count=len(jobs),
        next=0,
    )
    parallel = _openmp()
    if parallel is not None:
        parallel(library.opsdc_work, ctypes.byref(queue), len(jobs), 0)
        return
    with ThreadPoolExecutor(len(jobs)) as pool:
        list(pool.map(lambda _: library.opsdc_work(ctypes.byref(queue)), jobs))


@functools.cache
def _openmp() -> Callable[..., object] | None:
    """The start of a parallel region in the OpenMP that torch has loaded, if that is GNU's. After
    every product its threads spin for some 10 ms: beside them others get half of a processor."""
    try:
        return ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, OSError, TypeError):
        return None


def address(x: Tensor | None, offset: int = 0) -> int | None:
    """Address of the element `offset`."""
    return None if x is None else x.data_ptr() + offset * x.element_size()
