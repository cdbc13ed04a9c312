"""The processes of a run: their ranks, their talk, and how they end together.

    torchrun --nproc_per_node 8 -m opsdc train --config my.yaml
    accelerate launch --multi_gpu --num_processes 8 -m opsdc train --config my.yaml

Both say in environment variables which process this is; without them a run is one process and
nothing here does anything. Every rank runs the same loop on the same step. Work that ranks do apart
(sampling, reading files) runs in `on_each_rank`, where an error or a stop of one is raised on all.
Work that they do in lockstep calls `check_stop`. Values travel as JSON: nothing is unpickled.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from opsdc import errors
from opsdc.config.settings import DistributedConfig
from opsdc.errors import OPSDCError, OutOfMemoryError, TrainingError
from opsdc.ranks import stop

T = TypeVar("T")

_LOOK_S = 1.0
"""A rank that works by itself looks this often for the signal of another."""

_OUT_OF_MEMORY = 1000
"""This code stands among signals' numbers for a rank without memory; it is beyond all of them."""

_KINDS: dict[str, type[Exception]] = {
    kind.__name__: kind
    for kind in (*vars(errors).values(), OSError)
    if isinstance(kind, type) and issubclass(kind, Exception)
}
"""These errors can be raised on one rank for another."""


class Ranks:
    """The processes of a run; with a single one every method returns what it is given.

    All ranks must make the same calls in the same order, except inside `on_each_rank`.
    """

    def __init__(self, rank: int, size: int, device: torch.device) -> None:
        self.rank, self.size, self.device = rank, size, device
        self._board: Any = None
        if size > 1:
            store = dist.distributed_c10d._get_default_store()
            self._board = dist.PrefixStore("opsdc", store)
        self._runs = 0
        self._posted = False
        self._heard: str | None = None
        self._looked = 0.0

    @property
    def first(self) -> bool:
        """True on the rank that writes files and prints."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's value, which JSON must hold, in rank order."""
        if self.size == 1:
            return [value]
        text = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)
        return [json.loads(bytes(part.tolist())) for part in self._gather_rows(text)]

    def concat(self, rows: torch.Tensor) -> torch.Tensor:
        """Return every rank's rows [n, ...] in rank order, as one [Σn, ...] on the CPU."""
        return rows.cpu() if self.size == 1 else torch.cat(self._gather_rows(rows.cpu()))

    def _gather_rows(self, rows: torch.Tensor) -> list[torch.Tensor]:
        """Return the rows of every rank, padded to the longest only while they travel."""
        counts = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(counts, torch.tensor([len(rows)]))
        longest = max(int(n) for n in counts)
        padded = rows.new_zeros(longest, *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(parts, padded)
        return [part[: int(n)] for part, n in zip(parts, counts, strict=True)]

    def from_first(self, value: T) -> T:
        """Return the first rank's value on every rank."""
        return value if self.size == 1 else self.gather(value if self.first else None)[0]

    def any(self, flag: bool) -> bool:
        """Return True on all ranks if the flag is set on one."""
        return self.sum(float(flag)) > 0

    def sum(self, value: float) -> float:
        """Return the sum over ranks, the same bits on all of them."""
        if self.size == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(total)
        return float(total)

    def on_each_rank(self, work: Callable[[], T]) -> list[T]:
        """Run `work()` on every rank and return all results, in rank order, on every rank.

        An error or a stop on one rank is raised on all. `work` may take longer on one rank than on
        another, and must not talk to other ranks.
        """
        if self.size == 1:
            return [work()]
        raised: Exception | None = None
        outcome: dict[str, Any]
        try:
            outcome = {"value": work()}
        except stop.Stopped as stopped:
            outcome = {"stopped": str(stopped)}
        except Exception as error:
            raised = error
            kind = "OutOfMemoryError" if is_out_of_memory(error) else _kind(error)
            outcome = {"error": str(error) or type(error).__name__, "kind": kind}
        outcomes = self.gather(outcome)
        for rank, outcome in enumerate(outcomes):
            if "error" in outcome:
                if raised is not None and outcome["kind"] != "OutOfMemoryError":
                    raise raised
                raise _KINDS[outcome["kind"]](f"rank {rank}: {outcome['error']}") from raised
        for outcome in outcomes:
            if "stopped" in outcome:
                raise stop.Stopped(outcome["stopped"])
        return [outcome["value"] for outcome in outcomes]

    def on_first_rank(self, work: Callable[[], T]) -> T:
        """Run `work()` on the first rank and return its result on every rank.

        Errors are those of `on_each_rank`.
        """
        results = self.on_each_rank(lambda: work() if self.first else None)
        return results[0]  # type: ignore[return-value]

    def check_stop(self, *, out_of_memory: bool = False) -> None:
        """Do `stop.check` at a place that all ranks pass, so that all leave there or none.

        `out_of_memory` says that this rank ran out of memory on its way; OutOfMemoryError is then
        raised on all.
        """
        if self.size == 1:
            return stop.check()
        name = stop.requested()
        code = _OUT_OF_MEMORY if out_of_memory else signal.Signals[name] if name else 0
        largest = torch.tensor([int(code)])
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        if int(largest) == _OUT_OF_MEMORY:
            raise OutOfMemoryError("a rank ran out of memory")
        if int(largest):
            raise stop.Stopped(signal.Signals(int(largest)).name)

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Let `stop.check` raise on every rank within the block when one rank gets a signal."""
        if self.size == 1:
            yield
            return
        self._runs += 1
        self._posted, self._heard = False, None
        stop.set_exchange(self._exchange)
        try:
            yield
        finally:
            stop.set_exchange(None)

    def _exchange(self, name: str | None) -> str | None:
        """Post this rank's signal, or look for that of another, at most every `_LOOK_S`."""
        key = f"stop/{self._runs}"
        if name is not None and not self._posted:
            self._board.set(key, name)
            self._posted = True
        now = time.monotonic()
        if name is None and self._heard is None and now - self._looked >= _LOOK_S:
            self._looked = now
            if self._board.check([key]):
                self._heard = self._board.get(key).decode()
        return name or self._heard

    @contextlib.contextmanager
    def only_first_rank_prints(self) -> Iterator[None]:
        """Let only the first rank print within the block, and the rank that fails first.

        Its error names the rank. Other ranks then fail as a consequence, for example by the lost
        connection, and end silently.
        """
        if self.size == 1:
            yield
            return
        try:
            with contextlib.ExitStack() as quiet:
                if not self.first:
                    nowhere = quiet.enter_context(open(os.devnull, "w"))
                    quiet.enter_context(contextlib.redirect_stdout(nowhere))
                    quiet.enter_context(contextlib.redirect_stderr(nowhere))
                yield
        except Exception as error:
            if not self._is_first_to_fail():
                raise SystemExit(1) from None
            if isinstance(error, OPSDCError):
                named = str(error).startswith("rank ")
                raise error if named else type(error)(f"rank {self.rank}: {error}") from error
            print(f"rank {self.rank} failed:", file=sys.stderr, flush=True)
            raise

    def _is_first_to_fail(self) -> bool:
        """Return True on the first rank that asks, and False on all that ask later."""
        try:
            return self._board.add("failed", 1) == 1
        except dist.DistError:
            # The process that kept the board is gone, so it failed first.
            return False


ALONE = Ranks(0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
"""The ranks of a run of one process."""

_joined: Ranks | None = None
"""The ranks that this process has joined, until it leaves them."""


def join(config: DistributedConfig) -> Ranks:
    """Join the ranks that torchrun or accelerate started; return `ALONE` where there are none.

    Starts torch's process group, or uses the one there is. Later calls return the same
    ranks. Raises TrainingError on a rank without a GPU of its own.
    """
    global _joined
    if _joined is not None:
        return _joined
    if not dist.is_initialized():
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return ALONE
        _start(config)
    if dist.get_world_size() == 1:
        return ALONE
    _joined = Ranks(dist.get_rank(), dist.get_world_size(), _device())
    return _joined


def leave() -> None:
    """Take this process out of its group; all ranks must call it at their end."""
    global _joined
    if _joined is not None:
        _joined = None
        # A vLLM engine that was closed has ended the group already.
        if dist.is_initialized():
            dist.destroy_process_group()


def _start(config: DistributedConfig) -> None:
    """Start torch's process group."""
    device = _device()
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group(
        # Values that ranks exchange lie on the CPU, where they wait for no kernel.
        "cpu:gloo,cuda:nccl" if cuda else "gloo",
        timeout=datetime.timedelta(seconds=config.timeout_s),
        device_id=device if cuda else None,
    )


def _device() -> torch.device:
    """Return this rank's device."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if local >= torch.cuda.device_count():
        raise TrainingError(
            f"local rank {local} has no GPU, there are {torch.cuda.device_count()}; start as many "
            "processes per node as it has GPUs (--nproc_per_node)"
        )
    return torch.device("cuda", local)


def _kind(error: Exception) -> str:
    """Return the name of the nearest class in `_KINDS`, or TrainingError."""
    names = [kind.__name__ for kind in type(error).__mro__]
    return next((name for name in names if name in _KINDS), "TrainingError")


def is_out_of_memory(error: BaseException) -> bool:
    """Return True for an error by which torch or Python says that memory has run out."""
    # On a CPU torch raises a plain RuntimeError.
    return isinstance(error, (torch.OutOfMemoryError, MemoryError, OutOfMemoryError)) or (
        "can't allocate memory" in str(error)
    )
