"""The comparison of two arms on the same problems, with paired intervals.

Intervals are paired percentile bootstraps over problems.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
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
            **_outcomes(base, changed),
        }
    return comparison


def pass_at_1(answers: Sequence[Answer], *, seed: int = 0) -> dict[str, Any]:
    """Return the share of right answers, every problem counted alike, with its 95 % interval.

    The interval is a bootstrap over problems, and the exact one where all answers are right, or
    none: there a bootstrap would see no spread at all. {} where no problem has an answer.
    """
    graded = [p["accuracy"] for p in _by_problem(answers).values() if p["accuracy"] is not None]
    if not graded:
        return {}
    shares, n = np.array(graded), len(graded)
    mean = float(shares.mean())
    if mean in (0.0, 1.0):
        far = 0.025 ** (1 / n)
        low, high = (0.0, 1 - far) if mean == 0 else (far, 1.0)
    else:
        draws = np.random.default_rng(seed).integers(0, n, (_RESAMPLES, n))
        low, high = np.quantile(shares[draws].mean(1), (0.025, 0.975))
    return {"pass_at_1": mean, "pass_at_1_ci95": [round(float(low), 4), round(float(high), 4)]}


def in_characters(answers: Sequence[Answer]) -> list[Answer]:
    """Return the answers with characters in the place of tokens, for models that cut text apart.

    An empty one counts as one character, as an empty one of tokens has its end-of-sequence token.
    """
    return [replace(a, tokens=max(len(a.text), 1)) for a in answers]


def _outcomes(base: Sequence[Answer], changed: Sequence[Answer]) -> dict[str, Any]:
    """Count answers that stayed right, were lost, were gained or stayed wrong, pair by pair.

    `mcnemar_p` is the exact two-sided p-value of lost against gained (McNemar's test), None with
    several samples a problem, which are not independent of each other.
    """
    after = {(a.problem_id, a.sample): a.correct for a in changed}
    pairs = [(a.correct, after[a.problem_id, a.sample]) for a in base if a.correct is not None]
    lost, gained = pairs.count((True, False)), pairs.count((False, True))
    p_value = None
    if len({a.problem_id for a in base}) == len(base):
        turned, fewer = lost + gained, min(lost, gained)
        tail = sum(math.comb(turned, k) for k in range(fewer + 1)) / 2**turned
        p_value = round(min(2 * tail, 1.0), 4)
    return {
        "kept": pairs.count((True, True)),
        "lost": lost,
        "gained": gained,
        "still_wrong": pairs.count((False, False)),
        "mcnemar_p": p_value,
    }


def by_length(
    base: Sequence[Answer], trained: Sequence[Answer], *, bins: int = 3
) -> list[dict[str, Any]]:
    """Compare compression and accuracy by the length of the base model's answers.

    Bins are equally filled, but for problems of equal length, which share one. Chance alone makes
    the long bin's base answers longer than they would be again; see `by_difficulty`.
    """
    before, after = _by_problem(base), _by_problem(trained)
    return [
        _bin_row(f"base length {_span(before, ids, 'tokens', '.0f')}", ids, before, after)
        for ids in _length_bins(before, bins)
    ]


def by_difficulty(
    measured: Sequence[Answer], base: Sequence[Answer], trained: Sequence[Answer], *, bins: int = 3
) -> dict[str, list[dict[str, Any]]]:
    """Compare compression and accuracy by how hard problems are, from answers of their own.

    measured: Further answers of the base, independent of `base`: a bin that is chosen by the very
        answers that it then compares shows differences where there are none.

    The method's claim is that easy problems compress most.
    """
    hardness, before, after = (_by_problem(x) for x in (measured, base, trained))
    tables = {
        "length": [
            _bin_row(f"base length {_span(hardness, ids, 'tokens', '.0f')}", ids, before, after)
            for ids in _length_bins(hardness, bins)
        ]
    }
    rated = [i for i in hardness if hardness[i]["accuracy"] is not None]
    if rated:
        groups = (
            ("never right", [i for i in rated if hardness[i]["accuracy"] == 0]),
            ("sometimes right", [i for i in rated if 0 < hardness[i]["accuracy"] < 1]),
            ("always right", [i for i in rated if hardness[i]["accuracy"] == 1]),
        )
        tables["pass_rate"] = [
            _bin_row(f"base {name}", ids, before, after) for name, ids in groups if ids
        ]
    return tables


def _length_bins(arm: dict[str, dict[str, Any]], bins: int) -> list[list[str]]:
    """Cut the problems into equally filled bins by length; equal lengths share a bin."""
    ranked = sorted(arm, key=lambda i: (arm[i]["tokens"], i))
    # A bin starts at the first problem that is as long as the one at its cut.
    lengths = [arm[i]["tokens"] for i in ranked]
    starts = {lengths.index(lengths[len(ranked) * k // bins]) for k in range(bins)}
    edges = [*sorted(starts), len(ranked)]
    return [ranked[start:stop] for start, stop in pairwise(edges) if start < stop]


def _span(arm: dict[str, dict[str, Any]], ids: Sequence[str], measure: str, pattern: str) -> str:
    values = [arm[i][measure] for i in ids]
    low, high = format(min(values), pattern), format(max(values), pattern)
    return low if low == high else f"{low}–{high}"


def _bin_row(
    name: str,
    ids: Sequence[str],
    before: dict[str, dict[str, Any]],
    after: dict[str, dict[str, Any]],
) -> dict[str, Any]:
    """Return a bin's name, size, mean lengths and accuracies."""
    tokens = [float(np.mean([arm[i]["tokens"] for i in ids])) for arm in (before, after)]
    graded = [i for i in ids if before[i]["accuracy"] is not None]
    return {
        "bin": name,
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
