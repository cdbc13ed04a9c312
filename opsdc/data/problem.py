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
    """One question, as the chat the student sees.

    `id` is unique in its set and stable (source and position); `entry` is what reasoning-gym's own
    scorer needs (task, options with seed, index).
    """

    id: str
    messages: tuple[dict[str, str], ...]
    answer: str | None = None
    teacher_messages: tuple[dict[str, str], ...] | None = None
    entry: dict[str, Any] | None = None


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
        """The problems of a step, counted from 1: each once per epoch, the short rest dropped.

        Depends on (seed, step, size) alone, so there is no position to save. Every epoch has its
        own shuffle. Raises DataError where the set is smaller than a batch.
        """
        if step < 1 or size < 1:
            raise ValueError(f"step and size count from 1, got step={step}, size={size}")
        n = len(self)
        if size > n:
            raise DataError(
                f"a batch of {size} problems cannot be drawn from {n}; lower "
                "rollout.prompts_per_step or give more problems"
            )
        epoch, at = divmod(step - 1, n // size)
        order = _permutation(n, self.seed, 1 + epoch)
        return [self[i] for i in order[at * size : (at + 1) * size]]

    def split(self, eval_size: int) -> tuple[ProblemSet, ProblemSet]:
        """(train, eval): `eval_size` problems held out by the seed, the others in their order.

        No prompt is in both: where a source repeats itself, repetitions of held-out problems are
        left out of training, and standard error says how many.
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
        chosen = set(held_out)
        prompts = {_prompt_key(self[i]) for i in held_out}
        rest = [p for i, p in enumerate(self._problems) if i not in chosen]
        train = [p for p in rest if _prompt_key(p) not in prompts]
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
    """Draw number `draw` of the seed: 0 holds problems out, the epochs count from 1."""
    import numpy as np  # here: `opsdc --help` and plain data checks do without

    return np.random.default_rng((seed, draw)).permutation(n).tolist()


def _prompt_key(problem: Problem) -> bytes:
    return hashlib.sha256(json.dumps(problem.messages).encode()).digest()
