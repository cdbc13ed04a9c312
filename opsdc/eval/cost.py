"""What a run cost: tokens, seconds by phase, and money or energy at a given rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from opsdc.config.settings import OPSDCConfig
from opsdc.errors import ConfigError

_PHASES = {
    "perf/seconds_rollout": "sampling of training responses",
    "perf/seconds_teacher": "teacher's forward passes",
    "perf/seconds_student": "student's forward and backward passes",
    "perf/seconds_optimizer": "optimizer",
}
"""Seconds of a step by their key in metrics.jsonl, with what was done in them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """What an hour of the whole machine costs; raises ConfigError for what is no rate."""

    cost_per_hour: float | None = None
    currency: str = "USD"
    watts: float | None = None
    """The power that the machine draws, all of it together."""

    def __post_init__(self) -> None:
        for name, value in (("cost_per_hour", self.cost_per_hour), ("watts", self.watts)):
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise ConfigError(f"--{name} must be a number from 0 on, got {value:g}")


def seconds_by_phase(
    rows: Sequence[dict[str, Any]], seconds: float | None
) -> tuple[list[tuple[str, float]], float]:
    """Return the seconds of each phase, and all of them together.

    Args:
        rows: The rows of metrics.jsonl.
        seconds: From the start of the process to the end of the run; None where it has not ended.
    """
    phases = [(name, sum(row.get(key) or 0.0 for row in rows)) for key, name in _PHASES.items()]
    steps = sum(row.get("perf/seconds_step") or 0.0 for row in rows)
    rest = steps - sum(spent for _, spent in phases)
    phases.append(("the rest of a step: new weights to the sampler, records", max(rest, 0.0)))
    # A resumed run's clock starts anew: then it knows less than the steps themselves.
    around = max((seconds or 0.0) - steps, 0.0)
    if around:
        phases.append(("outside of steps: loading, checks, evaluations, saving", around))
    return phases, steps + around


def tokens_of_training(
    rows: Sequence[dict[str, Any]], config: OPSDCConfig
) -> tuple[int, int | None]:
    """Return the tokens that steps sampled, and those that the loss was taken over.

    The second is None where the record cannot tell, since wrong responses were left out.
    """
    count = config.rollout.prompts_per_step * config.rollout.samples_per_prompt
    sampled, trained = 0, 0.0
    for row in rows:
        answered = round(count * (1 - (row.get("empty_share") or 0.0)))
        tokens = round(answered * (row.get("response_tokens_mean") or 0.0))
        sampled += tokens
        kept = row.get("kept_tokens_share")
        trained += tokens * (1 - (row.get("cut_share") or 0.0)) * (1.0 if kept is None else kept)
    return sampled, None if config.data.train_on == "correct" else round(trained)


def cost_rows(
    rows: Sequence[dict[str, Any]],
    config: OPSDCConfig,
    *,
    seconds: float | None,
    evaluated: int,
    rates: Rates,
) -> list[tuple[str, str]]:
    """Return what the page says of a run's price, as names and values.

    `evaluated` is the number of tokens in answers to held-out and validation problems.
    """
    sampled, trained = tokens_of_training(rows, config)
    phases, whole = seconds_by_phase(rows, seconds)
    sampling = phases[0][1]
    updating = sum(spent for _, spent in phases[1:4])
    shown = [("tokens sampled for training", _count(sampled))]
    left_out = "not recorded: wrong responses were left out"
    shown.append(("tokens trained on", left_out if trained is None else _count(trained)))
    shown.append(("tokens sampled for evaluations", _count(evaluated)))
    if sampling:
        shown.append(("sampling", f"{sampled / sampling:,.1f} tokens per second"))
    if updating and trained:
        shown.append(("update", f"{trained / updating:,.1f} tokens per second"))
    shown.append(("time, as far as it was measured", duration(whole)))
    if rates.cost_per_hour is not None:
        price = whole / 3600 * rates.cost_per_hour
        at = f"at {rates.cost_per_hour:,.2f} {rates.currency} an hour"
        shown.append(("money", f"{price:,.2f} {rates.currency} {at}"))
    if rates.watts is not None:
        energy = f"{whole / 3600 * rates.watts / 1000:,.3f} kWh"
        shown.append(("energy", f"{energy} at {rates.watts:,.0f} W"))
    return shown


def duration(seconds: float) -> str:
    """Write a time as people say it: 48 s, 12 min 5 s, 3 h 20 min."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    if minutes:
        return f"{minutes} min {rest} s"
    return f"{seconds:.1f} s" if seconds < 10 else f"{rest} s"


def _count(tokens: int) -> str:
    return f"{tokens:,}"
