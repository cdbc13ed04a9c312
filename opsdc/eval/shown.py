"""What the page of a run shows of texts: answers side by side, responses token by token."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from opsdc.eval.answers import Answer, read_answers
from opsdc.eval.figures import ARMS
from opsdc.record.lines import read_lines

_PROBLEMS = 8
"""Number of held-out problems whose answers are shown."""

_BEGINNING, _END = 900, 500
"""A longer answer is shown by its first and last characters: what it answers stands at the end."""

_STRONG, _SHADES = 1.0, 8
"""From this many nats on a token gets the strongest colour, of so many beside none."""

SCALE = [f"{_STRONG * (i / _SHADES) ** 2:.2f}" for i in range(_SHADES + 1)]
"""The nats in the middle of each colour, for the legend."""


def problems(folder: Path) -> list[dict[str, Any]]:
    """Return some held-out problems with the answers of all arms, each outcome in turn."""
    paths = {arm: folder / "eval" / f"{arm}.jsonl" for arm in ARMS}
    if not all(path.is_file() for path in paths.values()):
        return []
    arms = {
        arm: {(a.problem_id, a.sample): a for a in read_answers(path)}
        for arm, path in paths.items()
    }
    groups: dict[str, list[tuple[str, int]]] = {
        "lost": [], "gained": [], "right before and after": [], "wrong before and after": [],
        "not judged": [],
    }  # fmt: skip
    for key, trained in arms["trained"].items():
        if key in arms["base"] and key in arms["prompt_only"]:
            groups[_outcome(arms["base"][key], trained)].append(key)
    chosen: list[dict[str, Any]] = []
    while len(chosen) < _PROBLEMS and any(groups.values()):
        for outcome, keys in groups.items():
            if keys and len(chosen) < _PROBLEMS:
                key = keys.pop(0)
                answers = [_shown(arm, arms[arm][key]) for arm in ARMS]
                first = arms["trained"][key]
                chosen.append({
                    "question": first.question, "gold": first.gold, "outcome": outcome,
                    "answers": answers,
                })  # fmt: skip
    return chosen


def _outcome(base: Answer, trained: Answer) -> str:
    if trained.correct is None:
        return "not judged"
    if base.correct == trained.correct:
        return f"{'right' if trained.correct else 'wrong'} before and after"
    return "gained" if trained.correct else "lost"


def _shown(arm: str, answer: Answer) -> dict[str, Any]:
    text, left_out = answer.text.strip(), 0
    if len(text) > _BEGINNING + _END + 100:
        left_out = len(text) - _BEGINNING - _END
    return {
        "arm": "told" if arm == "prompt_only" else arm,
        "tokens": answer.tokens,
        "correct": answer.correct,
        "truncated": answer.truncated,
        "extracted": answer.extracted,
        "text": text[:_BEGINNING] if left_out else text,
        "left_out": left_out,
        "end": text[-_END:] if left_out else "",
    }


def looks(folder: Path, losses: dict[int, float | None]) -> list[dict[str, Any]]:
    """Return the responses with a divergence for each token, by their step.

    `losses` holds the loss of each step.
    """
    steps: dict[int, list[dict[str, Any]]] = {}
    for row in read_lines(folder / "divergence.jsonl"):
        nats = [value for _, value in row["tokens"] if value is not None]
        if not nats:
            continue
        highest = max(row["tokens"], key=lambda pair: -1.0 if pair[1] is None else pair[1])
        steps.setdefault(row["step"], []).append({
            "question": row["question"],
            "tokens": [(text, _shade(value), _nats(value)) for text, value in row["tokens"]],
            "mean": f"{sum(nats) / len(nats):.3f}",
            "highest": f"{highest[1]:.2f}",
            "where": highest[0].strip() or "the end of the response",
        })  # fmt: skip
    return [
        {"step": step, "responses": responses, "loss": losses.get(step)}
        for step, responses in sorted(steps.items())
    ]


def _shade(nats: float | None) -> int:
    """Return the number of a token's colour, from 0 for none."""
    # Most tokens have small divergences, which the root spreads over more shades.
    share = 0.0 if nats is None else min(max(nats, 0.0) / _STRONG, 1.0)
    return round(math.sqrt(share) * _SHADES)


def _nats(nats: float | None) -> str:
    return "no number" if nats is None else f"{nats:.3f} nats"
