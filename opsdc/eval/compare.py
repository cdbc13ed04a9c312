"""The comparison of two arms on the same problems, with paired intervals.

Intervals are paired percentile bootstraps over problems.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from opsdc.errors import DataError
from opsdc.eval.answers import Answer

_RESAMPLES = 10_000
"""Number of bootstrap samples of the problems."""


def compare(base: Sequence[Answer], changed: Sequence[Answer], *, seed: int = 0) -> dict[str, Any]:
    """Compare two arms on the same problems: differences with 95 % paired intervals.

    token_reduction is 1 − mean tokens of `changed` / mean tokens of `base`. `accuracy_detectable`
    is the smallest true difference in accuracy that a sample with this spread shows with 80 %
    power at 5 %. Raises DataError where the problems differ.
    """
    before, after = _by_problem(base), _by_problem(changed)
    if list(before) != list(after):
        raise DataError("the two sets of answers are not to the same problems")

    def both(measure: str, ids: Iterable[str]) -> np.ndarray:
        return np.array([[before[i][measure], after[i][measure]] for i in ids])

    # [problems, 2] each: the base's mean over a problem's samples, and the changed arm's.
    tokens, truncated = both("tokens", before), both("truncated", before)
    graded = [i for i in before if before[i]["accuracy"] is not None]
    accuracy = both("accuracy", graded)
    draws = np.random.default_rng(seed).integers(0, len(tokens), (_RESAMPLES, len(tokens)))

    def interval(values: np.ndarray) -> list[float]:
        return [round(float(v), 4) for v in np.quantile(values, (0.025, 0.975))]

    resampled = tokens[draws].mean(1)
    comparison: dict[str, Any] = {
        "problems": len(tokens),
        "token_reduction": round(1 - float(tokens[:, 1].mean() / tokens[:, 0].mean()), 4),
        "token_reduction_ci95": interval(1 - resampled[:, 1] / resampled[:, 0]),
        "truncated_difference": round(float((truncated[:, 1] - truncated[:, 0]).mean()), 4),
    }
    if len(graded) > 1:
        difference = accuracy[:, 1] - accuracy[:, 0]
        draws = np.random.default_rng(seed).integers(0, len(graded), (_RESAMPLES, len(graded)))
        standard_error = float(difference.std(ddof=1)) / math.sqrt(len(graded))
        comparison |= {
            "accuracy_difference": round(float(difference.mean()), 4),
            "accuracy_difference_ci95": interval(difference[draws].mean(1)),
            # 1.96 + 0.84 standard errors: two-sided 5 %, power 80 %.
            "accuracy_detectable": round(2.8 * standard_error, 4),
        }
    return comparison


def by_length(
    base: Sequence[Answer], trained: Sequence[Answer], *, bins: int = 3
) -> list[dict[str, Any]]:
    """Compare compression and accuracy by the length of the base model's answers.

    Bins are equally filled, but for problems of equal length, which share one. The method's claim
    is that easy problems, which the base answers briefly, compress most.
    """
    before, after = _by_problem(base), _by_problem(trained)
    ranked = sorted(before, key=lambda i: (before[i]["tokens"], i))
    # A bin starts at the first problem that is as long as the one at its cut.
    lengths = [before[i]["tokens"] for i in ranked]
    starts = {lengths.index(lengths[len(ranked) * k // bins]) for k in range(bins)}
    edges = [*sorted(starts), len(ranked)]

    def row(ids: Sequence[str]) -> dict[str, Any]:
        tokens = [float(np.mean([arm[i]["tokens"] for i in ids])) for arm in (before, after)]
        graded = [i for i in ids if before[i]["accuracy"] is not None]
        low, high = (f"{before[i]['tokens']:.0f}" for i in (ids[0], ids[-1]))
        return {
            "bin": f"base length {low if low == high else f'{low}–{high}'}",
            "problems": len(ids),
            "base_tokens": round(tokens[0], 1),
            "trained_tokens": round(tokens[1], 1),
            "token_reduction": round(1 - tokens[1] / tokens[0], 4),
            **{
                f"{name}_accuracy": float(np.mean([arm[i]["accuracy"] for i in graded]))
                for name, arm in (("base", before), ("trained", after))
                if graded
            },
        }

    return [row(ranked[start:stop]) for start, stop in pairwise(edges) if start < stop]


def _by_problem(answers: Sequence[Answer]) -> dict[str, dict[str, Any]]:
    """Average the measures of each problem's answers, by the problem's id."""
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
