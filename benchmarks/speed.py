"""How long each contender takes, in units of the bare head GEMM measured beside it.

    python -m benchmarks.speed --quick

One process, contenders interleaved: every measured call stands between two bare GEMMs, and counts
as its time over the mean of theirs. So a machine that slows down for a while slows both.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from benchmarks.contenders import Contender, Failure, contenders, default_device
from benchmarks.inputs import Shape, inputs
from opsdc_kernels.testing import Case

MODES = ("trainable head", "frozen head", "forward only")
FULL = Shape(tokens=2048, dim=576, vocab_size=49152)
QUICK = Shape(tokens=512, dim=256, vocab_size=16384)


@dataclass(frozen=True, slots=True)
class Timing:
    """Medians over the repeats, with the 20th and 80th percentiles of the units."""

    contender: str
    mode: str
    units: float
    units_p20: float
    units_p80: float
    seconds: float

    def __str__(self) -> str:
        spread = f"{self.units_p20:.2f}–{self.units_p80:.2f}"
        return (
            f"{self.mode:<15} {self.contender:<26}{self.units:6.2f} units ({spread})"
            f"{self.seconds:8.3f} s"
        )


def measure(
    shape: Shape,
    device: torch.device,
    *,
    repeats: int,
    compiled: bool = True,
    only: Sequence[str] = ("",),
) -> list[Timing | Failure]:
    """Every contender whose name begins with one of `only`, in every mode; prints each line when
    it is known."""
    case = inputs(shape, device=device)
    running = [c for c in contenders(device)[0] if compiled or not c.compiled]
    known = [c.name for c in running]
    running = [c for c in running if c.name.lower().startswith(tuple(map(str.lower, only)))]
    if not running:
        raise SystemExit(f"--only {' '.join(only)}: no contender begins so; there are {known}")
    found: list[Timing | Failure] = []
    for mode in MODES:
        calls = {c.name: call_of(c, case, mode) for c in running if _has(c, mode)}
        for timing in interleaved(calls, case, mode, repeats):
            print(timing, flush=True)
            found.append(timing)
    return found


def _has(contender: Contender, mode: str) -> bool:
    """Cross entropies stand for themselves in one mode."""
    return mode == MODES[0] or not contender.other_loss


def call_of(contender: Contender, case: Case, mode: str) -> Callable[[], None]:
    hidden = case.student_hidden.detach().clone().requires_grad_(mode != "forward only")
    weight = case.student_weight.detach().clone().requires_grad_(mode == "trainable head")
    assert case.teacher_weight is not None
    teacher, teacher_weight = case.teacher_hidden, case.teacher_weight

    def call() -> None:
        hidden.grad = weight.grad = None
        if mode == "forward only":
            with torch.no_grad():
                contender.loss(hidden, weight, teacher, teacher_weight)
        else:
            contender.loss(hidden, weight, teacher, teacher_weight).backward()
        hidden.grad = weight.grad = None

    return call


def bare_gemm(case: Case) -> Callable[[], None]:
    """The unit: hidden · weightᵀ into memory that is there already."""
    out = case.student_hidden.new_empty(len(case.student_hidden), len(case.student_weight))
    transposed = case.student_weight.T

    def call() -> None:
        torch.mm(case.student_hidden, transposed, out=out)

    return call


def seconds(call: Callable[[], None], device: torch.device) -> float:
    """One call's time: events on a GPU, the clock elsewhere."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000
    before = time.perf_counter()
    call()
    return time.perf_counter() - before


def interleaved(
    calls: dict[str, Callable[[], None]], case: Case, mode: str, repeats: int
) -> list[Timing | Failure]:
    """Time the calls in turn, each between two bare GEMMs of the case; changes `calls`: those that
    fail are taken out."""
    device = case.student_hidden.device
    gemm = bare_gemm(case)
    gemm()
    failures = []
    for name, call in list(calls.items()):
        try:
            call()  # compilation and first touches
        except Exception as error:
            # A peer may fail in any way; the others' figures do not depend on it.
            failures.append(Failure.of(name, error))
            del calls[name]
    units: dict[str, list[float]] = {name: [] for name in calls}
    times: dict[str, list[float]] = {name: [] for name in calls}
    before = seconds(gemm, device)
    for _ in range(repeats):
        for name, call in calls.items():
            spent = seconds(call, device)
            after = seconds(gemm, device)
            units[name].append(2 * spent / (before + after))
            times[name].append(spent)
            before = after
    return failures + [
        Timing(
            name,
            mode,
            *(percentile(units[name], share) for share in (50, 20, 80)),
            statistics.median(times[name]),
        )
        for name in calls
    ]


def percentile(values: list[float], share: int) -> float:
    if len(values) == 1:
        return values[0]
    return statistics.quantiles(values, n=100, method="inclusive")[share - 1]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help=f"{QUICK} instead of {FULL}")
    parser.add_argument("--repeats", type=int, default=5, help="(default %(default)s)")
    parser.add_argument("--eager", action="store_true", help="leave the compiled contenders out")
    parser.add_argument(
        "--only",
        nargs="+",
        default=[""],
        metavar="NAME",
        help="contenders whose names begin so: --only ours naive",
    )
    options = parser.parse_args()
    device = default_device()
    measure(
        QUICK if options.quick else FULL,
        device,
        repeats=options.repeats,
        compiled=not options.eager,
        only=options.only,
    )


if __name__ == "__main__":
    main()
