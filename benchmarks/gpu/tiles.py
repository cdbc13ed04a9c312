"""Stage c: the fused kernels under each of a short list of tile configurations."""

from __future__ import annotations

import statistics
from typing import Any
from unittest import mock

import torch

from benchmarks.gpu.contest import held_inputs
from benchmarks.inputs import Shape
from benchmarks.speed import seconds
from opsdc_kernels.problem import Options, Problem
from opsdc_kernels.testing import Case

GRADIENT_ROWS = 2048
"""Rows whose gradient tile is measured at once: about what the default workspace holds."""
KERNELS = ("statistics", "gradient")
AGREES = 1e-3
"""The largest relative difference from the first configuration's divergence, or gradient."""

_first: dict[tuple[str, bool, Shape], torch.Tensor] = {}


def measure(
    device: torch.device,
    *,
    kernel: str,
    shared: bool,
    config: list[int],
    shape: dict[str, int],
    repeats: int,
) -> list[dict[str, Any]]:
    """Time of one kernel over all tokens and columns under a configuration.

    Raises ArithmeticError where the results differ from those of the configuration before it.
    """
    from opsdc_kernels.fused.configs import Config

    sizes, tiles = Shape(**shape), Config(*config)
    problem = _problem(held_inputs(sizes, device, truth=False)[0], shared)
    run, rows = {"statistics": _statistics, "gradient": _gradient}[kernel](problem, tiles)
    result = run()
    key = kernel, shared, sizes
    want = _first.setdefault(key, result.float().cpu())
    off = float((result.float().cpu() - want).norm() / want.norm())
    if not off <= AGREES:
        raise ArithmeticError(f"{kernel} under {tiles} is off by {off:.1e} from the first one's")
    spent = statistics.median(seconds(run, device) for _ in range(repeats))
    spent *= sizes.tokens / rows
    products = 2 + (shared and problem.student_hidden.dtype.itemsize == 2)
    forecast = _forecast(device, kernel, problem, tiles, sizes)
    return [
        {
            "kernel": kernel, "shared": shared, "config": list(config), **shape,
            "seconds": spent, "off": off, "forecast_seconds": forecast,
            "teraflops": products * sizes.unit_flop / spent / 1e12,
        }
    ]  # fmt: skip


def _forecast(
    device: torch.device, kernel: str, problem: Problem, tiles: Any, sizes: Shape
) -> float | None:
    """Seconds by `opsdc_kernels.fused.cost`; None on a CPU."""
    if device.type != "cuda":
        return None
    from opsdc_kernels.fused import cost
    from opsdc_kernels.fused.configs import target_of

    at = cost.device_of(target_of(device), torch.cuda.get_device_name(device))
    item = problem.student_hidden.dtype.itemsize
    made = cost.Kernel.of(kernel, shared=problem.shared_logits, item=item)
    size = cost.Size(sizes.tokens, sizes.dim, sizes.vocab_size)
    return made.cost(tiles, at, size).milliseconds / 1000


def _problem(case: Case, shared: bool) -> Problem:
    # With one head student and teacher need different hidden states.
    teacher = case.teacher_hidden * (1 + 2**-6) if shared else case.teacher_hidden
    return Problem(
        student_hidden=case.student_hidden,
        student_weight=case.student_weight,
        teacher_hidden=teacher.to(case.teacher_hidden.dtype),
        teacher_weight=None if shared else case.teacher_weight,
        student_bias=None, teacher_bias=None, token_weight=None, target_ids=None,
        options=Options(reduction="sum"),
    )  # fmt: skip


def _statistics(problem: Problem, tiles: Any) -> tuple[Any, int]:
    """(call, tokens it computes)."""
    from opsdc_kernels.fused import forward
    from opsdc_kernels.fused.heads import Heads

    heads = Heads.of(problem, None)

    def run() -> torch.Tensor:
        with mock.patch.object(Heads, "config", return_value=tiles):
            return forward.forward(heads, None, problem.options, problem.vocab_size)[0][0]

    return run, len(problem.student_hidden)


def _gradient(problem: Problem, tiles: Any) -> tuple[Any, int]:
    from opsdc_kernels.fused import backward, forward
    from opsdc_kernels.fused.heads import Heads
    from opsdc_kernels.triton.scaling import gradient_scale
    from opsdc_kernels.triton.statistics import FOR_GRADIENT, JOINT_KL

    rows = min(GRADIENT_ROWS, len(problem.student_hidden))
    heads = Heads.of(problem, torch.arange(rows, device=problem.student_hidden.device))
    results, mean = forward.forward(heads, None, problem.options, problem.vocab_size)
    dtype = problem.student_hidden.dtype
    scale = gradient_scale(results[0], results[JOINT_KL], problem.options, dtype)
    saved = torch.cat([results[FOR_GRADIENT], mean[None], scale[None]])
    tile = problem.student_hidden.new_empty(rows, problem.vocab_size)

    def run() -> torch.Tensor:
        backward.gradient_tile(
            heads, tiles, problem.options, saved, torch.ones_like(scale), slice(0, rows), tile,
            residual=dtype.itemsize == 2, bias=False,
        )  # fmt: skip
        return tile[:16]

    return run, rows


def winners(rows: list[dict[str, Any]], target: str) -> str:
    """The fastest configurations, in the format of `opsdc_kernels/fused/configs.py`."""
    tables = {
        ("statistics", False): "WIDE_STATISTICS", ("statistics", True): "SHARED",
        ("gradient", False): "GRADIENT", ("gradient", True): "SHARED_GRADIENT",
    }  # fmt: skip
    text = ""
    for (kernel, shared), table in tables.items():
        found = [r for r in rows if (r["kernel"], r["shared"]) == (kernel, shared)]
        if found:
            best = min(found, key=lambda row: row["seconds"])
            config = ", ".join(map(str, best["config"]))
            measured = f"{1000 * best['seconds']:.1f} ms, {best['teraflops']:.0f} TF/s"
            text += f'{table} = {{\n    "{target}": Config({config}),  # {measured}\n}}\n'
    return text
