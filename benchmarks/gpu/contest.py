"""Stage b: time, peak memory and error of each contender at production sizes, beside bare GEMMs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from benchmarks import accuracy
from benchmarks.contenders import FAMILIES, Failure
from benchmarks.inputs import Shape, inputs
from benchmarks.memory import PLANNED
from benchmarks.speed import call_of, interleaved, seconds
from opsdc_kernels import plan, products, testing
from opsdc_kernels.memory import PeakMemory
from opsdc_kernels.testing import Case, Outcome

UNITS = {"trainable head": 4, "frozen head": 3, "forward only": 2}
"""Head GEMMs that a mode cannot do without."""
WRONG = 2e-2
"""No relative error of ours is above, with 16-bit operands: ten times what their rounding takes."""
TRUTH_ROWS = 512
"""Tokens whose float64 logits are held at once."""

_held: dict[Shape, tuple[Case, Outcome | None]] = {}
"""Inputs and truth of the shape that was asked for last: its cells follow one another."""


def measure(
    device: torch.device,
    *,
    contender: str,
    family: str,
    shape: dict[str, int],
    mode: str,
    repeats: int,
) -> list[dict[str, Any]]:
    """Time in units of the bare GEMM beside each call, TF/s of the GEMMs that cannot be done
    without, peak memory beside inputs, and errors against float64.

    Raises ArithmeticError where ours is wrong: such a time is worth nothing.
    """
    sizes = Shape(**shape)
    chosen = next(each for each in FAMILIES[family]() if each.name == contender)
    case, true = held_inputs(sizes, device, truth=mode != "forward only" and not chosen.other_loss)
    call = call_of(chosen, case, mode)
    (timing,) = interleaved({contender: call}, case, mode, repeats)
    if isinstance(timing, Failure):
        raise RuntimeError(timing.reason)
    with PeakMemory(device) as memory:
        call()
    errors = None
    if true is not None and mode != "forward only" and not chosen.other_loss:
        trainable = mode == "trainable head"
        names = ("loss", "hidden_gradient", "weight_gradient")[: 2 + trainable]
        found = accuracy.errors(chosen.loss, case, true, trainable=trainable)
        errors = dict(zip(names, found, strict=False))
        if family == "ours" and not all(error <= WRONG for error in errors.values()):
            raise ArithmeticError(f"{contender} is wrong, no time counts: off by {errors}")
    flop = UNITS[mode] * sizes.unit_flop
    return [
        {
            **asdict(timing), **shape, "version": chosen.version,
            "of_roofline": timing.units / UNITS[mode],
            "teraflops": flop / timing.seconds / 1e12,
            "peak_mib": memory.peak_mib, "errors": errors,
            "forecast_seconds": _forecast(contender, sizes, mode, case, device),
        }
    ]  # fmt: skip


def _forecast(
    contender: str, sizes: Shape, mode: str, case: Case, device: torch.device
) -> float | None:
    """Seconds by the planner; None on a CPU and for others' losses."""
    if contender not in PLANNED:
        return None
    planned = plan.estimate(
        tokens=sizes.tokens,
        vocab_size=sizes.vocab_size,
        student_dim=sizes.dim,
        dtype=case.student_hidden.dtype,
        device=device,
        trainable_head=mode == "trainable head",
        gradient=mode != "forward only",
        backend=PLANNED[contender],
    ).milliseconds
    return None if planned is None else planned / 1000


def products_alone(
    device: torch.device, *, shape: dict[str, int], repeats: int
) -> list[dict[str, Any]]:
    """The GEMMs that `chunked` is made of, each by itself: cuBLAS at these sizes and layouts."""
    sizes = Shape(**shape)
    case, _ = held_inputs(sizes, device, truth=False)
    hidden, weight = case.student_hidden, case.student_weight
    tile = torch.zeros(sizes.tokens, sizes.vocab_size, dtype=hidden.dtype, device=device)
    logits = torch.empty_like(tile, dtype=torch.float32)
    dh, dw = (torch.empty_like(x, dtype=torch.float32) for x in (hidden, weight))
    ways: dict[str, Callable[[], object]] = {
        "logits in the inputs' dtype": lambda: torch.mm(hidden, weight.T, out=tile),
        "logits in fp32": lambda: products.logits_into(logits, hidden, weight),
        "hidden gradient": lambda: products.hidden_gradient_into(dh, tile, weight),
        "weight gradient": lambda: products.add_weight_gradient(dw, tile, hidden, first=True),
    }
    spent: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats + 1):
        for name, way in ways.items():
            spent[name].append(seconds(way, device))  # type: ignore[arg-type]
    return [
        {
            "product": name, **shape, "seconds": sorted(times[1:])[repeats // 2],
            "teraflops": sizes.unit_flop / sorted(times[1:])[repeats // 2] / 1e12,
        }
        for name, times in spent.items()
    ]  # fmt: skip


def held_inputs(sizes: Shape, device: torch.device, *, truth: bool) -> tuple[Case, Outcome | None]:
    """Inputs of these sizes, and their float64 truth if it was asked for; those of the last sizes
    are kept."""
    if sizes not in _held:
        _held.clear()
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        _held[sizes] = inputs(sizes, dtype=dtype, device=device, drawn_on=device), None
    case, true = _held[sizes]
    if truth and true is None:
        _held[sizes] = case, truth_by_rows(case, TRUTH_ROWS)
    return _held[sizes]


def truth_by_rows(case: Case, rows: int) -> Outcome:
    """`testing.truth` of the mean, a few tokens at a time: the float64 logits of all would not
    fit."""
    tokens = len(case.student_hidden)
    loss, dw, parts = torch.zeros((), dtype=torch.float64), None, []
    for start in range(0, tokens, rows):
        at = slice(start, start + rows)
        part = Case(
            case.student_hidden[at], case.student_weight, case.teacher_hidden[at],
            case.teacher_weight,
        )  # fmt: skip
        true = testing.truth(part, reduction="sum")
        loss = loss + true.loss.cpu() / tokens
        dw = true.weight_gradient if dw is None else dw.add_(true.weight_gradient)
        parts.append(true)
    assert dw is not None
    return Outcome(
        loss=loss.to(dw.device),
        per_token=torch.cat([part.per_token for part in parts]),
        hidden_gradient=torch.cat([part.hidden_gradient for part in parts]) / tokens,
        weight_gradient=dw.div_(tokens),
    )
