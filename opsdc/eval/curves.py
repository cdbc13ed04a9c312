"""Curves over the steps of a run as coordinates for an inline picture."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

_WIDTH, _HEIGHT = 320, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 10, 20, 34
"""The picture's size, and the room around its axes, in units of its own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """One curve of a picture."""

    name: str
    look: str
    """"main" is a line with a dot at each point, "thin" a line, "level" one value at all steps,
    "apart" points without a line."""
    points: Sequence[tuple[float, float | None]]
    """Step and value; a value that is not there leaves the point out."""


def draw(
    title: str,
    series: Sequence[Series],
    *,
    last_step: int,
    kept: int | None,
    show: Callable[[float], str],
    top: float | None = None,
) -> dict[str, Any] | None:
    """Lay out a picture: lines, dots, ticks and legend; None where no curve has a point.

    Args:
        last_step: The right end of the axis.
        kept: The step to mark as kept.
        show: Writes a value at the axis and beside its point.
        top: The upper end of the axis, where it is not to follow from the values.
    """
    there = {one.name: [(x, y) for x, y in one.points if _is_number(y)] for one in series}
    series = [one for one in series if there[one.name]]
    if not series:
        return None
    values = [float(y) for one in series for _, y in there[one.name] if y is not None]
    rungs = _ticks(top or max(*values, 1e-9), 4)
    high = top or rungs[-1]

    def at(x: float, y: float) -> tuple[float, float]:
        across = _LEFT + (_WIDTH - _LEFT - _RIGHT) * x / max(last_step, 1)
        return round(across, 1), round(_HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * y / high, 1)

    curves = []
    for one in series:
        found = [(x, float(y)) for x, y in there[one.name] if y is not None]
        ends = [(0.0, found[0][1]), (float(last_step), found[0][1])]
        line = [at(x, y) for x, y in (ends if one.look == "level" else found)]
        dots = [
            {"x": at(x, y)[0], "y": at(x, y)[1], "text": f"step {x:.0f}: {show(y)}"}
            for x, y in (found if one.look in ("main", "apart") else [])
        ]
        curves.append({
            "name": one.name,
            "look": one.look,
            "line": "" if one.look == "apart" else " ".join(f"{x},{y}" for x, y in line),
            "dots": dots,
        })  # fmt: skip
    steps = [x for x in _ticks(last_step, 6) if x == int(x) and x <= last_step]
    return {
        "title": title,
        "curves": curves,
        "rungs": [{"y": at(0, y)[1], "text": show(y)} for y in rungs if y <= high * 1.001],
        "steps": [{"x": at(x, 0)[0], "text": f"{x:.0f}"} for x in steps],
        "kept": None if kept is None else {"x": at(kept, 0)[0], "step": kept},
        "left": _LEFT, "right": _WIDTH - _RIGHT, "top": _TOP, "bottom": _HEIGHT - _BOTTOM,
        "width": _WIDTH, "height": _HEIGHT,
    }  # fmt: skip


def _is_number(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _ticks(high: float, count: int) -> list[float]:
    """Return round numbers from 0 up to the first that is not below `high`, about `count`."""
    size = 10.0 ** math.floor(math.log10(max(high, 1e-9) / count))
    sizes = [size * factor for factor in (1, 2, 2.5, 5, 10)]
    apart = next(s for s in sizes if s * count >= high * 0.999)
    return [round(apart * i, 10) for i in range(math.ceil(high / apart * 0.999) + 1)]
