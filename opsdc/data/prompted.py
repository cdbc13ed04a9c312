"""Problems with both of their prompts: what is trained on and what is held out."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from opsdc.config.settings import OPSDCConfig, PromptConfig
from opsdc.data.problem import Problem, ProblemSet
from opsdc.data.prompts import PromptPair, build_prompts, load_instruction
from opsdc.data.sources import load_problems, problems_from_rows
from opsdc.errors import DataError


@dataclass(frozen=True, slots=True)
class Prompted:
    """A problem and what student and teacher are asked."""

    problem: Problem
    prompts: PromptPair


class PromptedSet:
    """A problem set whose prompts are made when they are asked for."""

    def __init__(
        self, problems: ProblemSet, tokenizer: PreTrainedTokenizerBase, config: PromptConfig
    ) -> None:
        self._problems = problems
        self._tokenizer = tokenizer
        self._config = config
        self._instruction = load_instruction(config.instruction)

    def __len__(self) -> int:
        return len(self._problems)

    def __getitem__(self, index: int) -> Prompted:
        return self._prompted(self._problems[index])

    def batch(self, step: int, size: int) -> list[Prompted]:
        """The problems of a step: a pure function of (seed, step)."""
        return [self._prompted(p) for p in self._problems.batch(step, size)]

    def _prompted(self, problem: Problem) -> Prompted:
        prompts = build_prompts(
            problem,
            self._tokenizer,
            instruction=self._instruction,
            placement=self._config.placement,
            enable_thinking=self._config.enable_thinking,
        )
        return Prompted(problem, prompts)

    def within_limit(self, name: str) -> PromptedSet:
        """Without the problems whose prompts are longer than `prompt.max_tokens`; says how many.

        Cutting a prompt would cut the instruction or the question, so none is ever cut.
        """
        limit = self._config.max_tokens
        kept, longest = [], 0
        for i in tqdm(range(len(self)), desc=f"{name} prompts", leave=False, delay=2):
            item = self[i]
            n = max(len(item.prompts.student_ids), len(item.prompts.teacher_ids))
            longest = max(longest, n)
            if n <= limit:
                kept.append(item.problem)
        dropped = len(self) - len(kept)
        if dropped:
            print(
                f"{name}: dropped {dropped} of {len(self)} problems whose prompt is longer than "
                f"prompt.max_tokens {limit} (longest: {longest})",
                file=sys.stderr,
            )
        if dropped and not kept:
            raise DataError(
                f"every {name} prompt is longer than prompt.max_tokens {limit}; raise it to at "
                f"least {longest} or shorten prompt.instruction"
            )
        return PromptedSet(
            ProblemSet(kept, seed=self._problems.seed), self._tokenizer, self._config
        )


def prompted_sets(
    config: OPSDCConfig,
    tokenizer: PreTrainedTokenizerBase,
    train_rows: Sequence[Mapping[str, Any]] | None = None,
    eval_rows: Sequence[Mapping[str, Any]] | None = None,
) -> tuple[PromptedSet, PromptedSet]:
    """Training and held-out problems, from rows where given, else from `data.source`.

    Without `eval_rows` the held-out problems are split off: `data.eval_size` of them.
    Raises DataError.
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

    if train_rows is not None:
        everything = from_rows(train_rows, "train_dataset")
    else:
        everything = load_problems(
            data.source,
            split=data.split,
            options=data.options,
            prompt_column=data.prompt_column,
            answer_column=data.answer_column,
            seed=config.seed,
        )
    if eval_rows is not None:
        train, held_out = everything, from_rows(eval_rows, "eval_dataset")
    else:
        train, held_out = everything.split(data.eval_size)
    training = PromptedSet(train, tokenizer, config.prompt).within_limit("training")
    if len(training) < config.rollout.prompts_per_step:
        raise DataError(
            f"{len(training)} training problems are fewer than rollout.prompts_per_step "
            f"{config.rollout.prompts_per_step} (data.eval_size {data.eval_size} are held out); "
            "lower one of the two or give more problems"
        )
    return training, PromptedSet(held_out, tokenizer, config.prompt).within_limit("held-out")
