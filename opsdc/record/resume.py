"""The state that steps change: how it is saved, resumed, rolled back, or given up.

state = RunState(...)
with state.claimed():                   # no other run may use the folder
    state.resume()                      # from the checkpoint that `train.resume` names
    state.complete(step, skipped)       # after each step
    state.save()                        # now and then; at the end; when a signal asks to stop
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from opsdc.config.settings import OPSDCConfig
from opsdc.errors import ConfigError, TrainingError
from opsdc.method.batch import Pair
from opsdc.method.measures import UpdateResult
from opsdc.method.teacher import Teacher
from opsdc.models.load import describe
from opsdc.ranks.talk import Ranks
from opsdc.record import checkpoint, guard
from opsdc.record.contents import changes
from opsdc.record.folder import claimed
from opsdc.record.lines import RunRecord, write_json
from opsdc.record.versions import versions

MAX_SKIPPED = 3
"""Number of skipped steps in a row (loss or gradient not finite) at which a run gives up."""

_NO_EFFECT = ("output_dir", "log", "train.resume", "train.keep")
"""Settings that do not change the results of a run."""

_NAMES = (
    *("model.name_or_path", "data.source", "prompt.instruction"),
    *("teacher.against", "teacher.model"),
)
"""Settings that name what is compared by its contents."""


class Stateful(Protocol):
    """A part of a run whose state, plain JSON, is saved in every checkpoint."""

    name: str
    """Key of the state in the checkpoint."""

    def state(self) -> dict[str, Any]:
        """Return what `load` needs to go on."""

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` returned."""


