"""A problem, and the order in which a set of them is used."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from opsdc.errors import ConfigError, DataError


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One question, with its right answer where it is known."""

    id: str
    """Source and position: unique in its set and the same in every run."""
    messages: tuple[dict[str, str], ...]
    """The chat that the student sees, up to a user turn."""
    answer: str | None = None
    """The right answer; only metrics look at it."""
    teacher_messages: tuple[dict[str, str], ...] | None = None
    """The teacher's whole chat; None: `messages` with the instruction."""
    entry: dict[str, Any] | None = None
    """The task, options with seed, and index that reasoning-gym's own scorer needs."""


class ProblemSet:
    """Problems in an order that is a pure function of the seed and the step."""

    def __init__(self, problems: Sequence[Problem], *, seed: int) -> None:
        self._problems = tuple(problems)
        self.seed = seed

    def __len__(self) -> int:
        return len(self._problems)

    def __getitem__(self, index: int) -> Problem:
        return self._problems[index]

    def batch(self, step: int, size: int) -> list[Problem]:
        """Return the `size` problems of a step, counted from 1.

        Every epoch has its own shuffle, uses each problem once at most and drops the short rest.
        The batch depends on (seed, step, size) alone, so there is no position to save. Raises
        DataError where the set is smaller than a batch.
        """
        if step < 1 or size < 1:
            raise ValueError(f"step and size count from 1, got step={step}, size={size}")
        n = len(self)
        if size > n:
            raise DataError(
                f"a batch of {size} problems cannot be drawn from {n}; lower "
                "rollout.prompts_per_step or give more problems"
            )
        epoch, batch = divmod(step - 1, n // size)
        order = _permutation(n, self.seed, 1 + epoch)
        return [self[i] for i in order[batch * size : (batch + 1) * size]]

    def split(self, eval_size: int) -> tuple[ProblemSet, ProblemSet]:
        """Split into (train, eval); `eval_size` problems, drawn by the seed, are held out.

        No prompt is in both: where a source repeats itself, repetitions of held-out problems are
        left out of training, and standard error says how many. Raises ConfigError for a negative
        size, DataError where nothing is left to train on.
        """
        if eval_size < 0:
            raise ConfigError(f"data.eval_size must be 0 or more, got {eval_size}")
        n = len(self)
        if eval_size >= n:
            raise DataError(
                f"data.eval_size {eval_size} leaves none of {n} problems to train on; lower it or "
                "give more problems"
            )
        held_out = _permutation(n, self.seed, 0)[:eval_size]
        held_out_indices = set(held_out)
        held_out_prompts = {_prompt_key(self[i]) for i in held_out}
        rest = [p for i, p in enumerate(self._problems) if i not in held_out_indices]
        train = [p for p in rest if _prompt_key(p) not in held_out_prompts]
        if not train:
            raise DataError(
                f"all {len(rest)} problems outside the {eval_size} held-out ones repeat their "
                "prompts; lower data.eval_size or give more varied problems"
            )
        if len(train) < len(rest):
            print(
                f"data: left {len(rest) - len(train)} of {len(rest)} training problems out, whose "
                "prompt is also held out",
                file=sys.stderr,
            )
        return (
            ProblemSet(train, seed=self.seed),
            ProblemSet([self[i] for i in held_out], seed=self.seed),
        )


def _permutation(n: int, seed: int, draw: int) -> list[int]:
    """Return permutation `draw` of the seed: 0 holds problems out, the epochs count from 1."""
    import numpy as np  # `opsdc --help` does without it.

    return np.random.default_rng((seed, draw)).permutation(n).tolist()


def _prompt_key(problem: Problem) -> bytes:
    """Return a key that two problems share when the student sees the same prompt."""
    return hashlib.sha256(json.dumps(problem.messages).encode()).digest()
