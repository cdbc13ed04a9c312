"""The loop of on-policy self-distillation (OPSDC / CRISP, arXiv 2603.05433), top to bottom.

Left out on purpose, because the method has none of it: no reward, no advantage, no importance
ratio, no clip, no score-function term for how a response was sampled. Prefixes are constants; the
loss is the divergence at every response token.
"""

from __future__ import annotations

import math
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, get_scheduler

from opsdc import checks as preflight
from opsdc.config import LossConfig, OPSDCConfig, ignored_settings
from opsdc.data.prompted import Prompted, prompted_sets
from opsdc.debug import replay
from opsdc.errors import ConfigError, OutOfMemoryError, TrainingError
from opsdc.eval import arms as evaluate
from opsdc.eval import plots
from opsdc.method.batch import Pair
from opsdc.method.teacher import Teacher
from opsdc.method.update import ADVICE, UpdateResult, update
from opsdc.models.load import decode, describe, load_model, load_tokenizer, prepare_model
from opsdc.progress import Progress
from opsdc.ranks import shard as sharding
from opsdc.ranks import stop
from opsdc.ranks import talk as distributed
from opsdc.record import checkpoint, guard
from opsdc.record.lines import (
    Callbacks,
    Lines,
    finite,
    peak_mib,
    read_lines,
    write_json,
    write_text,
    writing,
)
from opsdc.record.versions import versions
from opsdc.rollout.base import Request, Rollout, SamplingParams, check_batch
from opsdc.rollout.start import start_sampler

# Steps in a row whose loss or gradient is not finite before a run gives up.
MAX_SKIPPED = 3


