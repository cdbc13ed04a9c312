"""The record of a run: JSON lines on disk, callbacks to the trackers people use."""

from __future__ import annotations

import contextlib
import json
import math
import os
import resource
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    DefaultFlowCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_callback import CallbackHandler
from transformers.utils import logging as transformers_logging

from opsdc.config import OPSDCConfig
from opsdc.errors import CheckpointError


class Lines:
    """A JSON-lines file whose rows carry `step`; a resumed run cuts it to its checkpoint first.

    Of several ranks one `writes`.
    """

    def __init__(self, path: Path, *, after_step: int, writes: bool = True) -> None:
        self._path = path
        self._writes = writes
        if not writes:
            return
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        kept = (row for row in read_lines(path) if row["step"] <= after_step)
        write_text(path, "".join(map(_line, kept)))

    def write(self, *rows: dict[str, Any]) -> None:
        """Append rows, on disk when this returns: a checkpoint must not be ahead of its record."""
        if not self._writes:
            return
        with writing(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write("".join(map(_line, rows)))
            file.flush()
            os.fsync(file.fileno())


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSON-lines file; a last line that a crash cut short is left out."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text("utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"


def write_json(path: Path, value: Any) -> None:
    """As `write_text`."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False))


def write_text(path: Path, text: str) -> None:
    """Write aside, sync and rename: no reader, and no power cut, finds half a file."""
    # One name for every process: what a crash leaves behind is overwritten by the next.
    aside = path.with_name(f".{path.name}.tmp")
    with writing(path):
        with aside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """What the system says against writing `path`, as CheckpointError with the remedy."""
    try:
        yield
    # What safetensors makes of a full disk is no OSError.
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot write {path}: {error}; make room there or name another output_dir. The same "
            "command goes on from the last checkpoint, which is untouched"
        ) from error


def finite(value: float) -> float | None:
    """JSON has no NaN: a mean over nothing is null."""
    return value if math.isfinite(value) else None


def peak_mib() -> float:
    """Peak memory of this process so far: the GPU's allocator where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


class Callbacks:
    """`transformers.TrainerCallback`s around our loop, trackers of `log.report_to` included."""

    def __init__(
        self,
        config: OPSDCConfig,
        callbacks: Sequence[TrainerCallback],
        model: Any,
        tokenizer: Any,
        optimizer: torch.optim.Optimizer,
        *,
        first: bool = True,
    ) -> None:
        found = get_reporting_integration_callbacks(list(config.log.report_to))
        trackers = [c() if isinstance(c, type) else c for c in found]
        self._handler = CallbackHandler(
            [DefaultFlowCallback(), *trackers, *callbacks], model, tokenizer, optimizer, None
        )
        # It warns of a process group that is not its own; and ranks on a CPU are none to it.
        verbosity = transformers_logging.get_verbosity()
        transformers_logging.set_verbosity_error()
        self._args = TrainingArguments(
            output_dir=config.output_dir,
            max_steps=config.train.steps,
            learning_rate=config.optim.lr,
            logging_steps=config.log.every,
            seed=config.seed,
            report_to="none",
            run_name=Path(config.output_dir).name,
        )
        transformers_logging.set_verbosity(verbosity)
        self._state = TrainerState(max_steps=config.train.steps, is_world_process_zero=first)
        self._control = TrainerControl()

    def emit(self, event: str, *, step: int, **kwargs: Any) -> bool:
        """Send one event ("on_step_end", ...); True when a callback asks training to stop."""
        self._state.global_step = step
        self._handler.call_event(event, self._args, self._state, self._control, **kwargs)
        return self._control.should_training_stop
