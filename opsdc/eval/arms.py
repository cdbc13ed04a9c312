"""Answers of the base, prompt-only and trained model to the same held-out problems, compared.

All arms use one token cap, one seed and the same noise per problem (see `rollout.hf`), so
differences between arms are paired. Intervals are paired percentile bootstraps over problems.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from opsdc.config.settings import EvalConfig, OPSDCConfig
from opsdc.data.problem import ProblemSet
from opsdc.data.prompted import ProblemSets, Prompted, PromptedSet, prompted_sets, read_held_out
from opsdc.errors import ConfigError, DataError
from opsdc.eval.answers import Answer, answer, headline, one_line, read_answers, write_answers
from opsdc.eval.compare import by_difficulty, by_length, compare
from opsdc.eval.scorers import check_scorer
from opsdc.models.load import load_model, load_tokenizer, load_trained
from opsdc.ranks.talk import ALONE, Ranks
from opsdc.record import guard
from opsdc.record.lines import RunRecord, is_due, write_json
from opsdc.record.versions import versions
from opsdc.rollout.base import Sampler
from opsdc.rollout.start import start_sampler


class Arms:
    """The answers of base, told, trained and every evaluated step, stored under `eval/`.

    Base, told and trained answer the held-out problems. Decisions while training (gate, guards, the
    step that is kept) look at the validation problems: the gate's where `data.gate_size` sets some
    apart, else the held-out ones, which then are no longer untouched by choices.
    """

    def __init__(
        self,
        problems: ProblemSets,
        sampler: Sampler,
        tokenizer: PreTrainedTokenizerBase,
        config: OPSDCConfig,
        ranks: Ranks,
    ) -> None:
        self._held_out = first_of(problems.held_out, config.eval.problems)
        gate = first_of(problems.gate, None)
        self._validation, self._base = (gate, "gate-base") if gate else (self._held_out, "base")
        self.sampler, self._tokenizer = sampler, tokenizer
        self._config, self._ranks = config, ranks
        self.folder = Path(config.output_dir) / "eval"
        self._validated: tuple[int, list[Answer]] | None = None
        self._record: RunRecord | None = None

    @property
    def can_validate(self) -> bool:
        """Return True where there are validation problems and all of them have an answer."""
        answers = [p.problem.answer for p in self._validation]
        return bool(answers) and None not in answers

    def answer(self, name: str, *, arm: str = "student") -> list[Answer]:
        """Answer all held-out problems with the model as it is, and write the answers as `name`.

        `arm` "student" uses the plain prompt, "teacher" the one with the instruction. With
        `eval.greedy` they are answered greedily too. Without problems it returns [] and writes
        nothing.
        """
        settings = self._config.eval
        if settings.greedy:
            greedy = dataclasses.replace(settings, temperature=0.0, samples=1)
            self._write(f"{name}-greedy", self._held_out, greedy, arm)
        return self._write(name, self._held_out, settings, arm)

    def begin(self, step: int, record: RunRecord, emit: Callable[..., Any]) -> None:
        """Answer as base, and as base told to be concise, before the first step changes weights.

        After a later step it only forgets the answers of steps that a crash took back. From here on
        evaluations go to the record and, by `emit` (`Callbacks.emit`), to the trackers.
        """
        self._record, self._emit = record, emit
        settings = self._config.eval
        if self._ranks.first:
            if step == 0:
                shutil.rmtree(self.folder, ignore_errors=True)
            for later, path in evaluated_steps(self.folder).items():
                if later > step:
                    path.unlink()
        if step:
            return
        base = self.answer("base")
        self.answer("prompt_only", arm="teacher")
        if self._base != "base":
            base = self._write(self._base, self._validation, settings)
        if base:
            self._log(0, headline(base))
        if settings.difficulty_samples:
            # Greedy answers are all alike: how hard a problem is takes a temperature.
            temperature = settings.temperature or self._config.rollout.temperature
            more = dataclasses.replace(
                settings, samples=settings.difficulty_samples, temperature=temperature
            )
            self._write("difficulty", self._held_out, more, stream="difficulty")

    def validate(self, step: int) -> list[Answer]:
        """Answer the validation problems as the student after `step`, once a step."""
        if self._validated is None or self._validated[0] != step:
            name = validation_name(step, self._base)
            self._validated = step, self._write(name, self._validation, self._config.eval)
            self._log(step, headline(self._validated[1]))
        return self._validated[1]

    def was_validated(self, step: int) -> bool:
        """Return True where this run has answered the validation problems after `step`."""
        return self._validated is not None and self._validated[0] == step

    def validation(self, step: int) -> list[Answer]:
        """Read the answers of the student after `step`, of the base for 0, on the first rank."""
        return read_answers(self.folder / f"{validation_name(step, self._base)}.jsonl")

    def judge(self, step: int, *, again: bool = True) -> str | None:
        """Answer as the student at each `eval.every`-th step, and let the guards judge.

        Args:
            step: The last completed step.
            again: Answer even where an earlier run of this step left its answers.

        Returns:
            "stop" or "rollback" where a guard ends the run, otherwise None.
        """
        config = self._config
        due = is_due(config.eval.every, step) and 0 < step < config.train.steps
        if not (due and self._validation):
            return None
        there = self.folder / f"{validation_name(step, self._base)}.jsonl"
        if again or not self._ranks.on_first_rank(there.is_file):
            self._emit("on_evaluate", step=step, metrics=headline(self.validate(step)))

        def headlines() -> list[dict[str, float | None]]:
            return [headline(self.validation(s)) for s in (0, step)]

        base, now = self._ranks.on_first_rank(headlines)
        # A crash may have come between the answers and their place in the record.
        self._log(step, now)
        return self._ranks.on_first_rank(
            lambda: guard.apply(guard.check_answers(base, now, config.guard))
        )

    def finish(self, step: int) -> None:
        """Answer as the trained model, after the run's last step."""
        answers = self.answer("trained")
        # A step that was validated has its values; the weights there are may be of an earlier one.
        if answers and self._base == "base" and not self.was_validated(step):
            self._log(step, headline(answers))

    def _log(self, step: int, values: Mapping[str, float | None]) -> None:
        """Put an evaluation into the record, and tell the trackers where it is new there."""
        if self._record is not None and self._record.evaluated(step, values):
            shown = {f"eval/{key}": v for key, v in values.items() if v is not None}
            self._emit("on_log", step=step, logs=shown)

    def _write(
        self,
        name: str,
        problems: Sequence[Prompted],
        settings: EvalConfig,
        arm: str = "student",
        stream: str = "eval",
    ) -> list[Answer]:
        if not problems:
            return []
        answers = answer(
            self.sampler, self._tokenizer, problems, settings, arm=arm, label=name, stream=stream
        )
        path = self.folder / f"{name}.jsonl"
        self._ranks.on_first_rank(lambda: write_answers(path, answers))
        print(f"eval {name}: {one_line(answers)}", flush=True)
        return answers