class OPSDCTrainer:
    """Trains a model to answer as it would if it had been told to be concise.

    Args:
        model: a transformers causal language model, a folder or Hub name, or None for the
            config's `model.name_or_path`.
        config: everything else; see `OPSDCConfig`.
        train_dataset, eval_dataset: rows (a list of mappings or a `datasets.Dataset`) instead of
            the config's `data.source`; columns as in `opsdc.data.sources`.
        processing_class: the tokenizer, when `model` is given as a module.
        callbacks: `transformers.TrainerCallback`s; `on_log` receives each step's record.

    Raises ConfigError, DataError or ModelError for what cannot work, before the first step.
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
        self.started = time.perf_counter()
        self.config = config
        self.output_dir = Path(config.output_dir)
        self.ranks = distributed.join(config.distributed)
        if model is None or isinstance(model, str):
            name = model or config.model.name_or_path
            self.config = config = replace(config, model=replace(config.model, name_or_path=name))
            self.tokenizer = processing_class or load_tokenizer(config.model)
            module = load_model(config.model)
        elif processing_class is None:
            raise ConfigError("processing_class must be the tokenizer when model is a module")
        else:
            self.tokenizer, module = processing_class, model
        self.problems, self.held_out = prompted_sets(
            config, self.tokenizer, train_dataset, eval_dataset
        )
        # An adapter starts from random numbers.
        torch.manual_seed(config.seed)
        self.model = prepare_model(module, config.model)
        sharding.place(self.model, config, self.ranks)
        self.model.train()
        self.teacher = Teacher(self.model, config.teacher)
        self.optimizer = torch.optim.AdamW(
            [p for p in self.model.parameters() if p.requires_grad],
            lr=config.optim.lr,
            betas=(config.optim.betas[0], config.optim.betas[1]),
            weight_decay=config.optim.weight_decay,
        )
        self.learning_rate = _schedule(self.optimizer, config)
        self.sampler = start_sampler(
            config, self.model, self.tokenizer, self.problems[0].prompts.student_ids, self.ranks
        )
        self.callbacks = list(callbacks or [])
        self.step = 0
        """the last completed step: whose state model, optimizer and teacher are in"""
        self.skipped_steps = 0
        self.skipped_in_a_row = 0
        self._on_disk: Path | None = None

    def train(self) -> dict[str, Any]:
        """Run (or go on with) training; returns what summary.json holds.

        SIGTERM or SIGINT ends it early, with the last completed step saved and the unfinished one
        dropped, which then replays exactly; returned is {"stopped": signal, "steps": completed}.
        """
        with stop.on_signal(), self.ranks.listening():
            try:
                return self._train()
            except stop.Stopped as signal:
                print(f"stopped by {signal}: {self._keep()}; the same command goes on", flush=True)
                return {"stopped": str(signal), "steps": self.step}
            except OutOfMemoryError as error:
                raise OutOfMemoryError(f"{error}; {self._keep()}. {ADVICE}") from error

    def _train(self) -> dict[str, Any]:
        config, output_dir, ranks = self.config, self.output_dir, self.ranks
        # Asked to stop while the model was loaded; verifying a checkpoint takes long as well.
        ranks.check_stop()
        self._resume()
        ranks.check_stop()
        step = self.step
        ranks.alone(self._describe_run)
        ranks.each(self._check_shared_folder)
        metrics = Lines(output_dir / "metrics.jsonl", after_step=step, writes=ranks.first)
        responses = Lines(output_dir / "rollouts.jsonl", after_step=step, writes=ranks.first)
        history = ranks.from_first(read_lines(output_dir / "metrics.jsonl"))
        self.sampler.push(self.model, step)
        layout = self._preflight(step)
        events = Callbacks(
            config, self.callbacks, self.model, self.tokenizer, self.optimizer, first=ranks.first
        )
        self._evaluate_base(step)
        verdict = self._heed(guard.check_steps(history, config.guard))
        # The run before may have ended between a step and its evaluation.
        verdict = verdict or self._evaluate_student(step, events, again=False)
        events.emit("on_train_begin", step=step)
        out_of_memory = 0
        while step < config.train.steps and verdict is None:
            step += 1
            began = time.perf_counter()
            batch = self.problems.batch(step, config.rollout.prompts_per_step)
            rollouts = self._generate(batch, step)
            generated = time.perf_counter()
            self.optimizer.param_groups[0]["lr"] = self.learning_rate(step)
            # Dropout, where a model has any, follows from (seed, step): nothing to save.
            torch.manual_seed((config.seed << 32) + step)
            pairs = _pairs(batch, rollouts, config)
            bar = Progress(
                f"step {step} update",
                total=sum(len(p.response_ids) for p in pairs),
                unit="token",
            )
            result = update(
                self.model,
                self.teacher,
                pairs,
                self.optimizer,
                layout,
                config,
                ranks=ranks,
                sampled_finite=all(r.is_finite for r in rollouts),
                on_tokens=bar.advance,
                exact_value=_exact_value_due(config.loss, step),
            )
            bar.close()
            if result.skipped and self.skipped_in_a_row == MAX_SKIPPED - 1:
                self._give_up(step, pairs, result)
            # From here to `self.step = step` nothing may be left: the parameters have changed.
            self.skipped_in_a_row = self.skipped_in_a_row + 1 if result.skipped else 0
            self.skipped_steps += result.skipped
            out_of_memory += result.layout != layout
            layout = result.layout
            losses = [*(row["loss_nats"] for row in history), result.loss]
            refreshed = self.teacher.after_update(step, losses)
            pushed = self.sampler.push(self.model, step)

            record = _record(step, rollouts, result, self)
            seconds = {"rollout": generated - began, **result.seconds}
            record |= {f"perf/seconds_{k}": round(v, 3) for k, v in seconds.items()}
            sampled = sum(len(r.response_ids) for r in rollouts)
            record["perf/seconds_step"] = round(time.perf_counter() - began, 3)
            record["perf/tokens_per_second"] = round(sampled / max(seconds["rollout"], 1e-9), 1)
            record |= {f"perf/{k}": v for k, v in pushed.items()}
            record["perf/peak_mib"] = round(peak_mib(), 1)
            record["perf/out_of_memory"] = out_of_memory
            # One record for all, so that guards decide alike.
            record = ranks.from_first(record)
            responses.write(*(self._response_row(step, rollout) for rollout in rollouts))
            metrics.write(record)
            history.append(record)
            self.step = step
            if step % config.log.every == 0 or step == config.train.steps:
                print(_line(record, config.train.steps, refreshed), flush=True)
            events.emit("on_log", step=step, logs=record)
            verdict = self._heed(guard.check_steps(history, config.guard))
            ended = ranks.any(events.emit("on_step_end", step=step)) or step == config.train.steps
            if verdict is None and not ended:
                if config.train.save_every and step % config.train.save_every == 0:
                    self._save()
                    events.emit("on_save", step=step)
                verdict = self._evaluate_student(step, events)
            if ended:
                break
        if verdict == "rollback":
            self._roll_back(history)
        self._save()
        events.emit("on_save", step=self.step)
        events.emit("on_train_end", step=self.step)
        return self._finish()

    def evaluate(self, name: str, *, arm: str = "student") -> list[evaluate.Answer]:
        """Answer the held-out problems with the model as it is, and keep the answers.

        arm "student" uses the plain prompt, "teacher" the one with the instruction.
        """
        answers = evaluate.answer(
            self.sampler, self.tokenizer, self._eval_problems(), self.config, arm=arm, label=name
        )
        path = self.output_dir / "eval" / f"{name}.jsonl"
        self.ranks.alone(lambda: evaluate.write_answers(path, answers))
        print(f"eval {name}: {evaluate.one_line(answers)}", flush=True)
        return answers

    def save_model(self, folder: str | Path) -> None:
        """Write an ordinary Hugging Face folder (with LoRA the adapter's), tokenizer included."""
        with writing(Path(folder)):
            sharding.save_weights(self.model, folder, self.ranks)
            if self.ranks.first:
                self.tokenizer.save_pretrained(str(folder))

    def _generate(self, batch: Sequence[Prompted], step: int) -> list[Rollout]:
        rollout = self.config.rollout
        requests = [
            Request(key=f"train/{step}/{p.problem.id}/{i}", prompt_ids=p.prompts.student_ids)
            for p in batch
            for i in range(rollout.samples_per_prompt)
        ]
        params = SamplingParams(
            max_new_tokens=rollout.max_new_tokens,
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            batch_size=rollout.batch_size,
        )
        rollouts = self.sampler.generate(requests, params, label=f"step {step} rollouts")
        check_batch(requests, rollouts, step=step, max_staleness=rollout.max_staleness)
        if sick := [r.key for r in rollouts if not r.is_finite]:
            shown = f"{sick[0]}'" + (f" and {len(sick) - 1} more" if sick[1:] else "")
            print(f"sampled from logits that are not finite: '{shown}", file=sys.stderr)
        return rollouts

    def _preflight(self, step: int) -> preflight.Layout:
        pad = self.tokenizer.pad_token_id
        sample = [
            # The prompt's own tokens stand in for a response: no sampling before the checks.
            Pair(
                student_prompt_ids=p.prompts.student_ids,
                teacher_prompt_ids=p.prompts.teacher_ids,
                response_ids=p.prompts.student_ids[:8],
            )
            for p in (self.problems[i] for i in range(min(3, len(self.problems))))
        ]
        layout, lines = preflight.run(
            self.model,
            self.teacher,
            self.sampler,
            sample,
            self.config,
            pad_id=0 if pad is None else pad,
            teacher_is_student=self.teacher.equals_student(step),
            ranks=self.ranks,
        )
        for line in [*ignored_settings(self.config), *lines]:
            print(line, flush=True)
        return layout

    def _evaluate_base(self, step: int) -> None:
        """Base and prompt-only answers, before step 1: while the weights still are the base's."""
        if self._eval_problems() and step == 0:
            if self.ranks.first:
                shutil.rmtree(self.output_dir / "eval", ignore_errors=True)
            self.evaluate("base")
            self.evaluate("prompt_only", arm="teacher")

    def _evaluate_student(self, step: int, events: Callbacks, again: bool = True) -> str | None:
        """Held-out answers where `eval.every` asks for them; what `guard` says of them."""
        every = self.config.eval.every
        due = every and step % every == 0 and 0 < step < self.config.train.steps
        if not (due and self._eval_problems()):
            return None
        name, folder = f"step-{step:06d}", self.output_dir / "eval"
        if again or not self.ranks.alone((folder / f"{name}.jsonl").is_file):
            found = self.evaluate(name)
            events.emit("on_evaluate", step=step, metrics=evaluate.headline(found))

        def heed() -> str | None:
            base, now = (
                evaluate.headline(evaluate.read_answers(folder / f"{x}.jsonl"))
                for x in ("base", name)
            )
            return self._heed(guard.check_answers(base, now, self.config.guard))

        return self.ranks.alone(heed)

    def _heed(self, findings: Sequence[guard.Finding]) -> str | None:
        """Print findings; "stop" or "rollback" where one of them ends the run."""
        for finding in findings:
            print(f"guard, {finding.action}: {finding.text}", file=sys.stderr, flush=True)
        actions = {finding.action for finding in findings}
        return next((action for action in ("rollback", "stop") if action in actions), None)

    def _roll_back(self, history: Sequence[dict[str, Any]]) -> None:
        """Go back to the newest checkpoint at which no guard asked for it, and drop later ones."""
        root = self.output_dir / "checkpoints"

        def healthy() -> str | None:
            for folder in checkpoint.listing(root):
                if checkpoint.verify(folder) is not None:
                    continue
                step = checkpoint.read_state(folder)["step"]
                sick = guard.check_steps(history[:step], self.config.guard)
                if step < self.step and not any(f.action == "rollback" for f in sick):
                    return str(folder)
            return None

        found = self.ranks.alone(healthy)
        if found is None:
            print(
                "no good checkpoint is left to roll back to: the run ends as it is; lower "
                "train.save_every or raise train.keep",
                file=sys.stderr,
            )
            return
        self._restore(Path(found))
        self.ranks.alone(lambda: checkpoint.drop_later(root, Path(found)))
        for name in ("metrics.jsonl", "rollouts.jsonl"):
            Lines(self.output_dir / name, after_step=self.step, writes=self.ranks.first)
        print(f"rolled back to {found}", file=sys.stderr, flush=True)

    def _eval_problems(self) -> list[Prompted]:
        count = self.config.eval.problems
        size = len(self.held_out) if count is None else count
        return [self.held_out[i] for i in range(min(size, len(self.held_out)))]

    def _response_row(self, step: int, rollout: Rollout) -> dict[str, Any]:
        return {
            "step": step,
            "key": rollout.key,
            "prompt_ids": list(rollout.prompt_ids),
            "response_ids": list(rollout.response_ids),
            "finished": rollout.finished,
            "weights_version": rollout.weights_version,
            "text": decode(self.tokenizer, rollout.response_ids),
        }

    def _save(self) -> None:
        """Save the last completed step, if it is not on disk; raises CheckpointError."""
        root = self.output_dir / "checkpoints"
        folder = checkpoint.path_of(root, self.step)
        if folder == self._on_disk:
            return
        state = {
            "teacher_version": self.teacher.version,
            "weights_version": self.step,
            "skipped_steps": self.skipped_steps,
            "skipped_in_a_row": self.skipped_in_a_row,
            "model": describe(self.model),
            "config": self.config.to_dict(),
        }
        checkpoint.save(
            root,
            self.step,
            self.model,
            self.teacher,
            self.optimizer,
            state,
            keep=self.config.train.keep,
            ranks=self.ranks,
        )
        self._on_disk = folder

    def _give_up(self, step: int, pairs: Sequence[Pair], result: UpdateResult) -> NoReturn:
        """Leave the state before this step and its batch behind, and say how to look at them."""
        batch = self.output_dir / f"sick-step-{step:06d}.json"
        if self.step:
            self._save()
        self.ranks.alone(lambda: replay.dump(batch, step, pairs, self.config))
        raise TrainingError(
            f"loss or gradient was not finite in {MAX_SKIPPED} steps in a row (last: step {step}, "
            f"loss {result.loss}, gradient norm {result.grad_norm}); parameters are those before "
            f"them. See where with: opsdc inspect --batch {batch}. Lower optim.lr, or use "
            "model.dtype float32; the same command then goes on before this step"
        )

    def _keep(self) -> str:
        """Save the last completed step; what there is to say of it."""
        if self.step:
            self._save()
        return f"step {self.step} is saved" if self.step else "no step was complete"

    def _describe_run(self) -> None:
        with writing(self.output_dir):
            self.output_dir.mkdir(parents=True, exist_ok=True)
        write_text(self.output_dir / "config.yaml", self.config.to_yaml())

    def _check_shared_folder(self) -> None:
        if not (self.output_dir / "config.yaml").is_file():
            raise ConfigError(
                f"output_dir {self.output_dir} is not the folder that rank 0 sees under this name; "
                "with several nodes it must lie on storage that all of them share"
            )

    def _resume(self) -> None:
        """Load what `train.resume` names; the first rank chooses for all."""
        found = self.ranks.alone(self._checkpoint_to_resume)
        if found is None:
            return
        state = self._restore(Path(found))
        print(f"resuming after step {self.step} from {found}", flush=True)
        changed = _changes(state["config"], self.config.to_dict())
        # Other software, processor or threads may round otherwise: no promise of the same bits.
        changed += _changes(state["versions"], versions())
        for line in changed:
            print(f"  changed since that checkpoint: {line}", file=sys.stderr)

    def _checkpoint_to_resume(self) -> str | None:
        root, wanted = self.output_dir / "checkpoints", self.config.train.resume
        checkpoint.clear_unfinished(root)
        if wanted == "none":
            if checkpoint.listing(root):
                raise ConfigError(
                    f"output_dir {self.output_dir} holds the checkpoints of a run, which "
                    "train.resume none would overwrite; name another output_dir or remove it"
                )
            return None
        folder = checkpoint.newest_good(root) if wanted == "auto" else Path(wanted)
        if folder is None:
            return None
        problem = checkpoint.verify(folder)
        if problem:
            raise ConfigError(f"train.resume {wanted}: not a good checkpoint: {problem}")
        return str(folder)

    def _restore(self, folder: Path) -> dict[str, Any]:
        state = self.ranks.each(
            lambda: checkpoint.restore(folder, self.model, self.teacher, self.optimizer)
        )[0]
        self.step, self.skipped_steps = state["step"], state["skipped_steps"]
        self.skipped_in_a_row = state["skipped_in_a_row"]
        self._on_disk = folder
        self.sampler.push(self.model, self.step)
        return state

    def _finish(self) -> dict[str, Any]:
        self.save_model(self.output_dir / "model")
        if self._eval_problems():
            self.evaluate("trained")
        return self.ranks.alone(self._summarize)

    def _summarize(self) -> dict[str, Any]:
        summary = {
            "steps": self.step,
            "seconds": round(time.perf_counter() - self.started, 1),
            "model": describe(self.model),
            "ranks": self.ranks.size,
            "versions": versions(),
            **evaluate.summary_of_run(self.output_dir, self.config),
        }
        write_json(self.output_dir / "summary.json", summary)
        plots.plot_run(self.output_dir)
        return summary


def _pairs(
    batch: Sequence[Prompted], rollouts: Sequence[Rollout], config: OPSDCConfig
) -> list[Pair]:
    repeated = [p for p in batch for _ in range(config.rollout.samples_per_prompt)]
    return [
        Pair(
            student_prompt_ids=p.prompts.student_ids,
            teacher_prompt_ids=p.prompts.teacher_ids,
            response_ids=r.response_ids[: config.train.max_train_tokens],
        )
        for p, r in zip(repeated, rollouts, strict=True)
    ]


def _schedule(optimizer: torch.optim.Optimizer, config: OPSDCConfig) -> Callable[[int], float]:
    """The learning rate as a pure function of the step, so that there is no scheduler to save."""
    name = config.optim.schedule
    scheduler = get_scheduler(
        "constant_with_warmup" if name == "constant" else name,
        optimizer,
        num_warmup_steps=config.optim.warmup_steps,
        num_training_steps=config.train.steps,
    )
    factor = scheduler.lr_lambdas[0]
    return lambda step: config.optim.lr * factor(step - 1)


def _exact_value_due(loss: LossConfig, step: int) -> bool:
    every = loss.exact_value_every
    return every > 0 and step % every == 0


def _record(
    step: int,
    rollouts: Sequence[Rollout],
    result: UpdateResult,
    trainer: OPSDCTrainer,
) -> dict[str, Any]:
    lengths = [len(r.response_ids) for r in rollouts if r.response_ids]
    limit = trainer.config.train.max_train_tokens
    cut = 0 if limit is None else sum(max(n - limit, 0) for n in lengths)
    kl = result.divergence
    quantiles = (
        torch.quantile(kl.double(), torch.tensor([0.5, 0.9, 0.99], dtype=torch.float64)).tolist()
        if len(kl)
        else [math.nan] * 3
    )
    return {
        "step": step,
        "loss_nats": finite(result.loss),
        "kl_p50": finite(quantiles[0]),
        "kl_p90": finite(quantiles[1]),
        "kl_p99": finite(quantiles[2]),
        "student_entropy": finite(result.student_entropy),
        "teacher_entropy": finite(result.teacher_entropy),
        "agreement": finite(result.agreement),
        **{name: finite(value) for name, value in result.kept_tokens.items()},
        **{name: finite(value) for name, value in result.skipped_columns.items()},
        "response_tokens_mean": sum(lengths) / len(lengths) if lengths else None,
        "response_tokens_max": max(lengths, default=0),
        "truncated_share": sum(not r.finished for r in rollouts) / len(rollouts),
        "cut_share": cut / max(sum(lengths), 1),
        "empty_share": 1 - len(lengths) / len(rollouts),
        "repeated_share": sum(guard.repeated_share(r.response_ids) for r in rollouts)
        / len(rollouts),
        "grad_norm": finite(result.grad_norm),
        "lr": trainer.optimizer.param_groups[0]["lr"],
        "weights_version": step,
        "teacher_version": trainer.teacher.version,
        "skipped_steps": trainer.skipped_steps,
    }


def _line(record: dict[str, Any], steps: int, refreshed: bool) -> str:
    def show(key: str, spec: str) -> str:
        return "–" if record[key] is None else format(record[key], spec)

    return (
        f"step {record['step']:>{len(str(steps))}}/{steps}"
        f"  loss {show('loss_nats', '.4f')} nats/token"
        f"  entropy {show('student_entropy', '.2f')}"
        f"  response {show('response_tokens_mean', '.1f')} tokens"
        f"  truncated {100 * record['truncated_share']:.0f} %"
        f"  grad {show('grad_norm', '.2f')}"
        f"  {record['perf/seconds_step']:.0f} s" + ("  teacher refreshed" if refreshed else "")
    )


def _changes(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Settings that decide the result and are not what the checkpoint was made with."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            line
            for key in {**old, **new}
            if prefix + key not in ("output_dir", "log", "train.resume", "train.keep")
            for line in _changes(old.get(key), new.get(key), f"{prefix}{key}.")
        ]
    return [] if old == new else [f"{prefix.rstrip('.')}: {old!r} → {new!r}"]
