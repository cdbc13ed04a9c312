"""The loop of on-policy self-distillation (OPSDC / CRISP, arXiv 2603.05433), top to bottom.

The method has no reward, advantage, importance ratio or clip, and no score-function term for the
sampling of a response. Prefixes are constants; the loss is the divergence at every response token.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from opsdc import checks
from opsdc.config.settings import OPSDCConfig
from opsdc.data.prompted import read_problems
from opsdc.errors import OutOfMemoryError
from opsdc.eval.answers import Answer, mark_right
from opsdc.eval.arms import Arms, scored_sets
from opsdc.eval.best import BestStep
from opsdc.eval.gate import Gate
from opsdc.eval.report import finish_run
from opsdc.method.batch import Layout
from opsdc.method.measures import UpdateResult
from opsdc.method.out_of_memory import ADVICE
from opsdc.method.target import Dial
from opsdc.method.teacher import Teacher
from opsdc.method.update import make_optimizer, update
from opsdc.models.load import describe, prepare_model, receive_model
from opsdc.models.other import load_other
from opsdc.ranks import shard, stop, talk
from opsdc.record import contents, guard
from opsdc.record.callbacks import Callbacks
from opsdc.record.checkpoint import write_model
from opsdc.record.lines import RunRecord, is_due
from opsdc.record.resume import RunState
from opsdc.rollout.start import start_sampler
from opsdc.rollout.step import StepRollouts, sample_lengths, sample_step


class OPSDCTrainer:
    """A training run after which a model answers as if it had been told to be concise.

    Args:
        model: A transformers causal language model, a folder or Hub name, or None for the
            config's `model.name_or_path`.
        config: All settings; see `OPSDCConfig`.
        train_dataset, eval_dataset: Rows (a list of mappings or a `datasets.Dataset`) instead of
            the config's `data.source`; columns as in `opsdc.data.sources`.
        processing_class: The tokenizer, where `model` is given as a module.
        callbacks: `transformers.TrainerCallback`s; `on_log` receives each step's record.

    Raises ConfigError, DataError or ModelError, before the first step, for what cannot work.
    """

    def __init__(
        self,
        model: str | PreTrainedModel | None,
        config: OPSDCConfig,
        train_dataset: Sequence[dict[str, Any]] | None = None,
        eval_dataset: Sequence[dict[str, Any]] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: Sequence[TrainerCallback] | None = None,
    ) -> None:
        self.started, self.out_of_memory = time.perf_counter(), 0
        self.ranks = ranks = talk.join(config.distributed)
        self.events = Callbacks(config, callbacks or [])
        problems = read_problems(config, train_dataset, eval_dataset)  # Before a model is loaded.
        module, self.tokenizer, settings = receive_model(model, config.model, processing_class)
        self.config = config = contents.dated(replace(config, model=settings), ranks)
        sets = scored_sets(config, self.tokenizer, problems)
        self.problems, self.held_out = sets.training, sets.held_out
        other = load_other(config, module, self.tokenizer)
        made_of = contents.read_contents(module, other, self.tokenizer, sets, config, ranks)
        torch.manual_seed(config.seed)  # An adapter starts from random numbers.
        self.model = prepare_model(module, config.model).train()
        shard.shard_(self.model, config, ranks, other and other.module)
        checks.before_sampling(self.model, sets, config, ranks)
        self.teacher = Teacher(self.model, config.teacher, other)
        self.optimizer, self.learning_rate = make_optimizer(self.model, config)
        prompt = self.problems[0].prompts.student_ids
        self.sampler = start_sampler(config, self.model, self.tokenizer, prompt, ranks)
        self.arms = Arms(sets, self.sampler, self.tokenizer, config, ranks)
        self.best = BestStep(self.arms, self.model, config, ranks)
        self.dial = Dial(config.teacher)
        self.gate = Gate(config.teacher, self.arms, self.model, self.teacher, self.optimizer)
        self.state = RunState(
            self.model, self.teacher, self.optimizer, config, made_of, ranks, self.dial, self.gate
        )

    def train(self) -> dict[str, Any]:
        """Run training, or go on with it, and return the contents of summary.json.

        SIGTERM or SIGINT ends it early: the last completed step is saved, the unfinished one is
        dropped and later replayed exactly, and {"stopped": signal, "steps": completed} is returned.
        """
        with stop.on_signal(), self.ranks.listening(), self.state.claimed():
            try:
                return self._train()
            except stop.Stopped as signal:
                saved = self.state.save_last()
                print(f"stopped by {signal}: {saved}; the same command goes on", flush=True)
                return {"stopped": str(signal), "steps": self.state.step}
            except OutOfMemoryError as error:
                raise OutOfMemoryError(f"{error}; {self.state.save_last()}. {ADVICE}") from error

    def _train(self) -> dict[str, Any]:
        config, state, teacher, sampler = self.config, self.state, self.teacher, self.sampler
        layout, verdict = self._begin()
        while state.step < config.train.steps and verdict is None:
            step, began = state.step + 1, time.perf_counter()

            # y ~ student: the plain prompt, the weights of this moment.
            problems = self.problems.batch(step, config.rollout.prompts_per_step)
            rollouts = sample_step(sampler, problems, config.rollout, step)
            rollouts = mark_right(rollouts, self.tokenizer, config, self.ranks)
            pairs = rollouts.pairs(config, self.dial.value)
            sampled = time.perf_counter()

            # KL(student‖teacher) at every token of y, the teacher told to be concise; one update.
            self.optimizer.param_groups[0]["lr"] = self.learning_rate(step)
            # Dropout, where a model has any, follows from (seed, step): nothing to save.
            torch.manual_seed((config.seed << 32) + step)
            tokens = sum(len(p.response_ids) for p in pairs)
            with tqdm(total=tokens, desc=f"step {step} update", leave=False, delay=2) as bar:
                result = update(
                    self.model, teacher, pairs, self.optimizer, layout, config,
                    ranks=self.ranks,
                    sampled_finite=rollouts.is_finite,
                    on_tokens=bar.update, number=step,
                    exact_value=is_due(config.loss.exact_value_every, step),
                )  # fmt: skip
            state.give_up_if_sick(step, pairs, result)

            # The sampler gets each update, the teacher every M-th. From here to the end of
            # `commit` nothing may be left: the parameters have changed.
            pushed = sampler.push(self.model, step)
            self.gate.move_teacher(step, [*self.record.losses, result.loss])
            self.out_of_memory += result.layout != layout
            layout = result.layout
            seconds = {"rollout": sampled - began, "step": time.perf_counter() - began}
            self.commit(step, rollouts, result, rollouts.perf(seconds | result.seconds, pushed))
            verdict = self._between_steps(step)
        return self._end(verdict)

    def commit(
        self, step: int, rollouts: StepRollouts, result: UpdateResult, perf: dict[str, float]
    ) -> None:
        """Write the record of a finished step: its row and its responses. The step then counts."""
        row = {
            "step": step,
            **result.measures(),
            **rollouts.measures(self.config),
            **self.dial.after_step(rollouts.lengths()),
            "lr": self.optimizer.param_groups[0]["lr"],
            "weights_version": step,
            "teacher_version": self.teacher.version,
            "skipped_steps": self.state.skipped_steps + result.is_sick,
            **perf,
            "perf/out_of_memory": self.out_of_memory,
        }
        looks = rollouts.divergence_rows(step, self.tokenizer, self.config, result)
        row = self.record.commit(row, rollouts.rows(step, self.tokenizer), looks)
        self.state.complete(step, result.is_sick)
        self.events.emit("on_log", step=step, logs=row)

    def _begin(self) -> tuple[Layout, str | None]:
        """Resume, run the checks and answer as the base; return the layout and guards' verdict."""
        config, state, ranks = self.config, self.state, self.ranks
        state.resume()
        self.sampler.push(self.model, state.step)
        layout = checks.before_first_step(
            self.model, self.teacher, self.sampler, self.problems, self.tokenizer, config,
            step=state.step, ranks=ranks,
        )  # fmt: skip
        self.events.begin(self.model, self.tokenizer, self.optimizer, state.step, ranks)
        # Nothing is written before all checks have passed.
        self.record = RunRecord(config, after_step=state.step, ranks=ranks)
        self.arms.begin(state.step, self.record, self.events.emit)
        self.dial.begin(
            state.step, lambda: sample_lengths(self.sampler, self.problems, config.rollout)
        )
        verdict = guard.apply(guard.check_steps(self.record.history, config.guard))
        # The run before may have ended between a step and its evaluation.
        verdict = verdict or self.arms.judge(state.step, again=False)
        return layout, verdict

    def _between_steps(self, step: int) -> str | None:
        """Judge the step, save and evaluate where it is due; return the reason to end, or None."""
        config, events = self.config, self.events
        verdict = guard.apply(guard.check_steps(self.record.history, config.guard))
        asked = self.ranks.any(events.emit("on_step_end", step=step))
        if verdict or asked or step == config.train.steps:
            return verdict or "end"
        if is_due(config.train.save_every, step):
            self.state.save()
            events.emit("on_save", step=step)
        verdict = self.arms.judge(step)
        self.best.consider(step)
        return verdict

    def _end(self, verdict: str | None) -> dict[str, Any]:
        """Write the trained model, its answers, summary, picture and page; return the summary."""
        state, output_dir = self.state, Path(self.config.output_dir)
        if verdict == "rollback":
            state.roll_back(self.record)
            self.sampler.push(self.model, state.step)
        state.save()
        for event in ("on_save", "on_train_end"):
            self.events.emit(event, step=state.step)
        kept = self.best.restore(state.step)
        self.save_model(output_dir / "model")
        self.arms.finish(state.step)
        facts: dict[str, Any] = {"steps": state.step, "kept_step": kept, "ranks": self.ranks.size}
        facts["seconds"] = round(time.perf_counter() - self.started, 1)
        facts["model"] = describe(self.model)
        return self.ranks.on_first_rank(lambda: finish_run(output_dir, self.config, facts))

    def evaluate(self, name: str, *, arm: str = "student") -> list[Answer]:
        """Answer the held-out problems with the model as it is, see `Arms.answer`."""
        return self.arms.answer(name, arm=arm)

    def save_model(self, folder: str | Path) -> None:
        """Write an ordinary Hugging Face folder (with LoRA the adapter's), tokenizer included."""
        write_model(self.model, self.tokenizer, Path(folder), self.ranks)