def evaluated_steps(folder: Path) -> dict[int, Path]:
    """Return the files of validation answers by step, in order."""
    files = ((re.fullmatch(r"step-(\d+)", p.stem), p) for p in sorted(folder.glob("step-*.jsonl")))
    return {int(match[1]): path for match, path in files if match}


def validation_name(step: int, base: str) -> str:
    """Return the name of the validation answers after a step; of the base's for step 0."""
    return f"step-{step:06d}" if step else base


def scored_sets(
    config: OPSDCConfig,
    tokenizer: PreTrainedTokenizerBase,
    problems: tuple[ProblemSet, ProblemSet, ProblemSet],
) -> ProblemSets:
    """Return `prompted_sets`, once the scorers are known to take all answers that they will meet.

    Raises ConfigError and DataError as `scorers.check_scorer`, ConfigError too for a training
    problem that cannot be judged where `data.train_on` asks for it.
    """
    sets = prompted_sets(config, tokenizer, problems)
    held_out = list(sets.held_out.problems)[: config.eval.problems]
    answered = [p for p in (*held_out, *sets.gate.problems) if p.answer is not None]
    check_scorer(config.eval.scorer, answered, "eval.scorer")
    if config.data.train_on != "all":
        try:
            check_scorer(config.data.scorer, list(sets.training.problems), "data.scorer")
        except DataError as error:
            raise ConfigError(
                f"data.train_on {config.data.train_on} tells right responses from wrong ones: "
                f"{error}"
            ) from error
    return sets


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
    folder, seed = output_dir / "eval", config.seed
    arms = _read_arms(folder, "")
    if arms is None:
        return {}
    base, trained = arms["base"], arms["trained"]
    compared = _against_base(arms, seed)
    summary = {
        **{name: headline(answers) for name, answers in arms.items()},
        "token_reduction": compared["trained"]["token_reduction"],
        "compared_with_base": compared,
        "trained_compared_with_told": compare(arms["prompt_only"], trained, seed=seed),
        "by_length": by_length(base, trained),
        "eval": dataclasses.asdict(config.eval),
    }
    if (folder / "difficulty.jsonl").is_file():
        summary["by_difficulty"] = by_difficulty(
            read_answers(folder / "difficulty.jsonl"), base, trained
        )
    greedy = _read_arms(folder, "-greedy")
    if greedy is not None:
        summary["greedy"] = {
            **{name: headline(answers) for name, answers in greedy.items()},
            "compared_with_base": _against_base(greedy, seed),
        }
    return summary


