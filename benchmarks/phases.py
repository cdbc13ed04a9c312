"""Where a call of the chunked loss spends its time, in units of the bare head GEMM.

python -m benchmarks.phases
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

from benchmarks.inputs import Shape, inputs
from benchmarks.speed import FULL, bare_gemm, seconds
from opsdc_kernels import linear_divergence, products
from opsdc_kernels.chunked import run

PHASES = {
    "logits (2 GEMMs)": (run, "both_logits_into"),
    "row passes": (run, "run_rows"),
    "hidden gradient (1 GEMM)": (products, "hidden_gradient"),
    "weight gradient (1 GEMM)": (products, "add_weight_gradient"),
}


@dataclass(frozen=True, slots=True)
class Phase:
    name: str
    units: float
    """Median."""

    def __str__(self) -> str:
        return f"{self.name:<28}{self.units:6.2f} units"


def measure(shape: Shape, *, repeats: int) -> list[Phase]:
    """Forward and backward with a trainable head; prints each phase. `allocation` is the rest: the
    first touch of scratch and gradients, and the upstream gradient's product."""
    case = inputs(shape)
    unit = bare_gemm(case)
    unit()
    hidden = case.student_hidden.requires_grad_()
    weight = case.student_weight.requires_grad_()
    found: dict[str, list[float]] = defaultdict(list)
    with _clocks() as spent:
        for _ in range(repeats + 1):
            spent.clear()
            hidden.grad = weight.grad = None
            with torch.no_grad():
                before = seconds(unit, hidden.device)
            start = time.perf_counter()
            linear_divergence(hidden, weight, case.teacher_hidden, case.teacher_weight).backward()
            whole = time.perf_counter() - start
            with torch.no_grad():
                per_unit = (before + seconds(unit, hidden.device)) / 2
            for name in PHASES:
                found[name].append(spent[name] / per_unit)
            found["allocation and the rest"].append((whole - sum(spent.values())) / per_unit)
            found["whole"].append(whole / per_unit)
    phases = [Phase(name, statistics.median(values[1:])) for name, values in found.items()]
    for phase in phases:
        print(phase, flush=True)
    return phases


@contextmanager
def _clocks() -> Iterator[dict[str, float]]:
    """Adds up the seconds inside each phase's function."""
    spent: dict[str, float] = defaultdict(float)

    def timed(name: str, function: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            start = time.perf_counter()
            result = function(*arguments, **options)
            spent[name] += time.perf_counter() - start
            return result

        return call

    patches = [
        mock.patch.object(module, attribute, timed(name, getattr(module, attribute)))
        for name, (module, attribute) in PHASES.items()
    ]
    for patch in patches:
        patch.start()
    try:
        yield spent
    finally:
        for patch in patches:
            patch.stop()


if __name__ == "__main__":
    measure(FULL, repeats=5)
