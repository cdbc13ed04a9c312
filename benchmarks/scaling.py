"""Time and peak memory as tokens, vocabulary and hidden size grow.

    python -m benchmarks.scaling --quick

Each axis is varied alone. Memory is measured in a process per point; time in units of the bare GEMM
at the same size. What a token costs in memory is the slope between the two largest sizes of the
token axis. Those are chosen so that the workspace of ours is full at both, with chunks of the same
height: below that point it takes what it needs, up to the 192 MiB it may.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import asdict, dataclass, replace

import torch

from benchmarks import memory
from benchmarks.contenders import Contender, Failure, contenders, default_device
from benchmarks.inputs import Shape, inputs
from benchmarks.speed import bare_gemm, call_of, seconds
from opsdc_kernels.testing import Case

NAMES = ("ours, chunked", "naive", "Liger, chunked", "TRL, chunked", "unsloth")
BASE = Shape(tokens=1024, dim=256, vocab_size=8192)
AXES = {
    "tokens": (256, 1024, 4096, 8192, 16384),
    "vocab_size": (8192, 32768, 131072, 262144),
    "dim": (128, 512, 2048),
}
STARTS = {
    # The naive path must still fit at the largest vocabulary.
    "vocab_size": replace(BASE, tokens=256),
    # A head whose hidden size is not of the order of its vocabulary.
    "dim": replace(BASE, tokens=512, vocab_size=32768),
}
QUICK_BASE = Shape(tokens=1024, dim=64, vocab_size=32768)
QUICK_AXES = {"tokens": (512, 2048, 4096)}
LONG_CALL_S = 0.7
"""A call that takes longer is timed once."""


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


def measure(device: torch.device, *, quick: bool) -> list[Point | Failure]:
    """Every contender at every point; prints each line."""
    running = {c.name: c for c in contenders(device)[0] if c.name in NAMES}
    found = []
    for axis, sizes in (QUICK_AXES if quick else AXES).items():
        for size in sizes:
            start = QUICK_BASE if quick else STARTS.get(axis, BASE)
            shape = replace(start, **{axis: size})
            case = inputs(shape, device=device)
            for contender in running.values():
                found.append(_point(contender, axis, shape, case))
                print(found[-1], flush=True)
    return found


def _point(contender: Contender, axis: str, shape: Shape, case: Case) -> Point | Failure:
    peak = memory.measure(contender.name, shape, trainable=True)
    if isinstance(peak, Failure):
        return peak
    device = case.student_hidden.device
    call, gemm = call_of(contender, case, "trainable head"), bare_gemm(case)
    gemm()
    repeats = 1 if seconds(call, device) > LONG_CALL_S else 3
    pairs = [(seconds(call, device), seconds(gemm, device)) for _ in range(repeats)]
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


def token_line(points: list[Point], contender: str) -> list[Point]:
    """The contender's points along the token axis, fewest tokens first."""
    line = (p for p in points if p.contender == contender and p.axis == "tokens")
    return sorted(line, key=lambda p: p.tokens)


def bytes_per_token(points: list[Point], contender: str) -> float:
    """Slope of memory over tokens, between the two largest, without what is returned."""
    a, b = token_line(points, contender)[-2:]
    grown = (b.peak_mib - b.returned_mib) - (a.peak_mib - a.returned_mib)
    return grown * 2**20 / (b.tokens - a.tokens)


def largest_tokens(points: list[Point], contender: str, memory_gib: float) -> float:
    """Tokens whose loss fits in so much memory, by the measured line."""
    last = token_line(points, contender)[-1]
    # dH is returned; a peak that fell by some pages is as flat as can be.
    slope = max(bytes_per_token(points, contender), 0.0) + 4 * last.dim
    left = memory_gib * 2**30 - last.peak_mib * 2**20
    return last.tokens + left / slope


def forecast_error(points: list[Point], contender: str) -> float:
    """How far the largest size's memory is from what was foretold of it, relative: by the planner
    for ours, for others by the line through the two sizes before it."""
    *_, a, b, last = token_line(points, contender)
    foretold = last.predicted_mib
    if foretold is None:
        slope = (b.peak_mib - a.peak_mib) / (b.tokens - a.tokens)
        foretold = b.peak_mib + slope * (last.tokens - b.tokens)
    return foretold / last.peak_mib - 1


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one axis, at a small hidden size")
    found = measure(default_device(), quick=parser.parse_args().quick)
    points = [p for p in found if isinstance(p, Point)]
    for name in dict.fromkeys(p.contender for p in points):
        print(f"{name:<16}{bytes_per_token(points, name):12.0f} bytes per token")


if __name__ == "__main__":
    main()
