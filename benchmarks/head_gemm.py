"""What the bare head GEMM costs a chunk of tokens, by the ways to call it.

python -m benchmarks.head_gemm              (a minute on two CPU cores)
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.inputs import Shape
from benchmarks.speed import FULL, seconds

CPU = torch.device("cpu")
HEIGHTS = (205, 410, 416, 512, 1024)
SLICE = 4096
"""Columns."""


def measure(shape: Shape, *, repeats: int) -> dict[str, float]:
    """Way: time per token over that of one GEMM of all tokens, medians, interleaved."""
    hidden = torch.randn(shape.tokens, shape.dim)
    weight = torch.randn(shape.vocab_size, shape.dim)
    logits = torch.empty(shape.tokens, shape.vocab_size)
    ways: dict[str, tuple[int, Callable[[], object]]] = {
        "all tokens": (shape.tokens, lambda: torch.mm(hidden, weight.T, out=logits))
    }
    for rows in HEIGHTS:
        for name, way in _ways(hidden[:rows], weight, logits[:rows]).items():
            ways[f"{rows} tokens{name}"] = rows, way
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats + 1):
        for name, (rows, way) in ways.items():
            found[name].append(seconds(way, CPU) / rows)  # type: ignore[arg-type]
    per_token = {name: statistics.median(values[1:]) for name, values in found.items()}
    return {name: value / per_token["all tokens"] for name, value in per_token.items()}


def _ways(hidden: Tensor, weight: Tensor, out: Tensor) -> dict[str, Callable[[], object]]:
    slices = range(0, len(weight), SLICE)
    turned = out.reshape(-1).view(len(weight), len(hidden))

    def in_slices(place: Callable[[int], Tensor]) -> Callable[[], object]:
        return lambda: [torch.mm(hidden, weight[i : i + SLICE].T, out=place(i)) for i in slices]

    return {
        "": lambda: torch.mm(hidden, weight.T, out=out),
        ", by columns": in_slices(lambda i: out[:, i : i + SLICE]),
        ", by columns to one place": in_slices(lambda i: out[:, : min(SLICE, len(weight) - i)]),
        ", logits transposed": lambda: torch.mm(weight, hidden.T, out=turned),
    }


if __name__ == "__main__":
    for way, units in measure(FULL, repeats=7).items():
        print(f"{way:<40}{units:6.2f} units")
