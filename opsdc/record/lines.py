"""The record of a run: JSON lines on disk, callbacks to the trackers people use."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from opsdc.config.settings import OPSDCConfig
from opsdc.errors import CheckpointError, ConfigError
from opsdc.ranks.talk import Ranks


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


class RunRecord:
    """metrics.jsonl and rollouts.jsonl of a run, and its settings: one commit a step.

    Raises ConfigError where ranks do not share the folder, CheckpointError where it cannot be
    written.
    """

    def __init__(self, config: OPSDCConfig, *, after_step: int, ranks: Ranks) -> None:
        self._folder, self._ranks = Path(config.output_dir), ranks
        self._every, self._steps = config.log.every, config.train.steps
        ranks.on_first_rank(lambda: self._describe(config))
        ranks.on_each_rank(self._check_shared)
        self.cut(after_step)
        self.history = ranks.from_first(read_lines(self._folder / "metrics.jsonl"))
        """Rows of metrics.jsonl so far."""

    @property
    def losses(self) -> list[float | None]:
        """Loss of every step so far, None where it was not finite."""
        return [row["loss_nats"] for row in self.history]

    def cut(self, after_step: int) -> None:
        """Drop the rows of later steps: a checkpoint has no others before it."""
        self._metrics, self._responses = (
            Lines(self._folder / name, after_step=after_step, writes=self._ranks.first)
            for name in ("metrics.jsonl", "rollouts.jsonl")
        )

    def commit(
        self, row: dict[str, Any], responses: Sequence[dict[str, Any]], *, refreshed: bool
    ) -> dict[str, Any]:
        """Append a step's responses and then its row, print it where it is due, and return it.

        Both are on disk when this returns. The row is the first rank's on all of them, so that
        guards decide alike.
        """
        row = self._ranks.from_first(row)
        self._responses.write(*responses)
        self._metrics.write(row)
        self.history.append(row)
        if is_due(self._every, row["step"]) or row["step"] == self._steps:
            print(step_line(row, self._steps, refreshed), flush=True)
        return row

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


def is_due(every: int, step: int) -> bool:
    """Return True at every so many steps; at none where `every` is 0."""
    return every > 0 and step % every == 0


def step_line(row: dict[str, Any], steps: int, refreshed: bool) -> str:
    """Say in one printed line what a row of metrics.jsonl holds."""

    def show(key: str, spec: str) -> str:
        return "–" if row[key] is None else format(row[key], spec)

    return (
        f"step {row['step']:>{len(str(steps))}}/{steps}"
        f"  loss {show('loss_nats', '.4f')} nats/token"
        f"  entropy {show('student_entropy', '.2f')}"
        f"  response {show('response_tokens_mean', '.1f')} tokens"
        f"  truncated {100 * row['truncated_share']:.0f} %"
        f"  grad {show('grad_norm', '.2f')}"
        f"  {row['perf/seconds_step']:.0f} s" + ("  teacher refreshed" if refreshed else "")
    )


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


def peak_mib() -> float:
    """Peak memory of this process so far: the GPU's allocator where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
