"""The cells of the GPU day, in order, with the seconds that each should take.

Forecasts are arithmetic, not measurements: so many compilations, so many calls of so many head
GEMMs at `TERAFLOPS`. They decide what still fits; the record shows them beside what it took.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.gpu import contest, correctness, step, tiles
from benchmarks.inputs import Shape

Measure = Callable[..., list[dict[str, Any]]]
MEASURES: dict[str, Measure] = {
    "check": correctness.check,
    "contest": contest.measure,
    "products": contest.products_alone,
    "tiles": tiles.measure,
    "step": step.measure,
}

SHAPES = (
    Shape(tokens=8192, dim=4096, vocab_size=151936),
    Shape(tokens=8192, dim=4096, vocab_size=128256),
    Shape(tokens=16384, dim=2048, vocab_size=151936),
)
SMALL_SHAPES = (Shape(tokens=20, dim=32, vocab_size=96),)
TERAFLOPS = 600.0
"""Of a bare GEMM on one H200: about 60 % of the vendor's peak, as large GEMMs reach."""
START, COMPILE = 12.0, 3.0
"""Seconds until a process has imported torch and opened the device, and for a Triton kernel."""
DRAW, TRUTH = 2.0, 4.0
"""Seconds for a shape's inputs, and for its float64 gradients: some 40 TFLOP at 30 TF/s, twice
over for what surrounds the products."""
INDUCTOR = 25.0
"""Seconds of torch.compile for the naive loss."""
REPEATS = 5
CONTENDERS = (
    # name, family, head GEMMs of a call with a trainable head, kernels to compile
    ("ours, chunked", "ours", 5.0, 2),
    ("ours, fused", "ours", 9.0, 3),
    ("naive", "naive", 8.0, 0),
    ("Liger, Triton", "liger", 14.0, 1),
    ("Liger, chunked", "liger", 16.0, 0),
    ("TRL, chunked", "trl", 14.0, 0),
    ("Liger, forward KL", "liger", 12.0, 1),
)
"""Generous guesses: a call that takes longer is cut by the stage's limit, not by its own."""
CANDIDATES = {
    ("statistics", False): (
        (128, 128, 64, 2, 16, 8, 3),
        (128, 64, 64, 1, 16, 8, 4),
        (128, 128, 64, 2, 16, 8, 2),
        (128, 128, 64, 2, 8, 8, 3),
    ),
    ("gradient", False): (
        (128, 128, 64, 1, 16, 8, 3),
        (128, 128, 64, 2, 16, 8, 3),
    ),
    ("gradient", True): (
        (128, 128, 64, 2, 16, 8, 3),
        (128, 64, 64, 1, 16, 8, 4),
    ),
    ("statistics", True): ((128, 64, 64, 1, 16, 8, 4),),
}
"""Tile configurations to try on sm_90, the shipped one first: (kernel, one head): `Config`s."""
SMALL_CANDIDATES = {("statistics", False): ((16, 64, 32, 1, 2, 1, 1), (16, 32, 32, 2, 2, 1, 1))}


@dataclass(frozen=True, slots=True)
class Cell:
    """One measurement: what runs it, and the seconds that it should take."""

    name: str
    measure: str
    arguments: dict[str, Any]
    terms: dict[str, float]
    """The forecast's parts, in seconds, by what they are for."""
    needs: str = ""
    """A package without which it is skipped."""

    @property
    def seconds(self) -> float:
        return sum(self.terms.values())


@dataclass(frozen=True, slots=True)
class Stage:
    """Cells that belong together."""

    key: str
    title: str
    limit: float
    """Seconds that it may take; what it does not take the later ones have."""
    cells: list[Cell]
    workers: int = 1
    """Processes that share the device: for what is compiled more than it runs."""

    @property
    def seconds(self) -> float:
        return START + sum(cell.seconds for cell in self.cells) / self.workers

    def arithmetic(self) -> str:
        """The forecast as a sum."""
        total: dict[str, float] = {}
        for cell in self.cells:
            for what, seconds in cell.terms.items():
                total[what] = total.get(what, 0.0) + seconds
        parts = [f"{seconds:.0f} s {what}" for what, seconds in total.items() if seconds >= 0.5]
        shared = f" over {self.workers} processes" if self.workers > 1 else ""
        return f"{START:.0f} s start + ({' + '.join(parts) or '0 s'}){shared}"


