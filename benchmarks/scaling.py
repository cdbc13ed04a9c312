"""Time and peak memory as tokens, vocabulary and hidden size grow.

    python -m benchmarks.scaling --quick

Each axis is varied alone. Memory is measured in a process per point; time in units of the bare GEMM
at the same size. The slope of memory over tokens says how many fit: `largest_tokens`.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import asdict, dataclass, replace

import torch

from benchmarks import memory
from benchmarks.contenders import Contender, contenders, default_device
from benchmarks.inputs import Shape, inputs
from benchmarks.speed import bare_gemm, call_of, seconds

NAMES = ("ours, chunked", "naive", "Liger, chunked", "TRL, chunked", "unsloth")
BASE = Shape(tokens=1024, dim=256, vocab_size=8192)
AXES = {
    "tokens": (256, 1024, 4096, 16384),
    "vocab_size": (8192, 32768, 131072, 262144),
    "dim": (128, 512, 2048),
}
QUICK_AXES = {"tokens": (1024, 4096)}
WIDE_TOKENS = 256
"""Tokens while the vocabulary grows: the naive path must still fit."""


@dataclass(frozen=True, slots=True)
class Point:
    contender: str
    axis: str
    tokens: int
    dim: int
    vocab_size: int
    seconds: float
    units: float
    gemm_seconds: float
    peak_mib: float
    returned_mib: float
    predicted_mib: float | None

    def __str__(self) -> str:
        return (
            f"{self.axis:<11}N {self.tokens:<6} D {self.dim:<5} V {self.vocab_size:<7}"
            f"{self.contender:<16}{self.seconds:8.3f} s {self.units:6.2f} units"
            f"{self.peak_mib:8.0f} MiB"
        )


def measure(device: torch.device, *, quick: bool) -> list[Point]:
    """Every contender at every point; prints each line."""
    running = {c.name: c for c in contenders(device)[0]}
    found = []
    for axis, sizes in (QUICK_AXES if quick else AXES).items():
        for size in sizes:
            start = replace(BASE, tokens=WIDE_TOKENS) if axis == "vocab_size" else BASE
            shape = replace(start, **{axis: size})
            for name in NAMES:
                if name in running:
                    point = _point(running[name], axis, shape, device)
                    print(point, flush=True)
                    found.append(point)
    return found


def _point(contender: Contender, axis: str, shape: Shape, device: torch.device) -> Point:
    peak = memory.measure(contender.name, shape, trainable=True)
    if isinstance(peak, str):
        raise RuntimeError(peak)
    case = inputs(shape, device=device)
    call, gemm = call_of(contender, case, "trainable head"), bare_gemm(case)
    gemm()
    call()
    pairs = [(seconds(call, device), seconds(gemm, device)) for _ in range(3)]
    spent, unit = (statistics.median(values) for values in zip(*pairs, strict=True))
    return Point(
        contender.name,
        axis,
        **asdict(shape),
        seconds=spent,
        units=statistics.median(a / b for a, b in pairs),
        gemm_seconds=unit,
        peak_mib=peak.peak_mib,
        returned_mib=peak.returned_mib,
        predicted_mib=peak.predicted_mib,
    )


def bytes_per_token(points: list[Point], contender: str) -> float:
    """Slope of memory over tokens, between the two largest, without what is returned."""
    line = sorted(
        (p for p in points if p.contender == contender and p.axis == "tokens"),
        key=lambda p: p.tokens,
    )
    a, b = line[-2:]
    grown = (b.peak_mib - b.returned_mib) - (a.peak_mib - a.returned_mib)
    return grown * 2**20 / (b.tokens - a.tokens)


def largest_tokens(points: list[Point], contender: str, memory_gib: float) -> float:
    """Tokens whose loss fits in so much memory, by the measured line; inf for a flat one."""
    line = [p for p in points if p.contender == contender and p.axis == "tokens"]
    last = max(line, key=lambda p: p.tokens)
    slope = bytes_per_token(points, contender) + 4 * last.dim  # dH is returned
    left = memory_gib * 2**30 - last.peak_mib * 2**20
    return last.tokens + left / slope


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer and smaller points")
    options = parser.parse_args()
    device = default_device()
    points = measure(device, quick=options.quick)
    for name in NAMES:
        print(f"{name:<16}{bytes_per_token(points, name):12.0f} bytes per token")


if __name__ == "__main__":
    main()
