"""The trainer's end of a vLLM server: `VLLMEngine`'s methods, and the care for faults.

Every request has a deadline. One that fails (refused, closed, late, not JSON, not the answer to
this request) is tried once more: the run's own server is replaced by a new process first, and the
weights are pushed again. If that fails too, the error names both reasons. All of it ends within
twice `rollout.timeout_s`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import secrets
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from opsdc.config.settings import OPSDCConfig
from opsdc.errors import ConfigError, OPSDCError, RolloutError, WeightSyncError
from opsdc.models.adapters import architecture
from opsdc.ranks import stop
from opsdc.record.versions import check_vllm
from opsdc.rollout.vllm import wire
from opsdc.rollout.vllm.engine import engine_options, refuse_environment
from opsdc.rollout.vllm.messages import Batch, EngineOptions, SampleCall, Sampled
from opsdc.rollout.vllm.server import KEY_VARIABLE, PROTOCOL, check_place, split_address
from opsdc.rollout.weights import Weights, write_weights

T = TypeVar("T")

_MEMORY = Path("/dev/shm")
"""Weights are passed on in memory, by files in this folder, where there is room."""


class ServerFault(Exception):
    """A request that failed and may be tried again."""


def connect(config: OPSDCConfig, model: Any) -> VLLMClient:
    """Connect to the server at `rollout.server_address`, or start one of the run's own.

    Raises ConfigError where no server answers, or it runs another model or dtype.
    """
    refuse_environment()
    settings = config.rollout
    key = os.environ.get(KEY_VARIABLE, "")
    with tempfile.TemporaryDirectory(prefix="opsdc-vllm-") as aside:
        options = engine_options(
            config, architecture(model), model.config, Path(aside), sleeps=False
        )
        if settings.server_address is not None and settings.weights_dir is not None:
            host, port = split_address(settings.server_address)
            check_place(host, key)
            client = VLLMClient(
                options,
                key=key,
                weights_dir=Path(settings.weights_dir),
                timeout_s=settings.timeout_s,
                address=(host, port),
            )
        else:
            check_vllm()
            log = Path(config.output_dir) / "vllm_server.log"
            log.parent.mkdir(parents=True, exist_ok=True)
            parent = settings.weights_dir or _temporary_folder(model)
            folder = Path(tempfile.mkdtemp(prefix="opsdc-weights-", dir=parent))
            # A restart reads the config again, after this call has ended.
            shutil.copytree(aside, folder / "config")
            client = VLLMClient(
                dataclasses.replace(options, folder=str(folder / "config")),
                key=key or secrets.token_hex(16),
                weights_dir=folder,
                timeout_s=settings.timeout_s,
                log=log,
            )
        client.check()
        return client


def _temporary_folder(model: Any) -> str | None:
    """Return the folder in memory where it has room for the weights twice, else None."""
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    if _MEMORY.is_dir() and shutil.disk_usage(_MEMORY).free > 2 * size:
        return str(_MEMORY)
    return None


class VLLMClient:
    """A client of the server at `address`, or of a server that it starts as its own process.

    Args:
        options: The options of the engine that is expected there, or that is started.
        key: The server's key; empty for a server without one.
        weights_dir: The folder of weights on their way, which the server sees too. It is removed
            together with a server of the run's own.
        timeout_s: The time limit of one request, in seconds.
        address: Host and port of a server that others run.
        log: The file for the output of a server of the run's own.
    """

    def __init__(
        self,
        options: EngineOptions,
        *,
        key: str,
        weights_dir: Path,
        timeout_s: float,
        address: tuple[str, int] | None = None,
        log: Path | None = None,
    ) -> None:
        self._options = options
        self._key = key
        self.weights_dir = weights_dir
        self._timeout_s = timeout_s
        self._log = log
        self._address = address
        self._process: subprocess.Popen[bytes] | None = None
        self._last_push: tuple[Weights | Path, str, Sequence[int]] | None = None
        self._must_push = False
        if address is None:
            weakref.finalize(self, shutil.rmtree, weights_dir, ignore_errors=True)

    @property
    def description(self) -> str:
        """The server's place, for the log."""
        host, port = self._address or ("", 0)
        holder = f"a process of this run ({self._process.pid})" if self._process else "a server"
        return f"vLLM in {holder} at {host}:{port}"

    def check(self) -> None:
        """Start or find the server; raise ConfigError where it is not as the run needs it."""
        deadline = time.monotonic() + self._timeout_s
        try:
            if self._address is None:
                self._start(deadline)
            hello = self._request({"op": "hello"}, deadline)
            served = {k: hello["options"][k] for k in ("dtype", "vocab_size", "max_model_len")}
            protocol = hello["protocol"]
        except ServerFault as fault:
            raise ConfigError(f"rollout.engine vllm_server: {fault}") from fault
        except (KeyError, TypeError) as error:
            raise ConfigError("rollout.server_address: not an OPSDC server") from error
        if protocol != PROTOCOL:
            raise ConfigError(
                f"rollout.server_address: the server speaks protocol {protocol}, this OPSDC "
                f"{PROTOCOL}; run the same version on both sides"
            )
        needed = {k: getattr(self._options, k) for k in served}
        same = all(served[k] == needed[k] for k in ("dtype", "vocab_size"))
        if not same or served["max_model_len"] < needed["max_model_len"]:
            raise ConfigError(
                f"rollout.server_address: the server runs {served}, this run needs {needed}; start "
                "it with this run's config"
            )

    def load(self, weights: Weights | Path, weights_id: str, probe: Sequence[int]) -> list[float]:
        """Push weights, also from a folder below `weights_dir`; see `VLLMEngine.load`.

        Raises WeightSyncError.
        """
        self._last_push = (weights, weights_id, probe)
        return self._try_twice(self._push, WeightSyncError, f"push of weights '{weights_id}'")

    def sample(self, call: SampleCall) -> Batch:
        """Have a batch sampled; see `VLLMEngine.sample`. Raises RolloutError."""
        keys = [secrets.token_hex(8) for _ in call.prompts]
        requests = [
            {"key": key, "ids": list(ids), "seed": seed}
            for key, ids, seed in zip(keys, call.prompts, call.seeds, strict=True)
        ]
        message = {
            "op": "sample",
            "requests": requests,
            "params": dataclasses.asdict(call.params),
            "eos_ids": list(call.eos_ids),
            "probe": list(call.probe),
        }

        def attempt(deadline: float) -> Batch:
            if self._must_push:
                self._push(deadline)
            return self._checked_batch(self._request(message, deadline), keys, call)

        return self._try_twice(attempt, RolloutError, f"sampling of {len(requests)} responses")

    def close(self) -> None:
        """End a server of the run's own and remove its weights."""
        self._end_process()
        if self._log is not None:
            shutil.rmtree(self.weights_dir, ignore_errors=True)

    def _end_process(self) -> None:
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        self._process = None

    def _try_twice(self, attempt: Callable[[float], T], error: type[OPSDCError], what: str) -> T:
        """Call `attempt` with its deadline, and once more after a fault; then raise `error`.

        Before the second attempt a server of the run's own is replaced by a new process.
        """
        began = time.monotonic()
        try:
            return attempt(began + self._timeout_s)
        except ServerFault as fault:
            first = fault
        print(f"vLLM server: {what} failed ({first}); once more", file=sys.stderr, flush=True)
        end = began + 2 * self._timeout_s
        self._must_push = True
        try:
            if self._log is not None:
                self._start(end)
            return attempt(end)
        except ServerFault as second:
            raise error(
                f"{what} failed twice within {time.monotonic() - began:.1f} s: {first}; then: "
                f"{second}"
            ) from second

    def _push(self, deadline: float) -> list[float]:
        """Send the newest weights and return the probe's log-probabilities under them."""
        if self._last_push is None:
            raise WeightSyncError("no weights were pushed to the server yet")
        weights, weights_id, probe = self._last_push
        folder = self.weights_dir / secrets.token_hex(8)
        try:
            try:
                if isinstance(weights, Path):
                    # Links to files that are written once, however often the server reads them.
                    shutil.copytree(weights, folder, copy_function=os.link)
                else:
                    write_weights(weights, folder)
            except OSError as error:
                raise WeightSyncError(
                    f"cannot write weights to {folder}: {error}; name another rollout.weights_dir"
                ) from error
            message = {
                "op": "load",
                "folder": folder.name,
                "weights_id": weights_id,
                "probe": list(probe),
            }
            reply = self._request(message, deadline)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        if reply.get("weights_id") != weights_id:
            raise ServerFault("answered to another push")
        logprobs = _checked_logprobs(reply.get("probe"), len(probe) - 1)
        self._must_push = False
        return logprobs

    def _checked_batch(self, reply: dict[str, Any], keys: list[str], call: SampleCall) -> Batch:
        """Return the batch of an answer, or raise ServerFault where it does not fit the call."""
        rows, weights_id = reply.get("rows"), reply.get("weights_id")
        if not isinstance(rows, list) or not isinstance(weights_id, str):
            raise ServerFault("the answer holds no responses")
        if [r.get("key") if isinstance(r, dict) else None for r in rows] != keys:
            raise ServerFault(f"{len(rows)} responses, not those to {len(keys)} requests")
        if self._last_push is not None and weights_id != self._last_push[1]:
            # A server that somebody has restarted has lost its weights.
            raise ServerFault(f"sampled by weights '{weights_id}'")
        return Batch(
            weights_id=weights_id,
            probe=_checked_logprobs(reply.get("probe"), len(call.probe) - 1),
            rows=[
                self._checked_row(row, len(ids), call)
                for row, ids in zip(rows, call.prompts, strict=True)
            ],
        )

    def _checked_row(self, row: dict[str, Any], prompt_tokens: int, call: SampleCall) -> Sampled:
        """Return a response, or raise ServerFault where vLLM cannot have sampled it."""
        longest = min(call.params.max_new_tokens, self._options.max_model_len - prompt_tokens)
        ids, finished = row.get("ids"), row.get("finished")
        vocabulary = range(self._options.vocab_size)
        if not isinstance(ids, list) or not all(type(i) is int and i in vocabulary for i in ids):
            raise ServerFault("a response that is not token ids of this model")
        ends = [i for i, token in enumerate(ids) if token in call.eos_ids]
        whole = ends == [len(ids) - 1] and len(ids) <= longest
        cut = not ends and len(ids) == longest
        if not (whole if finished is True else cut and finished is False):
            raise ServerFault(
                f"a response of {len(ids)} tokens that neither ends with an end-of-sequence token "
                f"nor has all {longest}"
            )
        logprobs = _checked_logprobs(row.get("logprobs"), len(ids))
        return Sampled(ids=ids, logprobs=logprobs, finished=whole)

    def _request(self, message: dict[str, Any], deadline: float) -> dict[str, Any]:
        """Send one message and return the answer; raise ServerFault where there is none."""
        if self._address is None:
            raise ServerFault("there is no server")
        left = deadline - time.monotonic()
        try:
            with socket.create_connection(self._address, timeout=max(left, 1e-3)) as connection:
                wire.send(connection, message | {"key": self._key}, deadline)
                reply = wire.receive(connection, deadline)
        except (OSError, wire.WireError) as error:
            raise ServerFault(f"{error or type(error).__name__}{self._log_tail()}") from error
        if "error" in reply:
            raise ServerFault(f"the server says: {str(reply['error'])[:500]}")
        return reply

    def _start(self, deadline: float) -> None:
        """Start a server in a new process, with random weights; raise ServerFault."""
        self._end_process()
        self._address = None
        assert self._log is not None
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "opsdc.rollout.vllm.server"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                # In a session of its own Ctrl-C does not reach it, but the trainer.
                start_new_session=True,
            )
        # A sampler that is dropped takes its process along.
        weakref.finalize(self, self._process.kill)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        spec = {
            "options": dataclasses.asdict(self._options),
            "key": self._key,
            "weights_dir": str(self.weights_dir),
        }
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(spec).encode() + b"\n")
            self._process.stdin.flush()
        began = time.monotonic()
        while not select.select([self._process.stdout], [], [], wire.POLL_S)[0]:
            stop.check()
            if time.monotonic() >= deadline:
                waited = time.monotonic() - began
                raise ServerFault(f"did not start in {waited:.0f} s{self._log_tail()}")
        line = self._process.stdout.readline()
        if not line:
            raise ServerFault(f"ended while it started{self._log_tail()}")
        self._address = ("127.0.0.1", int(json.loads(line)["port"]))

    def _log_tail(self) -> str:
        """Return the last line of the log of a process that has ended; else nothing."""
        if self._log is None or self._process is None or self._process.poll() is None:
            return ""
        text = self._log.read_text("utf-8", errors="replace").strip().splitlines()
        return f" (process ended with {self._process.returncode}; {self._log}: {text[-1:]})"


def _checked_logprobs(values: Any, count: int) -> list[float]:
    """Return `count` log-probabilities, or raise ServerFault for anything else."""
    if (
        not isinstance(values, list)
        or len(values) != count
        or not all(type(v) in (int, float) and math.isfinite(v) and v <= 1e-3 for v in values)
    ):
        raise ServerFault(f"not {count} log-probabilities")
    return [float(v) for v in values]
