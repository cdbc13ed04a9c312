"""A problem, and the order in which a set of them is used."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from opsdc.errors import DataError


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
    group: str | None = None
    """Problems of one group are held out together; None: of their own."""


class ProblemSet:
    """Problems in an order that is a pure function of the seed and the step."""

    def __init__(self, problems: Sequence[Problem], *, seed: int) -> None:
        self._problems = tuple(problems)
        self.seed = seed

    def __len__(self) -> int:
        return len(self._problems)

    def __getitem__(self, index: int) -> Problem:
        return self._problems[index]

    def __iter__(self) -> Iterator[Problem]:
        return iter(self._problems)

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

    def split(
        self, eval_size: int, gate_size: int = 0
    ) -> tuple[ProblemSet, ProblemSet, ProblemSet]:
        """Split into (train, gate, eval): the last two are drawn by the seed and held out.

        No prompt and no group is in two of them: training problems that share one with a held-out
        problem are left out, and standard error says how many. Raises DataError where nothing is
        left to train on.
        """
        n, wanted = len(self), eval_size + gate_size
        if wanted >= n:
            sizes = f"data.eval_size {eval_size}"
            sizes += f" and data.gate_size {gate_size} leave" if gate_size else " leaves"
            raise DataError(
                f"{sizes} none of {n} problems to train on; lower it or give more problems"
            )
        drawn = self._drawn()
        held_out = drawn[:eval_size]
        gate = _apart_from(held_out, drawn[eval_size:])[:gate_size]
        chosen = {problem.id for problem in (*held_out, *gate)}
        rest = [problem for problem in self._problems if problem.id not in chosen]
        train = _apart_from([*held_out, *gate], rest)
        if not train or len(gate) < gate_size:
            raise DataError(
                f"the {len(rest)} problems outside the {len(chosen)} held-out ones repeat their "
                "prompts or groups; lower data.eval_size or data.gate_size, or give more varied "
                "problems"
            )
        if len(train) < len(rest):
            print(
                f"data: left {len(rest) - len(train)} of {len(rest)} training problems out, whose "
                "prompt or group is also held out",
                file=sys.stderr,
            )
        return (
            ProblemSet(train, seed=self.seed),
            ProblemSet(gate, seed=self.seed),
            ProblemSet(held_out, seed=self.seed),
        )

    def held_out(self, eval_size: int) -> ProblemSet:
        """Return the problems that `split` holds out, for an evaluation: nothing need be left.

        Raises DataError where there are not so many.
        """
        if eval_size > len(self):
            raise DataError(
                f"data.eval_size {eval_size} of {len(self)} problems; lower it or give more "
                "problems"
            )
        return ProblemSet(self._drawn()[:eval_size], seed=self.seed)

    def _drawn(self) -> list[Problem]:
        """List the problems in the order of the draw, each followed by the others of its group."""
        members: dict[str, list[Problem]] = {}
        for i in _permutation(len(self), self.seed, 0):
            members.setdefault(self[i].group or f"#{i}", []).append(self[i])
        return [problem for group in members.values() for problem in group]


def _apart_from(taken: Sequence[Problem], problems: Sequence[Problem]) -> list[Problem]:
    """Return the problems that share neither prompt nor group with those that are taken."""
    prompts = {_prompt_key(p) for p in taken}
    groups = {p.group for p in taken} - {None}
    return [p for p in problems if _prompt_key(p) not in prompts and p.group not in groups]


def _permutation(n: int, seed: int, draw: int) -> list[int]:
    """Return permutation `draw` of the seed: 0 holds problems out, the epochs count from 1."""
    import numpy as np  # `opsdc --help` does without it.

    return np.random.default_rng((seed, draw)).permutation(n).tolist()


def _prompt_key(problem: Problem) -> bytes:
    """Return a key that two problems share when the student sees the same prompt."""
    return hashlib.sha256(json.dumps(problem.messages).encode()).digest()
