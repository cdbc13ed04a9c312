"""The dial as a controller: response length held at a share of what the plain model takes.

After each step the mean response length, relative to the model's own plain length before training,
moves the dial by a proportional–integral rule on the log ratio::

    e = log(relative length / (1 − target)),    dial = dial₀ + P·e + I·Σ e                       (1)

within 0 and `teacher.dial_max`. Longer than wanted pulls harder, shorter eases off; the sum stops
where the dial is at a limit and would go beyond it. One step's mean is noisy (a handful of
responses), so e is that of a running mean of log lengths.

The start is a guess that is nearly right: logits are affine in the dial, and so, about, is the log
of the length, which is known at 0 (plain) and at 1 (told)::

    dial₀ = log(1 − target) / log(told length / plain length)                                    (2)

From the paper's 1 a student would be as short as the told one within a few steps, and would have to
be brought back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from opsdc.config.settings import TeacherConfig
from opsdc.errors import ConfigError

PROPORTIONAL = 0.3
"""P: change of the dial for a length e times too long."""
INTEGRAL = 0.1
"""I: change of the dial per step for such a length."""
MEMORY = 0.5
"""Share that the running mean keeps of itself at each step."""


class Dial:
    """The weight of the instruction in the teacher; held still, or moved to hold a length.

    The dial's state is part of every checkpoint, so that a resumed run steers as the whole one.
    """

    name = "dial"

    def __init__(self, config: TeacherConfig) -> None:
        self._config = config
        self.value = self._start = config.dial
        """The dial of the next step."""
        self._plain: dict[str, float] = {}
        self._mean_error: float | None = None
        self._sum = 0.0

    def begin(
        self, step: int, lengths: Callable[[], tuple[Mapping[str, float], Mapping[str, float]]]
    ) -> None:
        """Measure what a target is a share of, where there is one, and where the dial starts.

        Args:
            step: The last completed step.
            lengths: Samples the model as it is, plain and told, for mean response lengths in
                tokens by problem.

        Raises:
            ConfigError: The model has been trained already, so that nobody knows them any more.
        """
        if self._config.target is None or self._plain:
            return
        if step:
            raise ConfigError(
                f"teacher.target {self._config.target:g} is a share of the length before training, "
                f"which this run did not measure before its step {step}; unset it, or start anew "
                "in another output_dir"
            )
        plain, told = lengths()
        self._plain = dict(plain)
        shorter = sum(told.values()) / sum(plain.values())
        # Another dial than the paper's is somebody's choice; an instruction that hardly shortens
        # says nothing.
        if self._config.dial == 1.0 and shorter < 0.95:
            guess = math.log(1.0 - self._config.target) / math.log(max(shorter, 1e-3))
            self.value = self._start = min(guess, self._config.dial_max)

    def after_step(self, lengths: Sequence[tuple[str, int]]) -> dict[str, float]:
        """Move the dial by the lengths in tokens of a step's responses, each with its problem.

        Returns what the record says of the step: the dial that it had and the relative length of
        its responses, or nothing where the dial is the paper's.
        """
        target, used = self._config.target, self.value
        if target is None:
            return {} if used == 1.0 else {"dial": used}
        if not lengths:
            return {"dial": used}
        # A problem whose plain length is known counts by it, another by the mean over problems.
        mean = sum(self._plain.values()) / len(self._plain)
        expected = sum(self._plain.get(problem, mean) for problem, _ in lengths)
        relative = sum(n for _, n in lengths) / expected
        error = math.log(max(relative, 1e-3) / (1.0 - target))
        if self._mean_error is not None:
            error = MEMORY * self._mean_error + (1.0 - MEMORY) * error
        self._mean_error = error
        moved = self._start + PROPORTIONAL * error + INTEGRAL * (self._sum + error)
        self.value = min(max(moved, 0.0), self._config.dial_max)
        # At a limit the sum takes only what brings the dial back.
        if self.value == moved or (moved < 0.0) == (error > 0.0):
            self._sum += error
        return {"dial": used, "relative_length": relative}

    def state(self) -> dict[str, Any]:
        """Return what `load` needs, as JSON can hold it."""
        return {
            "value": self.value,
            "start": self._start,
            "plain": self._plain,
            "mean_error": self._mean_error,
            "sum": self._sum,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint's state."""
        if self._config.target is not None:
            self.value, self._sum = state["value"], state["sum"]
            # Checkpoints of earlier versions have none: theirs was the setting's.
            self._start = state.get("start", self._config.dial)
            self._plain, self._mean_error = dict(state["plain"]), state["mean_error"]
