"""Two arms on the same problems: differences with paired intervals.

Intervals are paired percentile bootstraps over problems.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from opsdc.errors import DataError
from opsdc.eval.answers import Answer

_RESAMPLES = 10_000


def compare(base: Sequence[Answer], other: Sequence[Answer], *, seed: int = 0) -> dict[str, Any]:
    """`other` against `base` on the same problems: differences with 95 % paired intervals.

    token_reduction is 1 − mean tokens of other / of base. `accuracy_detectable` is the smallest
    true difference in accuracy that a sample with this spread shows with 80 % power at 5 %.
    """
    b, o = _by_problem(base), _by_problem(other)
    if list(b) != list(o):
        raise DataError("the two sets of answers are not to the same problems")
    tokens = np.array([[b[i]["tokens"], o[i]["tokens"]] for i in b])
    truncated = np.array([[b[i]["truncated"], o[i]["truncated"]] for i in b])
    graded = [i for i in b if b[i]["accuracy"] is not None]
    accuracy = np.array([[b[i]["accuracy"], o[i]["accuracy"]] for i in graded])
    draws = np.random.default_rng(seed).integers(0, len(tokens), (_RESAMPLES, len(tokens)))

    def interval(values: np.ndarray) -> list[float]:
        return [round(float(v), 4) for v in np.quantile(values, (0.025, 0.975))]

    resampled = tokens[draws].mean(1)
    found: dict[str, Any] = {
        "problems": len(tokens),
        "token_reduction": round(1 - float(tokens[:, 1].mean() / tokens[:, 0].mean()), 4),
        "token_reduction_ci95": interval(1 - resampled[:, 1] / resampled[:, 0]),
        "truncated_difference": round(float((truncated[:, 1] - truncated[:, 0]).mean()), 4),
    }
    if len(graded) > 1:
        difference = accuracy[:, 1] - accuracy[:, 0]
        again = np.random.default_rng(seed).integers(0, len(graded), (_RESAMPLES, len(graded)))
        spread = float(difference.std(ddof=1)) / math.sqrt(len(graded))
        found |= {
            "accuracy_difference": round(float(difference.mean()), 4),
            "accuracy_difference_ci95": interval(difference[again].mean(1)),
            # 1.96 + 0.84 standard errors: two-sided 5 %, power 80 %.
            "accuracy_detectable": round(2.8 * spread, 4),
        }
    return found


def by_length(
    base: Sequence[Answer], trained: Sequence[Answer], *, bins: int = 3
) -> list[dict[str, Any]]:
    """Compression and accuracy by the length of the base model's answers.

    Bins are equally filled; equal lengths share one. The method's claim is that easy problems,
    which the base answers briefly, compress most.
    """
    b, t = _by_problem(base), _by_problem(trained)
    ranked = sorted(b, key=lambda i: (b[i]["tokens"], i))
    # A bin starts at each cut, and reaches over all problems as long as its last one.
    lengths = [b[i]["tokens"] for i in ranked]
    starts = {lengths.index(lengths[len(ranked) * k // bins]) for k in range(bins)}
    edges = [*sorted(starts), len(ranked)]

    def row(ids: Sequence[str]) -> dict[str, Any]:
        tokens = [float(np.mean([side[i]["tokens"] for i in ids])) for side in (b, t)]
        graded = [i for i in ids if b[i]["accuracy"] is not None]
        low, high = (f"{b[i]['tokens']:.0f}" for i in (ids[0], ids[-1]))
        return {
            "bin": f"base length {low if low == high else f'{low}–{high}'}",
            "problems": len(ids),
            "base_tokens": round(tokens[0], 1),
            "trained_tokens": round(tokens[1], 1),
            "token_reduction": round(1 - tokens[1] / tokens[0], 4),
            **{
                f"{name}_accuracy": float(np.mean([side[i]["accuracy"] for i in graded]))
                for name, side in (("base", b), ("trained", t))
                if graded
            },
        }

    return [row(ranked[start:stop]) for start, stop in pairwise(edges) if start < stop]


def _by_problem(answers: Sequence[Answer]) -> dict[str, dict[str, Any]]:
    grouped: dict[str, list[Answer]] = {}
    for a in answers:
        grouped.setdefault(a.problem_id, []).append(a)
    return {
        i: {
            "tokens": float(np.mean([a.tokens for a in group])),
            "truncated": float(np.mean([a.truncated for a in group])),
            "accuracy": (
                None if group[0].correct is None else float(np.mean([a.correct for a in group]))
            ),
        }
        for i, group in grouped.items()
    }