def stages(*, small: bool, cores: int) -> list[Stage]:
    """All of the day, most valuable first, with so many CPU cores; `small` is the rehearsal on a
    CPU."""
    workers = 1 if small else max(min(10, cores - 2), 1)
    return [
        Stage("a", "correctness against float64", 90, _checks(small), workers),
        Stage("b", "the contest: time, memory, error", 190, _contests(small)),
        Stage("c", "tile configurations of fused", 80, _tiles(small)),
        Stage("d", "one step of a random Qwen3-8B with LoRA", 100, _steps(small)),
    ]


def _checks(small: bool) -> list[Cell]:
    dtypes = ("float32",) if small else correctness.DTYPES
    kernels = {"chunked": 2, "fused": 3, "chunked, rows in torch": 0}
    found = []
    for backend in correctness.BACKENDS:
        for dtype in dtypes:
            for divergence in correctness.DIVERGENCES:
                for variant in correctness.VARIANTS:
                    arguments = {
                        "backend": backend, "dtype": dtype, "divergence": divergence,
                        "variant": variant,
                    }  # fmt: skip
                    found.append(Cell(
                        ", ".join(arguments.values()), "check", {**arguments, "small": small},
                        {"compiling": COMPILE * kernels[backend], "calls": 0.7},
                    ))  # fmt: skip
    return found[::7] if small else found


def _contests(small: bool) -> list[Cell]:
    repeats = 1 if small else REPEATS
    found = []
    for shape in SMALL_SHAPES if small else SHAPES:
        unit = shape.unit_flop / TERAFLOPS / 1e12
        first = {"inputs": DRAW, "float64 truth": TRUTH}
        found.append(Cell(
            f"bare GEMMs, {shape}", "products", {"shape": asdict(shape), "repeats": repeats},
            {**first, "calls": 4 * (repeats + 1) * unit},
        ))  # fmt: skip
        for mode in ("trainable head", "frozen head", "forward only"):
            for name, family, units, kernels in CONTENDERS:
                if small and family in ("liger", "trl"):
                    continue
                if mode != "trainable head" and name == "Liger, forward KL":
                    continue
                if mode == "forward only" and family != "ours":
                    continue
                # A warm-up, the repeats with a GEMM beside each, one for memory, one for errors.
                calls = (units + 1) * (repeats + 3) * unit
                first_time = shape is SHAPES[0] and mode == "trainable head"
                compiling = COMPILE * kernels if first_time else 0.2
                terms = {"compiling": compiling, "calls": calls}
                found.append(_contest(shape, mode, name, family, repeats, terms))
    if not small:
        shape = SHAPES[1]
        terms = {"inputs": DRAW + TRUTH, "compiling": INDUCTOR, "calls": 1.5}
        found.append(_contest(shape, "trainable head", "naive, compiled", "naive", repeats, terms))
    return found


def _contest(
    shape: Shape, mode: str, name: str, family: str, repeats: int, terms: dict[str, float]
) -> Cell:
    arguments = {
        "contender": name, "family": family, "shape": asdict(shape), "mode": mode,
        "repeats": repeats,
    }  # fmt: skip
    needs = {"liger": "liger-kernel", "trl": "trl"}.get(family, "")
    return Cell(f"{name}, {mode}, {shape}", "contest", arguments, terms, needs)


def _tiles(small: bool) -> list[Cell]:
    repeats = 1 if small else REPEATS
    shape = SMALL_SHAPES[0] if small else SHAPES[0]
    unit = shape.unit_flop / TERAFLOPS / 1e12
    found = []
    for (kernel, shared), configs in (SMALL_CANDIDATES if small else CANDIDATES).items():
        for config in configs:
            arguments = {
                "kernel": kernel, "shared": shared, "config": list(config),
                "shape": asdict(shape), "repeats": repeats,
            }  # fmt: skip
            heads = "one head" if shared else "two heads"
            # Three kernels' worth of GEMMs at a third of the bare GEMM's rate.
            calls = (2 + shared) * 3 * (repeats + 1) * unit
            found.append(Cell(
                f"{kernel}, {heads}, {'x'.join(map(str, config))}", "tiles", arguments,
                {"compiling": 2 * COMPILE, "calls": calls},
            ))  # fmt: skip
    return found


def _steps(small: bool) -> list[Cell]:
    # 12,288 tokens, 8.2 G parameters: the teacher's forward, the student's, its second one
    # (checkpointing) and the backward to the activations are four times 2 flop per parameter and
    # token; two steps.
    calls = 2 * 4 * 2 * 8.2e9 * 12288 / (0.6 * TERAFLOPS * 1e12)
    terms = {"plan": 25.0, "body": 20.0, "two steps": calls}
    return [Cell("Qwen3-8B with LoRA", "step", {"small": small}, terms, "peft")]
