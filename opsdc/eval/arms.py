"""Answers of the base, prompt-only and trained model to the same held-out problems, compared.

All arms use one token cap, one seed and the same noise per problem (see `rollout.hf`), so
differences between arms are paired. Intervals are paired percentile bootstraps over problems.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from opsdc.config.settings import OPSDCConfig
from opsdc.data.prompted import Prompted, PromptedSet, prompted_sets
from opsdc.errors import DataError
from opsdc.eval.answers import Answer, answer, headline, one_line, read_answers, write_answers
from opsdc.eval.compare import by_length, compare
from opsdc.models.load import load_model, load_tokenizer, load_trained
from opsdc.ranks.talk import Ranks
from opsdc.record import guard
from opsdc.record.lines import is_due, write_json
from opsdc.record.versions import versions
from opsdc.rollout.base import Sampler
from opsdc.rollout.hf import HFSampler


class Arms:
    """The answers of base, told and trained to a run's held-out problems, stored under `eval/`."""

    def __init__(
        self,
        problems: PromptedSet,
        sampler: Sampler,
        tokenizer: PreTrainedTokenizerBase,
        config: OPSDCConfig,
        ranks: Ranks,
    ) -> None:
        self._problems = first_of(problems, config.eval.problems)
        self._sampler, self._tokenizer = sampler, tokenizer
        self._config, self._ranks = config, ranks
        self._folder = Path(config.output_dir) / "eval"

    def answer(self, name: str, *, arm: str = "student") -> list[Answer]:
        """Answer all problems with the model as it is, and write the answers as `name`.

        `arm` "student" uses the plain prompt, "teacher" the one with the instruction. Without
        problems it returns [] and writes nothing.
        """
        if not self._problems:
            return []
        answers = answer(
            self._sampler, self._tokenizer, self._problems, self._config, arm=arm, label=name
        )
        self._ranks.on_first_rank(lambda: write_answers(self._path(name), answers))
        print(f"eval {name}: {one_line(answers)}", flush=True)
        return answers

    def answer_as_base(self) -> None:
        """Answer as base, and as base told to be concise, before the first step changes weights."""
        if self._ranks.first:
            shutil.rmtree(self._folder, ignore_errors=True)
        self.answer("base")
        self.answer("prompt_only", arm="teacher")

    def judge(self, step: int, emit: Callable[..., Any], *, again: bool = True) -> str | None:
        """Answer as the student at each `eval.every`-th step, and let the guards judge.

        Args:
            step: The last completed step.
            emit: `Callbacks.emit`, which is sent "on_evaluate" with new answers.
            again: Answer even where an earlier run of this step left its answers.

        Returns:
            "stop" or "rollback" where a guard ends the run, otherwise None.
        """
        config, name = self._config, f"step-{step:06d}"
        due = is_due(config.eval.every, step) and 0 < step < config.train.steps
        if not (due and self._problems):
            return None
        if again or not self._ranks.on_first_rank(self._path(name).is_file):
            emit("on_evaluate", step=step, metrics=headline(self.answer(name)))

        def apply_guards() -> str | None:
            base, now = (headline(read_answers(self._path(x))) for x in ("base", name))
            return guard.apply(guard.check_answers(base, now, config.guard))

        return self._ranks.on_first_rank(apply_guards)

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.jsonl"


def first_of(problems: PromptedSet, count: int | None) -> list[Prompted]:
    """Return the first `count` problems of a set, or all of them where `count` is None."""
    size = len(problems) if count is None else min(count, len(problems))
    return [problems[i] for i in range(size)]


def write_summary(folder: Path, config: OPSDCConfig, facts: dict[str, Any]) -> dict[str, Any]:
    """Write summary.json and return it: `facts` of the run, versions, and its answers compared."""
    summary = {**facts, "versions": versions(), **summary_of_run(folder, config)}
    write_json(folder / "summary.json", summary)
    return summary


def summary_of_run(output_dir: Path, config: OPSDCConfig) -> dict[str, Any]:
    """Compare the answers of a run's three arms; {} where one of them has left none."""
    folder = output_dir / "eval"
    names = ("base", "prompt_only", "trained")
    if not all((folder / f"{name}.jsonl").is_file() for name in names):
        return {}
    arms = {name: read_answers(folder / f"{name}.jsonl") for name in names}
    against_base = {
        name: compare(arms["base"], arms[name], seed=config.seed)
        for name in ("prompt_only", "trained")
    }
    return {
        **{name: headline(answers) for name, answers in arms.items()},
        "token_reduction": against_base["trained"]["token_reduction"],
        "compared_with_base": against_base,
        "by_length": by_length(arms["base"], arms["trained"]),
        "eval": dataclasses.asdict(config.eval),
    }


def evaluate_arms(config: OPSDCConfig, trained: str | Path) -> dict[str, Any]:
    """Answer anew as all three arms, into `config.output_dir`; write and return the summary.

    Args:
        config: The run's settings; `model.name_or_path` is the base.
        trained: Folder of the trained model, or of an adapter on the base.

    Raises:
        DataError: There are no held-out problems.
    """
    tokenizer = load_tokenizer(config.model)
    _, held_out = prompted_sets(config, tokenizer)
    problems = first_of(held_out, config.eval.problems)
    if not problems:
        raise DataError("no held-out problems: set data.eval_size and eval.problems above 0")
    folder = Path(config.output_dir)

    def answer_with(model: Any, arms: dict[str, str]) -> None:
        sampler = HFSampler(model, tokenizer, seed=config.seed)
        sampler.push(model, 0)
        for name, arm in arms.items():
            answers = answer(sampler, tokenizer, problems, config, arm=arm, label=name)
            write_answers(folder / "eval" / f"{name}.jsonl", answers)
            print(f"eval {name}: {one_line(answers)}", flush=True)

    answer_with(load_model(config.model), {"base": "student", "prompt_only": "teacher"})
    answer_with(load_trained(config.model, trained), {"trained": "student"})
    return write_summary(folder, config, {"trained_folder": str(trained)})
