"""What leaving vocabulary columns out saves, and what it costs in accuracy.

    python -m benchmarks.columns                             (synthetic heads)
    python -m benchmarks.columns --dim 2048 --tokens 512
    python -m benchmarks.columns --real real.safetensors     (states of `benchmarks.real_states`)
    python -m benchmarks.columns --real real.safetensors --two-heads

Units of the bare head GEMM, timed beside the exact loss and the peers in one process; true errors
against the exact loss, beside their bounds (≤) or, where columns are drawn, beside the standard
errors that the call tells (~). The synthetic head has Gaussian rows and a Zipf-like bias (as a
column of the head), the teacher's states are a step away from the student's.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.contenders import contenders, default_device
from benchmarks.inputs import Shape
from benchmarks.speed import bare_gemm, percentile, seconds
from opsdc_kernels import linear_divergence
from opsdc_kernels.testing import Case

WAYS: dict[str, dict[str, Any]] = {
    "exact": {},
    "unbiased 1e-02": {"columns": "unbiased", "skip_tolerance": 1e-2},
    "unbiased 1e-03": {"columns": "unbiased", "skip_tolerance": 1e-3},
    "skip 1e-02": {"skip_tolerance": 1e-2},
    "skip 1e-03": {"skip_tolerance": 1e-3},
    "skip 1e-04": {"skip_tolerance": 1e-4},
}
RIVALS = ("naive, compiled", "Liger, chunked", "TRL, chunked")
APART = 1e-3
"""The second head is so far from the first, in standard deviations of its entries."""
ZIPF = 1.0
"""A token of rank r has the bias −log r."""
STEP = 0.5
"""Of the teacher's states, in standard deviations of a logit."""


RECORDED = (
    (Shape(tokens=1024, dim=576, vocab_size=49152), (0.3, 0.5, 2.8)),
    (Shape(tokens=512, dim=2048, vocab_size=49152), (0.3,)),
    (Shape(tokens=1024, dim=2048, vocab_size=32000), (0.24,)),
)
"""Shapes and entropies of `measure_all`."""


@dataclass(frozen=True, slots=True)
class Left:
    """What a call left out, and what it cost in accuracy."""

    kept_share: float
    gemm_units: float
    hidden_error: float
    hidden_bound: float
    """Or the standard error, where columns are drawn."""
    weight_error: float
    weight_bound: float
    drawn: bool = False

    def __str__(self) -> str:
        sign = "~" if self.drawn else "≤"
        return (
            f"  kept {self.kept_share:6.1%}  GEMMs {self.gemm_units:5.2f}"
            f"  dH {self.hidden_error:.1e} {sign} {self.hidden_bound:.1e}"
            f"  dW {self.weight_error:.1e} {sign} {self.weight_bound:.1e}"
        )


@dataclass(frozen=True, slots=True)
class Row:
    what: str
    tokens: int
    dim: int
    entropy: float
    units: float
    """Median of the time over the bare GEMM's beside it."""
    left: Left | None
    """None: of a peer."""

    def __str__(self) -> str:
        return (
            f"D {self.dim} entropy {self.entropy:4.2f}  {self.what:<18}{self.units:6.2f} units"
            f"{self.left or ''}"
        )


def measure_all(*, repeats: int) -> list[Row]:
    """Everything in `RECORDED`."""
    return [
        row
        for shape, entropies in RECORDED
        for entropy in entropies
        for row in measure(synthetic(shape, entropy), repeats=repeats)
    ]


