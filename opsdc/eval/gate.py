"""The gate before a teacher's refresh: it moves on evidence, not by the clock.

At a refresh the student answers the validation problems, paired with the answers of the teacher
that was accepted last (same problems, same noise). It is accepted where accuracy is not lower by
more than the margin and no more answers are truncated. Otherwise the teacher stays; after two
refusals the student goes back to it, because it has drifted off what the teacher holds.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from opsdc.config.settings import TeacherConfig
from opsdc.errors import ConfigError
from opsdc.eval.answers import headline
from opsdc.eval.arms import Arms
from opsdc.method.teacher import Teacher
from opsdc.ranks import stop

REFUSALS = 2
"""Refusals in a row after which the student goes back to the accepted teacher."""


class Gate:
    """Moves the teacher, where `teacher.gate` asks for it only to a student that is as good.

    Raises ConfigError where it has no problems with answers to decide by.
    """

    name = "gate"

    def __init__(
        self,
        config: TeacherConfig,
        arms: Arms,
        model: Any,
        teacher: Teacher,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        self._config, self._arms = config, arms
        self._model, self._teacher = model, teacher
        self._optimizer = optimizer
        self._accepted, self._refusals = 0, 0
        if config.gate and not arms.can_validate:
            raise ConfigError(
                "teacher.gate true decides by answers to problems that are not trained on, and "
                "there are none with an answer: set data.gate_size, or data.eval_size, and see "
                "that data.answer_column names the column of the answer"
            )

    def move_teacher(self, step: int, losses: Sequence[float | None]) -> None:
        """Let the teacher follow after the update of `step`, and the student go back to it.

        `losses` holds the loss of each step up to this one, see `Teacher.after_update`. The sampler
        must have the student's weights. A stop waits until the decision is made: no step is
        complete, and nothing could be saved.
        """
        accepts = self._accepts if self._config.gate else lambda step: True
        with stop.held_back():
            self._teacher.after_update(step, losses, accepts)
        if self._refusals >= REFUSALS:
            self._teacher.reset_student()
            # Its moments led away from here.
            self._optimizer.state.clear()
            self._arms.sampler.push(self._model, step)
            self._refusals = 0
            print(
                f"gate, step {step}: refused {REFUSALS} times, the student goes back to step "
                f"{self._accepted}",
                file=sys.stderr,
                flush=True,
            )

    def _accepts(self, step: int) -> bool:
        """Answer as the student after `step`, and decide."""
        now = headline(self._arms.validate(step))
        before = headline(self._arms.validation(self._accepted))
        assert before["accuracy"] is not None
        assert now["accuracy"] is not None
        assert before["truncated"] is not None
        assert now["truncated"] is not None
        fall = before["accuracy"] - now["accuracy"]
        # Shares of so many problems: a fall of just the margin is within it, whatever its rounding.
        within = fall <= self._config.gate_margin + 1e-9
        accepted = within and now["truncated"] <= before["truncated"]
        verdict = "the teacher becomes the student" if accepted else "the teacher stays"
        print(
            f"gate, step {step}: accuracy {now['accuracy']:.3f} ({before['accuracy']:.3f} at step "
            f"{self._accepted}), truncated {now['truncated']:.3f} ({before['truncated']:.3f}): "
            f"{verdict}",
            flush=True,
        )
        if accepted:
            self._accepted, self._refusals = step, 0
        else:
            self._refusals += 1
        return accepted

    def state(self) -> dict[str, Any]:
        """Return what `load` needs, as JSON can hold it."""
        return {"accepted": self._accepted, "refusals": self._refusals}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint's state."""
        self._accepted, self._refusals = state["accepted"], state["refusals"]
