"""The choice of row pass: C, Triton or torch. Nothing else decides it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor

from opsdc_kernels.problem import Problem
from opsdc_kernels.products import Layout
from opsdc_kernels.row_pass import compiled, eager
from opsdc_kernels.row_pass.result import BUFFERS, EXACT_TEMPORARIES, RowResult, block_rows


@dataclass(frozen=True, kw_only=True, slots=True)
class RowPass:
    """The way from the products of a chunk's rows to divergence, statistics and gradient."""

    name: str
    """The code that runs and, where it is not the fastest, the reason."""
    layout: Layout
    """The layout in which it wants the logits."""
    run: Callable[..., RowResult]
    """`eager.divergence_rows_`, or a function that keeps its contract."""
    rows_at_once: Callable[[int], int] | None = None
    """Rows of so many columns that `run` takes at once; None for any number."""
    buffers: int = 0
    """Blocks of so many rows that it is given to write to."""
    temporaries: int = EXACT_TEMPORARIES
    """Results of the size of its rows that it allocates for what goes to `exact`."""

    def over(
        self,
        student_CV: Tensor,
        other_CV: Tensor,
        problem: Problem,
        *,
        gradient: bool,
        target_ids_C: Tensor | None,
    ) -> RowResult:
        """Run over all rows of a chunk, block after block."""
        height, columns = student_CV.shape
        run, step = partial(self.run, problem=problem, gradient=gradient), max(height, 1)
        if self.rows_at_once is not None:
            step = min(self.rows_at_once(columns), step)
            run = partial(run, buffers=student_CV.new_empty(self.buffers, step, columns))
        blocks = [slice(start, start + step) for start in range(0, height, step)]
        results = [
            run(
                student_CV[block],
                other_CV[block],
                target_ids_B=None if target_ids_C is None else target_ids_C[block],
            )
            for block in blocks
        ]
        values, factors = zip(*results, strict=True)
        return RowResult(torch.cat(values, 1), torch.cat(factors))


def choose(device: torch.device, dtype: torch.dtype) -> RowPass:
    """The fastest that this machine has for inputs of this dtype; compiles C in the first call."""
    if dtype == torch.float64:
        return in_torch(device, "torch (float64)")
    if device.type == "cuda":
        return in_triton() if find_spec("triton") else in_torch(device, "torch (no triton)")
    if device.type != "cpu":
        return in_torch(device, f"torch ({device.type})")
    native = compiled.native()
    if native.dll is None:
        return in_torch(device, native.description)
    return RowPass(name=native.description, layout=Layout.BY_COLUMN, run=compiled.divergence_rows_)


def in_torch(device: torch.device, name: str = "torch") -> RowPass:
    """The pass that runs everywhere."""
    return RowPass(
        name=name,
        layout=Layout.BY_ROW,
        run=eager.divergence_rows_,
        rows_at_once=partial(block_rows, device=device),
        buffers=BUFFERS,
    )


def in_triton() -> RowPass:
    """The pass of GPUs; in Triton's interpreter it runs on a CPU's tensors too."""
    from opsdc_kernels.row_pass import kernels

    return RowPass(name="triton", layout=Layout.BY_ROW, run=kernels.divergence_rows_, temporaries=0)