def synthetic(shape: Shape, entropy: float) -> Case:
    """Rows whose mean entropy is `entropy`: reached by a temperature over Zipf-like logits."""
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(shape.vocab_size, shape.dim, generator=g) / math.sqrt(shape.dim)
    weight[:, -1] = -ZIPF * torch.arange(1.0, shape.vocab_size + 1).log()
    ranks = torch.rand(shape.tokens, 3, generator=g).mul(math.log(shape.vocab_size)).exp()
    favourites = weight[(ranks.long() - 1).clamp(0)]
    sharpness = 2 + 8 * torch.rand(shape.tokens, 1, generator=g)
    hidden = sharpness * (favourites * torch.tensor([1.0, 0.8, 0.6])[:, None]).sum(1)
    hidden = hidden + torch.randn(shape.tokens, shape.dim, generator=g)
    hidden[:, -1] = 1
    teacher = hidden + STEP * torch.randn(shape.tokens, shape.dim, generator=g)
    teacher[:, -1] = 1
    some = hidden[:: max(shape.tokens // 64, 1)] @ weight.T
    low, high = 0.01, 10.0
    for _ in range(20):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if _entropy(some / middle) < entropy else (low, middle)
    return Case(hidden / low, weight, teacher / low)


def _entropy(logits: Tensor) -> float:
    log_q = logits.log_softmax(1)
    return -float((log_q.exp() * log_q).sum(1).mean())


def measure(case: Case, *, repeats: int, rivals: Sequence[str] = RIVALS) -> list[Row]:
    """Every way and the peers, interleaved; prints each line."""
    device = case.student_hidden.device
    there, missing = contenders(device)
    found = {c.name: c.loss for c in there if c.name in rivals}
    for name in set(rivals) - set(found):
        print(f"not run: {name} (missing: {missing})")
    exact = _gradients(case)
    entropy = float(exact[0].student_entropy.mean())
    calls: dict[str, Callable[[], object]] = {
        name: partial(_gradients, case, **options) for name, options in WAYS.items()
    }
    calls |= {name: partial(_rival, loss, case) for name, loss in found.items()}
    gemm = bare_gemm(case)
    units: dict[str, list[float]] = {name: [] for name in calls}
    gemm()
    before = seconds(gemm, device)
    for repeat in range(repeats + 1):
        for name, call in calls.items():
            spent = seconds(call, device)  # type: ignore[arg-type]
            after = seconds(gemm, device)
            if repeat:  # the first touches memory
                units[name].append(2 * spent / (before + after))
            before = after
    rows = []
    for name, times in units.items():
        tokens, dim = case.student_hidden.shape
        row = Row(name, tokens, dim, entropy, percentile(times, 50), None)
        if name not in WAYS:
            rows.append(row)
            print(row, flush=True)
            continue
        stats, *got = _gradients(case, **WAYS[name])
        errors = [
            float(((a - b).norm() / b.norm()).detach()) for a, b in zip(got, exact[1:], strict=True)
        ]
        drawn = WAYS[name].get("columns") == "unbiased"
        bounds = (stats.hidden_gradient_bound, stats.weight_gradient_bound)
        if drawn:
            bounds = (stats.hidden_gradient_error, stats.weight_gradient_error)
        left = Left(
            1.0 if stats.kept_share is None else float(stats.kept_share),
            4.0 if stats.gemm_units is None else float(stats.gemm_units),
            errors[0],
            0.0 if bounds[0] is None else float(bounds[0]),
            errors[1],
            0.0 if bounds[1] is None else float(bounds[1]),
            drawn,
        )
        rows.append(replace(row, left=left))
        print(rows[-1], flush=True)
    return rows


def two_heads(case: Case) -> Case:
    """The same states, with a head of the teacher's own a small step away."""
    weight = case.student_weight
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)).to(weight)
    return replace(case, teacher_weight=weight + APART * weight.std() * noise)


def _gradients(case: Case, **options: Any):  # type: ignore[no-untyped-def]
    hidden, weight = (
        x.detach().requires_grad_() for x in (case.student_hidden, case.student_weight)
    )
    loss, stats = linear_divergence(
        hidden, weight, case.teacher_hidden, case.teacher_weight, return_stats=True, **options
    )
    dh, dw = torch.autograd.grad(loss, (hidden, weight))
    return stats, dh, dw


def _rival(loss: Callable[..., Tensor], case: Case) -> None:
    hidden, weight = (
        x.detach().requires_grad_() for x in (case.student_hidden, case.student_weight)
    )
    other = weight if case.teacher_weight is None else case.teacher_weight
    torch.autograd.grad(loss(hidden, weight, case.teacher_hidden, other), (hidden, weight))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--dim", type=int, default=576)
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--entropy", type=float, nargs="+", default=[0.3, 0.5, 2.8])
    parser.add_argument("--real", type=Path, metavar="FILE", help="states of a real model instead")
    parser.add_argument("--temperature", type=float, nargs="+", default=[1.0, 0.6, 0.4, 0.3])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--alone", action="store_true", help="without the peers")
    parser.add_argument("--two-heads", action="store_true", help="the teacher's is another")
    options = parser.parse_args()
    rivals = () if options.alone else RIVALS
    if options.real:
        from safetensors.torch import load_file

        states = load_file(options.real)
        for temperature in options.temperature:
            student, weight, teacher = (
                states[name] for name in ("student_hidden", "student_weight", "teacher_hidden")
            )
            case = Case(student / temperature, weight, teacher / temperature)
            if options.two_heads:
                case = two_heads(case)
            print(f"{options.real}, {len(student)} tokens, temperature {temperature}")
            measure(case, repeats=options.repeats, rivals=rivals)
        return
    shape = Shape(tokens=options.tokens, dim=options.dim, vocab_size=options.vocab)
    for entropy in options.entropy:
        print(shape)
        case = synthetic(shape, entropy)
        device = default_device()
        case = Case(*(x.to(device) for x in (case.student_hidden, case.student_weight,
                                             case.teacher_hidden)))  # fmt: skip
        if options.two_heads:
            case = two_heads(case)
        measure(case, repeats=options.repeats, rivals=rivals)


if __name__ == "__main__":
    main()
