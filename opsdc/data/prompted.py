"""Problems with both of their prompts, for training and for evaluation."""

from __future__ import annotations

import array
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from opsdc.config.settings import OPSDCConfig
from opsdc.data.problem import Problem, ProblemSet
from opsdc.data.prompts import PromptPair, build_prompts, load_instruction
from opsdc.data.sources import load_problems, problems_from_rows
from opsdc.errors import DataError


@dataclass(frozen=True, slots=True)
class Prompted:
    """A problem and its two prompts."""

    problem: Problem
    prompts: PromptPair


class PromptedSet:
    """A problem set whose prompts are made when they are asked for."""

    def __init__(
        self, problems: ProblemSet, tokenizer: PreTrainedTokenizerBase, config: OPSDCConfig
    ) -> None:
        self.problems = problems
        self._tokenizer = tokenizer
        self._config = config
        self._instruction = load_instruction(config.prompt.instruction)
        against = config.teacher.against
        self._against = None if against is None else load_instruction(against, "teacher.against")
        self.longest = self.largest_id = 0
        """The most tokens of a prompt, and the largest id in one; `within_limit` finds them."""
        self.problems_sha256 = self.prompts_sha256 = ""
        """Digests of the problems and of the token ids of their prompts, once these were read."""

    def __len__(self) -> int:
        return len(self.problems)

    def __getitem__(self, index: int) -> Prompted:
        return self._prompted(self.problems[index])

    def batch(self, step: int, size: int) -> list[Prompted]:
        """Return the problems of a step with their prompts; see `ProblemSet.batch`."""
        return [self._prompted(p) for p in self.problems.batch(step, size)]

    def _prompted(self, problem: Problem) -> Prompted:
        prompts = build_prompts(
            problem,
            self._tokenizer,
            instruction=self._instruction,
            against=self._against,
            placement=self._config.prompt.placement,
            enable_thinking=self._config.prompt.enable_thinking,
            date=self._config.prompt.date,
        )
        return Prompted(problem, prompts)

    def within_limit(self, name: str) -> PromptedSet:
        """Return this set without problems whose prompts are longer than `prompt.max_tokens`.

        Cutting a prompt would cut the instruction or the question, so none is ever cut. Standard
        error says how many problems are dropped; DataError is raised where that leaves none.
        """
        limit = self._config.prompt.max_tokens
        short_enough, longest, longest_kept, largest_id = [], 0, 0, 0
        problems, rendered = hashlib.sha256(), hashlib.sha256()
        for i in tqdm(range(len(self)), desc=f"{name} prompts", leave=False, delay=2):
            item = self[i]
            prompts = item.prompts
            sides = (prompts.student_ids, prompts.teacher_ids, prompts.against_ids)
            n = max(map(len, sides))
            longest = max(longest, n)
            problem = item.problem
            said = (problem.messages, problem.teacher_messages, problem.answer, problem.group)
            problems.update(json.dumps(said).encode())
            for side in sides:
                rendered.update(array.array("q", [len(side), *side]))
            if n <= limit:
                short_enough.append(problem)
                longest_kept = max(longest_kept, n)
                largest_id = max(largest_id, *(max(ids, default=0) for ids in sides))
        dropped = len(self) - len(short_enough)
        if dropped:
            print(
                f"{name}: dropped {dropped} of {len(self)} problems whose prompt is longer than "
                f"prompt.max_tokens {limit} (longest: {longest})",
                file=sys.stderr,
            )
        if dropped and not short_enough:
            raise DataError(
                f"every {name} prompt is longer than prompt.max_tokens {limit}; raise it to at "
                f"least {longest} or shorten prompt.instruction"
            )
        kept = PromptedSet(
            ProblemSet(short_enough, seed=self.problems.seed), self._tokenizer, self._config
        )
        kept.longest, kept.largest_id = longest_kept, largest_id
        kept.problems_sha256, kept.prompts_sha256 = problems.hexdigest(), rendered.hexdigest()
        return kept


class ProblemSets(NamedTuple):
    """The problems of a run, apart from each other by prompt and group."""

    training: PromptedSet
    gate: PromptedSet
    """For decisions while training: refreshes, guards, the checkpoint that is kept."""
    held_out: PromptedSet
    """For the evaluation alone."""


def read_problems(
    config: OPSDCConfig,
    train_rows: Sequence[Mapping[str, Any]] | None = None,
    eval_rows: Sequence[Mapping[str, Any]] | None = None,
) -> tuple[ProblemSet, ProblemSet, ProblemSet]:
    """Return the problems to train on, of the gate and held out, from rows or `data.source`.

    Needs no model: a file that is not there is named before gigabytes are loaded. Without
    `eval_rows`, `data.eval_size` problems are held out from the others; `data.gate_size` more are
    in any case. Raises the errors of `load_problems` and of `ProblemSet.split`.
    """
    data = config.data

    def from_rows(rows: Sequence[Mapping[str, Any]], origin: str) -> ProblemSet:
        return problems_from_rows(
            rows,
            origin=origin,
            prompt_column=data.prompt_column,
            answer_column=data.answer_column,
            seed=config.seed,
        )

    problems = (
        from_rows(train_rows, "train_dataset") if train_rows is not None else read_all(config)
    )
    train, gate, held_out = problems.split(
        0 if eval_rows is not None else data.eval_size, data.gate_size
    )
    if eval_rows is not None:
        held_out = from_rows(eval_rows, "eval_dataset")
    return train, gate, held_out


def prompted_sets(
    config: OPSDCConfig,
    tokenizer: PreTrainedTokenizerBase,
    problems: tuple[ProblemSet, ProblemSet, ProblemSet] | None = None,
) -> ProblemSets:
    """Return the sets of a run with their prompts; `problems` are those of `read_problems`.

    Raises DataError where too few problems are left to fill a step.
    """
    train, gate, held_out = problems or read_problems(config)
    training = PromptedSet(train, tokenizer, config).within_limit("training")
    if len(training) < config.rollout.prompts_per_step:
        raise DataError(
            f"{len(training)} training problems are fewer than rollout.prompts_per_step "
            f"{config.rollout.prompts_per_step} (data.eval_size {config.data.eval_size} are held "
            "out); lower one of the two or give more problems"
        )
    return ProblemSets(
        training,
        PromptedSet(gate, tokenizer, config).within_limit("gate"),
        PromptedSet(held_out, tokenizer, config).within_limit("held-out"),
    )


def read_held_out(config: OPSDCConfig) -> ProblemSet:
    """Return the held-out problems of `data.source`, as a run has them, for an evaluation alone.

    Raises DataError for more than there are, and the errors of `load_problems`.
    """
    return read_all(config).held_out(config.data.eval_size)


def read_all(config: OPSDCConfig) -> ProblemSet:
    """Return all problems of `data.source`; raises the errors of `load_problems`."""
    data = config.data
    return load_problems(
        data.source,
        split=data.split,
        options=data.options,
        prompt_column=data.prompt_column,
        answer_column=data.answer_column,
        seed=config.seed,
    )
