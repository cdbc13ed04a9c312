"""Signs that a run goes wrong: responses collapse, repeat themselves, or lose their answers.

Training measures are means over a window of steps, compared with the run's first window; answers
to held-out problems are compared with the base model's. Everything is read from the record, so
that a resumed run judges as the uninterrupted one. The defaults only warn. They are set by three
recorded runs of the demo (12 to 15 steps, window 4), worst window of each against its first:

    lr      length   entropy   divergence   truncated   repeated   answers
    4e-6    0.35     1.39      1.06         +0.00       0.01       sound
    5e-6    0.29     1.42      1.06         +0.00       0.00       sound
    1e-5    0.21     1.24      1.42         +0.00       0.00       lost their sense

and by the paper's collapse with a teacher refreshed at every step (entropy 0.3 to 0.6 nats). In
the two sound ones accuracy on 64 held-out problems was 0.06 and 0.09 lower, intervals ±0.13: the
limit of 0.1 is about what chance does to so few, so let it stop a run only with more of them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from opsdc.config.settings import GuardConfig

_GRAM = 8


@dataclass(frozen=True, slots=True)
class Finding:
    """A measure beyond its limit. `action`: warn, stop or rollback."""

    action: str
    text: str


def apply(findings: Sequence[Finding]) -> str | None:
    """Print findings; return "stop" or "rollback" where one of them ends the run."""
    for finding in findings:
        print(f"guard, {finding.action}: {finding.text}", file=sys.stderr, flush=True)
    actions = {finding.action for finding in findings}
    return next((action for action in ("rollback", "stop") if action in actions), None)


def repeated_share(ids: Sequence[int]) -> float:
    """Share of a response's 8-grams that it has had before; 0 for one too short to tell."""
    grams = [tuple(ids[i : i + _GRAM]) for i in range(len(ids) - _GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def check_steps(rows: Sequence[dict[str, Any]], config: GuardConfig) -> list[Finding]:
    """What the last `guard.window` rows of metrics.jsonl say against the first ones.

    A warning is given when it becomes true, not again at each step after.
    """
    found = _beyond(rows, config)
    old = {name for name, _, _ in _beyond(rows[:-1], config)}
    return [Finding(a, text) for name, a, text in found if a != "warn" or name not in old]


def check_answers(base: dict[str, Any], now: dict[str, Any], config: GuardConfig) -> list[Finding]:
    """What headlines of held-out answers (see `evaluate.headline`) say against the base's."""
    found = []
    if config.accuracy != "off" and now["accuracy"] is not None and base["accuracy"] is not None:
        drop = base["accuracy"] - now["accuracy"]
        if drop > config.max_accuracy_drop:
            text = f"held-out accuracy fell by {drop:.3f}, guard.max_accuracy_drop is "
            found.append(Finding(config.accuracy, f"{text}{config.max_accuracy_drop}"))
    shorter = 1 - now["tokens_mean"] / base["tokens_mean"]
    target = config.target_compression
    if target is not None and shorter >= target:
        text = f"held-out answers are {shorter:.1%} shorter: guard.target_compression {target:g}"
        found.append(Finding("stop", text))
    return found


def _beyond(rows: Sequence[dict[str, Any]], c: GuardConfig) -> list[tuple[str, str, str]]:
    """(measure, action, sentence) of each that is beyond its limit now."""
    # The last window must not overlap the one that it is compared with.
    if len(rows) < 2 * c.window:
        return []
    first, last = rows[: c.window], rows[-c.window :]
    found = []

    def measure(
        name: str, action: str, key: str, sick: Callable[[float, float], bool], rule: str
    ) -> None:
        then, now = _mean(first, key), _mean(last, key)
        if action == "off" or then is None or now is None or not sick(then, now):
            return
        text = f"{key} is {now:.4g} over {c.window} steps, {then:.4g} in the first: guard.{rule}"
        found.append((name, action, text))

    measure(
        "length",
        c.length,
        "response_tokens_mean",
        lambda then, now: now < c.min_length * then,
        f"min_length {c.min_length:g}",
    )
    measure(
        "truncation",
        c.truncation,
        "truncated_share",
        lambda then, now: now > then + c.max_truncation_rise,
        f"max_truncation_rise {c.max_truncation_rise:g}",
    )
    measure(
        "repetition",
        c.repetition,
        "repeated_share",
        lambda then, now: now > c.max_repetition,
        f"max_repetition {c.max_repetition:g}",
    )
    measure(
        "kl",
        c.kl,
        "loss_nats",
        lambda then, now: now > c.max_kl * then,
        f"max_kl {c.max_kl:g}",
    )
    measure(
        "entropy",
        c.entropy,
        "student_entropy",
        lambda then, now: not c.min_entropy * then <= now <= c.max_entropy * then,
        f"min_entropy {c.min_entropy:g}, guard.max_entropy {c.max_entropy:g}",
    )
    return found


def _mean(rows: Sequence[dict[str, Any]], key: str) -> float | None:
    # A skipped step has null; a record from before a measure existed lacks it.
    values = [row[key] for row in rows if row.get(key) is not None]
    return sum(values) / len(values) if values else None
