"""The record of a run as JSON lines on disk, and files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from opsdc.config.settings import OPSDCConfig
from opsdc.errors import CheckpointError, ConfigError
from opsdc.ranks.talk import Ranks


class Lines:
    """A JSON-lines file whose rows carry `step`.

    Opening it drops the rows after `after_step`, since a resumed run does those steps again. Of
    several ranks one `writes`. Raises CheckpointError where the file cannot be written.
    """

    def __init__(self, path: Path, *, after_step: int, writes: bool = True) -> None:
        self._path = path
        self._writes = writes
        if not writes:
            return
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        self.replace([row for row in read_lines(path) if row["step"] <= after_step])

    def replace(self, rows: Sequence[dict[str, Any]]) -> None:
        """Write the file anew with these rows."""
        if self._writes:
            write_text(self._path, "".join(map(_line, rows)))

    def write(self, *rows: dict[str, Any]) -> None:
        """Append rows and sync them to disk: a checkpoint must not be ahead of its record."""
        if not self._writes:
            return
        with writing(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write("".join(map(_line, rows)))
            file.flush()
            os.fsync(file.fileno())


class RunRecord:
    """The files config.yaml and metrics, rollouts, divergence.jsonl of a run: a commit per step.

    An evaluation stands in the row of its step, the base's in the first row, so that metrics.jsonl
    has a row for each step and no others.

    Raises ConfigError where ranks do not share the folder, CheckpointError where it cannot be
    written.
    """

    def __init__(self, config: OPSDCConfig, *, after_step: int, ranks: Ranks) -> None:
        self._folder, self._ranks = Path(config.output_dir), ranks
        self._log_every, self._steps = config.log.every, config.train.steps
        self._refreshes = config.teacher.mode == "refresh"
        ranks.on_first_rank(lambda: self._describe(config))
        ranks.on_each_rank(self._check_shared)
        self.history: list[dict[str, Any]]
        """The rows of metrics.jsonl so far."""
        self.cut(after_step)

    @property
    def losses(self) -> list[float | None]:
        """List the loss of each step so far in nats per token, None where it was not finite."""
        return [row["loss_nats"] for row in self.history]

    def cut(self, after_step: int) -> None:
        """Drop the rows of later steps, so that the record ends where the checkpoint does."""
        self._metrics, self._responses, self._looks = (
            Lines(self._folder / name, after_step=after_step, writes=self._ranks.first)
            for name in ("metrics.jsonl", "rollouts.jsonl", "divergence.jsonl")
        )
        self.history = self._ranks.from_first(read_lines(self._folder / "metrics.jsonl"))
        self._waiting: dict[int, dict[str, Any]] = {}

    def commit(
        self,
        row: dict[str, Any],
        responses: Sequence[dict[str, Any]],
        looks: Sequence[dict[str, Any]] = (),
    ) -> dict[str, Any]:
        """Append a step's responses and then its row; print the row where it is due.

        `looks`, which few steps have, are the lines of divergence.jsonl. All are on disk when this
        returns. The row returned is the first rank's on all ranks, so that guards decide alike.
        """
        row = self._ranks.from_first(row)
        self._responses.write(*responses)
        if looks:
            self._looks.write(*looks)
        # The base's evaluation, and a gate's of this step, came before this row.
        whole = row.copy()
        for values in self._waiting.values():
            whole |= values
        self._waiting = {}
        self._metrics.write(whole)
        self.history.append(whole)
        if is_due(self._log_every, row["step"]) or row["step"] == self._steps:
            refreshed = self._refreshes and row["teacher_version"] == row["step"]
            print(step_line(row, self._steps, refreshed), flush=True)
        return row

    def evaluated(self, step: int, values: Mapping[str, float | None]) -> bool:
        """Put an evaluation into the row of its step, or keep it for a row that is yet to come.

        Step 0 is the base, whose values stand as `base/…` in the first row; the others as `eval/…`.
        Returns False where the record has them already, as after a resumed run's repeated steps.
        """
        prefix = "eval" if step else "base"
        named = {f"{prefix}/{key}": value for key, value in values.items()}
        row = next((row for row in self.history if row["step"] == step), None)
        if named.items() <= (self._waiting.get(step, {}) if row is None else row).items():
            return False
        if row is None:
            self._waiting[step] = named
        else:
            row |= named
            self._metrics.replace(self.history)
        return True

    def _describe(self, config: OPSDCConfig) -> None:
        with writing(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
        write_text(self._folder / "config.yaml", config.to_yaml())

    def _check_shared(self) -> None:
        if not (self._folder / "config.yaml").is_file():
            raise ConfigError(
                f"output_dir {self._folder} is not the folder that rank 0 sees under this name; "
                "with several nodes it must lie on storage that all of them share"
            )


def is_due(interval: int, step: int) -> bool:
    """Return True at each multiple of `interval` steps; never where `interval` is 0."""
    return interval > 0 and step % interval == 0


def step_line(row: dict[str, Any], steps: int, refreshed: bool) -> str:
    """Format a row of metrics.jsonl as one line for the terminal."""

    def show(key: str, spec: str) -> str:
        return "–" if row[key] is None else format(row[key], spec)

    more = f"  dial {row['dial']:.2f}" if "dial" in row else ""
    if "right_share" in row:
        more += f"  right {100 * row['right_share']:.0f} %"
    return (
        f"step {row['step']:>{len(str(steps))}}/{steps}"
        f"  loss {show('loss_nats', '.4f')} nats/token"
        f"  entropy {show('student_entropy', '.2f')}"
        f"  response {show('response_tokens_mean', '.1f')} tokens"
        f"  truncated {100 * row['truncated_share']:.0f} %{more}"
        f"  grad {show('grad_norm', '.2f')}"
        f"  {row['perf/seconds_step']:.0f} s" + ("  teacher refreshed" if refreshed else "")
    )


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a JSON-lines file up to a line that a crash cut short; [] without a file."""
    if not path.is_file():
        return []
    rows = []
    # Bytes end lines at \n alone: a text may hold other ends of lines, and be cut within a letter.
    for line in path.read_bytes().split(b"\n"):
        try:
            rows.append(json.loads(line.decode("utf-8")))
        except ValueError:
            break
    return rows


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, as safely as `write_text` does."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False))


def write_text(path: Path, text: str) -> None:
    """Write a file so that neither a reader nor a power cut ever finds half of it.

    The text is written under another name, synced to disk, and renamed. Raises CheckpointError
    where that fails.
    """
    # One name for all processes: the next one overwrites what a crash left behind.
    aside = path.with_name(f".{path.name}.tmp")
    with writing(path):
        with aside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a failure to write `path` within the block into CheckpointError with the remedy."""
    try:
        yield
    # safetensors does not report a full disk as OSError.
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot write {path}: {error}; make room there or name another output_dir. The same "
            "command goes on from the last checkpoint, which is untouched"
        ) from error


def peak_mib() -> float:
    """Return the peak memory of this process in MiB: of the GPU's allocator, or resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
