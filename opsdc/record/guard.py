"""Signs that a run goes wrong: responses collapse, repeat themselves, or lose their answers.

Measures of training are means over a window of steps, compared with the run's first window.
Answers to held-out problems are compared with the base model's. Everything is read from the record,
so that a resumed run judges as an uninterrupted one. The default action only warns. The limits come
from three recorded runs of the demo (12 to 15 steps, window 4), the worst window of each against
its first:

    lr      length   entropy   divergence   truncated   repeated   answers
    4e-6    0.35     1.39      1.06         +0.00       0.01       sound
    5e-6    0.29     1.42      1.06         +0.00       0.00       sound
    1e-5    0.21     1.24      1.42         +0.00       0.00       lost their sense

and from the collapse that the paper reports with a teacher refreshed at every step (entropy 0.3 to
0.6 nats). In the two sound runs accuracy on 64 held-out problems was 0.06 and 0.09 lower, with
intervals of ±0.13: chance alone moves so few answers by about the limit of 0.1, so let it stop a
run only with more problems.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from opsdc.config.settings import GuardConfig

WINDOW = 4
"""Number of steps that a mean is over; later windows are compared with the run's first."""

_GRAM = 8
"""Length in tokens of the pieces that are looked for earlier in the response."""

_LIMITS: tuple[tuple[str, Callable[[float, float], bool], str], ...] = (
    ("response_tokens_mean", lambda then, now: now < 0.25 * then, "0.25 times it"),
    ("truncated_share", lambda then, now: now > then + 0.2, "0.2 above it"),
    ("repeated_share", lambda then, now: now > 0.1, "0.1"),
    ("loss_nats", lambda then, now: now > 3 * then, "3 times it"),
    ("student_entropy", lambda then, now: not then / 2 <= now <= 1.7 * then, "0.5 to 1.7 times it"),
)
"""Each row holds a measure of a step, a test that is true where it is beyond its limit (given its
means over the first and the last window), and the limit in words."""


@dataclass(frozen=True, slots=True)
class Finding:
    """A measure beyond its limit."""

    action: str
    """One of "warn", "stop" and "rollback"."""
    text: str
    """The measure, its value and its limit in one sentence."""


def apply(findings: Sequence[Finding]) -> str | None:
    """Print findings; return "stop" or "rollback" where one of them ends the run."""
    for finding in findings:
        print(f"guard, {finding.action}: {finding.text}", file=sys.stderr, flush=True)
    actions = {finding.action for finding in findings}
    return next((action for action in ("rollback", "stop") if action in actions), None)


def repeated_share(ids: Sequence[int]) -> float:
    """Return the share of a response's 8-grams that also stand earlier in it, from 0 to 1.

    A response too short for one 8-gram gives 0.
    """
    grams = [tuple(ids[i : i + _GRAM]) for i in range(len(ids) - _GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def check_steps(rows: Sequence[dict[str, Any]], config: GuardConfig) -> list[Finding]:
    """Compare the last `WINDOW` rows of metrics.jsonl with the first ones.

    A warning is given at the step at which a measure passes its limit, and not repeated while it
    stays beyond.
    """
    action = config.action
    if action == "off":
        return []
    now, before = _signs(rows), _signs(rows[:-1])
    return [Finding(action, now[name]) for name in now if action != "warn" or name not in before]


def check_answers(base: dict[str, Any], now: dict[str, Any], config: GuardConfig) -> list[Finding]:
    """Compare the headline of held-out answers (`eval.answers.headline`) with the base model's."""
    findings = []
    if config.action != "off" and now["accuracy"] is not None and base["accuracy"] is not None:
        drop = base["accuracy"] - now["accuracy"]
        if drop > config.max_accuracy_drop:
            text = f"held-out accuracy fell by {drop:.3f}, guard.max_accuracy_drop is "
            findings.append(Finding(config.action, f"{text}{config.max_accuracy_drop}"))
    shorter = 1 - now["tokens_mean"] / base["tokens_mean"]
    target = config.target_compression
    if target is not None and shorter >= target:
        text = f"held-out answers are {shorter:.1%} shorter: guard.target_compression {target:g}"
        findings.append(Finding("stop", text))
    return findings


def _signs(rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Describe each measure that is beyond its limit after the last row, by its name."""
    # The last window must not overlap the one that it is compared with.
    if len(rows) < 2 * WINDOW:
        return {}
    first, last = rows[:WINDOW], rows[-WINDOW:]
    signs = {}
    for key, is_sick, limit in _LIMITS:
        then, now = _mean(first, key), _mean(last, key)
        if then is not None and now is not None and is_sick(then, now):
            text = f"{key} is {now:.4g} over {WINDOW} steps, {then:.4g} in the first; the limit is "
            signs[key] = text + limit
    return signs


def _mean(rows: Sequence[dict[str, Any]], key: str) -> float | None:
    """Average a measure over rows; None where no row has it."""
    # A skipped step has null; a record from before a measure existed lacks it.
    values = [row[key] for row in rows if row.get(key) is not None]
    return sum(values) / len(values) if values else None
