"""A process that runs cells, and is replaced when one breaks it.

A kernel that reads past its memory leaves its process's GPU context unusable, and one that hangs
never comes back. Cells therefore run in processes of their own, with a time limit each: what breaks
costs one cell.
"""

from __future__ import annotations

import multiprocessing
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

START_SECONDS = 180.0
"""A process that has not imported everything by then never will."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of a cell: rows for the record, or the reason why there are none."""

    rows: list[dict[str, Any]]
    error: str | None
    seconds: float


class Worker:
    """Runs functions of `benchmarks.gpu.stages.MEASURES` by name, one at a time.

    Args:
        device: "cuda" or "cpu", on which everything is measured.
    """

    def __init__(self, device: str) -> None:
        self._device = device
        self._process: Any = None
        self._pipe: Connection | None = None

    def run(self, measure: str, arguments: dict[str, Any], limit: float) -> Answer:
        """Run one function; after `limit` seconds its process is ended."""
        start = time.perf_counter()
        try:
            pipe = self._started()
            start = time.perf_counter()
            pipe.send((measure, arguments))
            if not pipe.poll(limit):
                self.close()
                return Answer([], f"not done after {limit:.0f} s: ended", limit)
            rows, error, lost = pipe.recv()
        except (EOFError, OSError) as reason:
            code = self._exit_code()
            self.close()
            seconds = time.perf_counter() - start
            return Answer([], f"its process died with status {code} ({reason!r})", seconds)
        if lost:
            self.close()
        return Answer(rows, error, time.perf_counter() - start)

    def close(self) -> None:
        """End the process; the next cell starts another."""
        if self._pipe is not None:
            self._pipe.close()
        if self._process is not None:
            self._process.kill()
            self._process.join()
        self._process = self._pipe = None

    def _started(self) -> Connection:
        if self._pipe is None:
            context = multiprocessing.get_context("spawn")
            self._pipe, theirs = context.Pipe()
            self._process = context.Process(target=serve, args=(theirs, self._device), daemon=True)
            self._process.start()
            theirs.close()
            if not self._pipe.poll(START_SECONDS):
                raise OSError(f"not started after {START_SECONDS:.0f} s")
            self._pipe.recv()
        return self._pipe

    def _exit_code(self) -> int | None:
        if self._process is not None:
            self._process.join(5)
        return None if self._process is None else self._process.exitcode


def serve(pipe: Connection, device: str) -> None:
    """The process: answers until nobody asks."""
    import torch

    from benchmarks.gpu.stages import MEASURES

    # The interpreter computes both branches of a `where`, as a GPU does, and numpy remarks on it.
    warnings.simplefilter("ignore", RuntimeWarning)
    torch.set_num_threads(1 if device == "cpu" else 4)
    pipe.send("ready")
    while True:
        try:
            measure, arguments = pipe.recv()
        except EOFError:
            return
        pipe.send(answer(MEASURES[measure], torch.device(device), arguments))


def answer(
    measure: Callable[..., list[dict[str, Any]]], device: Any, arguments: dict[str, Any]
) -> tuple[list[dict[str, Any]], str | None, bool]:
    """(rows, error, True if the process is of no more use)."""
    import torch

    try:
        return measure(device, **arguments), None, False
    except Exception as error:
        # A cell may fail in any way; the others do not depend on it.
        said = f"{type(error).__name__}: {str(error).strip()[:600]}"
    lost = False
    if device.type == "cuda":
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError:
            lost = True  # the context has broken
    return [], said, lost
