"""Two arms on the same problems: differences with paired intervals.

Intervals are paired percentile bootstraps over problems.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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


def by_difficulty(
    base: Sequence[Answer], trained: Sequence[Answer], *, bins: int = 3
) -> dict[str, list[dict[str, Any]]]:
    """Compression and accuracy by how hard a problem is for the base model.

    Two scales: the base model's own pass rate on the problem, and the length of its answers in
    equally filled bins. The method's claim is that easy problems compress most. With one sample per
    problem the pass rate is 0 or 1, so that chance moves problems between its bins: accuracy falls
    in the upper one and rises in the lower even if nothing changed; set `eval.samples` to 4 or
    more to read it.
    """
    b, t = _by_problem(base), _by_problem(trained)

    def row(name: str, ids: Sequence[str]) -> dict[str, Any]:
        tokens = [float(np.mean([side[i]["tokens"] for i in ids])) for side in (b, t)]
        graded = [i for i in ids if b[i]["accuracy"] is not None]
        return {
            "bin": name,
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

    found: dict[str, list[dict[str, Any]]] = {"pass_rate": [], "length": []}
    rates = sorted({b[i]["accuracy"] for i in b if b[i]["accuracy"] is not None}, reverse=True)
    edges = rates if len(rates) <= bins else [1.0, 0.5, 0.0]
    remaining = [i for i in b if b[i]["accuracy"] is not None]
    for low in edges:
        ids = [i for i in remaining if b[i]["accuracy"] >= low]
        remaining = [i for i in remaining if b[i]["accuracy"] < low]
        if ids:
            rates_here = [b[i]["accuracy"] for i in ids]
            found["pass_rate"].append(row(f"base pass rate {_range(rates_here, '.2f')}", ids))
    ranked = sorted(b, key=lambda i: (b[i]["tokens"], i))
    for part in np.array_split(np.array(ranked, dtype=object), min(bins, len(ranked))):
        ids = list(part)
        lengths_here = [b[i]["tokens"] for i in ids]
        found["length"].append(row(f"base length {_range(lengths_here, '.0f')}", ids))
    return found


def _range(values: Sequence[float], pattern: str) -> str:
    low, high = format(min(values), pattern), format(max(values), pattern)
    return low if low == high else f"{low}–{high}"


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