class RunState:
    """Model, teacher, optimizer, counters and parts of a run, as of its last completed step."""

    def __init__(
        self,
        model: Any,
        teacher: Teacher,
        optimizer: torch.optim.Optimizer,
        config: OPSDCConfig,
        contents: dict[str, Any],
        ranks: Ranks,
        *parts: Stateful,
    ) -> None:
        self.step = 0
        """The last completed step, 0 before the first."""
        self.skipped_steps = 0
        """Number of steps so far whose loss or gradient was not finite."""
        self._skipped_in_a_row = 0
        self._model, self._teacher, self._optimizer = model, teacher, optimizer
        self._config, self._contents = config, contents
        self._ranks, self._parts = ranks, parts
        self._folder = Path(config.output_dir)
        self._checkpoints = self._folder / "checkpoints"
        self._saved: Path | None = None

    @contextlib.contextmanager
    def claimed(self) -> Iterator[None]:
        """Hold the run's folder within the block, see `folder.claimed`."""
        with contextlib.ExitStack() as held:
            hold = claimed(self._folder)
            self._ranks.on_first_rank(lambda: held.enter_context(hold))
            yield

    def complete(self, step: int, skipped: bool) -> None:
        """Count a step as done, once its record is on disk."""
        self.step = step
        self.skipped_steps += skipped
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if skipped else 0

    def save(self) -> None:
        """Save the last completed step, unless it is on disk already.

        Raises CheckpointError where it cannot be written.
        """
        folder = checkpoint.path_of(self._checkpoints, self.step)
        if folder == self._saved:
            return
        state = {
            "teacher_version": self._teacher.version,
            "weights_version": self.step,
            "skipped_steps": self.skipped_steps,
            "skipped_in_a_row": self._skipped_in_a_row,
            "model": describe(self._model),
            "config": self._config.to_dict(),
            "contents": self._contents,
            **{part.name: part.state() for part in self._parts},
        }
        checkpoint.save(
            self._checkpoints,
            self.step,
            self._model,
            self._teacher,
            self._optimizer,
            state,
            keep=self._config.train.keep,
            ranks=self._ranks,
        )
        self._saved = folder

    def save_last(self) -> str:
        """Save the last completed step, and return a clause that says which one it is."""
        if self.step:
            self.save()
        return f"step {self.step} is saved" if self.step else "no step was complete"

    def resume(self) -> None:
        """Load the checkpoint that `train.resume` names; the first rank chooses for all.

        Raises ConfigError for a checkpoint that is not good, CheckpointError for one of another
        model or where all are damaged.
        """
        # Loading a model and verifying a checkpoint take long: a stop may have been asked for.
        self._ranks.check_stop()
        folder = self._ranks.on_first_rank(self._checkpoint_to_resume)
        self._ranks.check_stop()
        if folder is None:
            return
        state = self._restore(Path(folder))
        print(f"resuming after step {self.step} from {folder}", flush=True)
        changed = changes(state["config"], self._config.to_dict(), but=_NO_EFFECT)
        changed += changes(state.get("contents", self._contents), self._contents)
        # Other software, processors or thread counts may round otherwise: the bits may differ.
        changed += changes(state["versions"], versions())
        for line in changed:
            print(f"  changed since that checkpoint: {line}", file=sys.stderr)

    def roll_back(self, record: RunRecord) -> None:
        """Load the newest checkpoint at which no guard asked for a rollback; drop the later ones.

        Without such a checkpoint the state stays as it is, and a line on stderr says so.
        """
        root = self._checkpoints

        def newest_healthy() -> str | None:
            for folder in checkpoint.listing(root):
                if checkpoint.verify(folder) is not None:
                    continue
                step = checkpoint.read_state(folder)["step"]
                findings = guard.check_steps(record.history[:step], self._config.guard)
                if step < self.step and not any(f.action == "rollback" for f in findings):
                    return str(folder)
            return None

        folder = self._ranks.on_first_rank(newest_healthy)
        if folder is None:
            print(
                "no good checkpoint is left to roll back to: the run ends as it is; lower "
                "train.save_every or raise train.keep",
                file=sys.stderr,
            )
            return
        self._restore(Path(folder))
        self._ranks.on_first_rank(lambda: checkpoint.drop_later(root, Path(folder)))
        record.cut(self.step)
        print(f"rolled back to {folder}", file=sys.stderr, flush=True)

    def give_up_if_sick(self, step: int, pairs: Sequence[Pair], result: UpdateResult) -> None:
        """Raise TrainingError at the last of `MAX_SKIPPED` skipped steps in a row.

        Leaves a checkpoint from before the step, and its batch for `opsdc inspect --batch`.
        """
        if not result.is_sick or self._skipped_in_a_row < MAX_SKIPPED - 1:
            return
        batch = self._folder / f"sick-step-{step:06d}.json"
        if self.step:
            self.save()
        self._ranks.on_first_rank(lambda: write_batch(batch, step, pairs, self._config))
        raise TrainingError(
            f"loss or gradient was not finite in {MAX_SKIPPED} steps in a row (last: step {step}, "
            f"loss {result.loss}, gradient norm {result.grad_norm}); parameters are those before "
            f"them. See where with: opsdc inspect --batch {batch}. Lower optim.lr, or use "
            "model.dtype float32; the same command then goes on before this step"
        )

    def _checkpoint_to_resume(self) -> str | None:
        """Choose the checkpoint folder by `train.resume`; None where the run begins anew."""
        root, wanted = self._checkpoints, self._config.train.resume
        checkpoint.clear_unfinished(root)
        if wanted == "none":
            if checkpoint.listing(root):
                raise ConfigError(
                    f"output_dir {self._folder} holds the checkpoints of a run, which "
                    "train.resume none would overwrite; name another output_dir or remove it"
                )
            return None
        folder = checkpoint.newest_good(root) if wanted == "auto" else Path(wanted)
        if folder is None:
            return None
        problem = checkpoint.verify(folder)
        if problem:
            raise ConfigError(f"train.resume {wanted}: not a good checkpoint: {problem}")
        self._check_same_run(folder)
        return str(folder)

    def _check_same_run(self, folder: Path) -> None:
        """Raise ConfigError for the checkpoint of another run than this.

        A run may go on with other settings, not by itself with other contents, and never with
        another architecture. One that is finished has nothing left to do with other settings.
        """
        state, remedy = checkpoint.read_state(folder), "restore that, or name another output_dir"
        changed = changes(state.get("contents", self._contents), self._contents)
        for line in changed:
            if line.startswith("model.architecture:"):
                raise ConfigError(f"{folder} is of another model ({line}): {remedy}")
        config = self._config.to_dict()
        settings = changes(state["config"], config, but=(*_NO_EFFECT, *_NAMES, "train.steps"))
        if changed and self._config.train.resume == "auto":
            raise ConfigError(
                f"{folder} is of a run with other contents ({'; '.join(changed + settings)}): "
                f"{remedy}, or go on all the same with train.resume {folder}"
            )
        steps = max(state["config"]["train"]["steps"], self._config.train.steps)
        if settings and state["step"] >= steps:
            raise ConfigError(
                f"{folder} is the end of a run with other settings ({'; '.join(settings)}): "
                f"{remedy}, or raise train.steps to go on"
            )

    def _restore(self, folder: Path) -> dict[str, Any]:
        """Load a checkpoint and its counters on all ranks, and return its state."""
        state = self._ranks.on_each_rank(
            lambda: checkpoint.restore(folder, self._model, self._teacher, self._optimizer)
        )[0]
        self.step, self.skipped_steps = state["step"], state["skipped_steps"]
        self._skipped_in_a_row = state["skipped_in_a_row"]
        self._saved = folder
        for part in self._parts:
            # A checkpoint from before the part existed has nothing of it.
            if part.name in state:
                part.load(state[part.name])
        return state


def write_batch(path: Path, step: int, pairs: Sequence[Pair], config: OPSDCConfig) -> None:
    """Write a step's token ids, and the settings to replay it, as plain JSON."""
    rows = [
        {
            "student_prompt_ids": list(p.student_prompt_ids),
            "teacher_prompt_ids": list(p.teacher_prompt_ids),
            "response_ids": list(p.response_ids),
        }
        for p in pairs
    ]
    write_json(path, {"step": step, "config": config.to_dict(), "pairs": rows})