def _read_arms(folder: Path, suffix: str) -> dict[str, list[Answer]] | None:
    paths = {name: folder / f"{name}{suffix}.jsonl" for name in ("base", "prompt_only", "trained")}
    if not all(path.is_file() for path in paths.values()):
        return None
    return {name: read_answers(path) for name, path in paths.items()}


def _against_base(arms: dict[str, list[Answer]], seed: int) -> dict[str, Any]:
    return {
        name: compare(arms["base"], arms[name], seed=seed) for name in ("prompt_only", "trained")
    }


def evaluate_arms(config: OPSDCConfig, trained: str | Path) -> dict[str, Any]:
    """Answer anew as all three arms, into `config.output_dir`; write and return the summary.

    Args:
        config: The run's settings; `model.name_or_path` is the base.
        trained: Folder of the trained model, or of an adapter on the base.

    Raises:
        DataError: There are no held-out problems.
    """
    read = read_held_out(config)
    tokenizer = load_tokenizer(config.model)
    held_out = PromptedSet(read, tokenizer, config).within_limit("held-out")
    problems = first_of(held_out, config.eval.problems)
    answered = [item.problem for item in problems if item.problem.answer is not None]
    check_scorer(config.eval.scorer, answered, "eval.scorer")
    if not problems:
        raise DataError("no held-out problems: set data.eval_size and eval.problems above 0")
    folder = Path(config.output_dir)

    def answer_with(model: Any, arms: dict[str, str]) -> None:
        model.to(ALONE.device)
        sampler = start_sampler(config, model, tokenizer, problems[0].prompts.student_ids)
        sampler.push(model, 0)
        for name, arm in arms.items():
            answers = answer(sampler, tokenizer, problems, config.eval, arm=arm, label=name)
            write_answers(folder / "eval" / f"{name}.jsonl", answers)
            print(f"eval {name}: {one_line(answers)}", flush=True)
        sampler.close()

    # The trained model first: its folder is the one that may be missing or broken.
    answer_with(load_trained(config.model, trained), {"trained": "student"})
    answer_with(load_model(config.model), {"base": "student", "prompt_only": "teacher"})
    return write_summary(folder, config, {"trained_folder": str(trained)})
