"""The trainer's end of a vLLM server: `VLLMEngine`'s methods, and what is done about faults.

Every request has a deadline. One that fails (refused, closed, late, not JSON, not the answer to
what was asked) is tried once more: the run's own server is replaced by a new process first, and the
weights are pushed again. If that fails too, a named error says both reasons. All of it ends within
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
from opsdc.rollout.base import SamplingParams
from opsdc.rollout.vllm import wire
from opsdc.rollout.vllm.engine import engine_options, refuse_environment
from opsdc.rollout.vllm.messages import Batch, EngineOptions, Sampled
from opsdc.rollout.vllm.server import KEY_VARIABLE, PROTOCOL, check_place
from opsdc.rollout.weights import Weights, write_weights

T = TypeVar("T")
_MEMORY = Path("/dev/shm")


class ServerFault(Exception):
    """One request failed; it may be tried again."""


def connect(config: OPSDCConfig, model: Any) -> VLLMServer:
    """The server of a run: the one at `rollout.server_address`, or a new process on loopback.

    Raises ConfigError when there is none, or it runs another model or another dtype.
    """
    refuse_environment()
    settings = config.rollout
    key = os.environ.get(KEY_VARIABLE, "")
    with tempfile.TemporaryDirectory(prefix="opsdc-vllm-") as aside:
        options = engine_options(
            config, architecture(model), model.config, Path(aside), sleeps=False
        )
        if settings.server_address is not None and settings.weights_dir is not None:
            host, _, port = settings.server_address.rpartition(":")
            host = host.strip("[]")
            check_place(host, key)
            server = VLLMServer(
                options,
                key=key,
                weights_dir=Path(settings.weights_dir),
                timeout_s=settings.timeout_s,
                address=(host, int(port)),
            )
        else:
            check_vllm()
            log = Path(config.output_dir) / "vllm_server.log"
            log.parent.mkdir(parents=True, exist_ok=True)
            parent = settings.weights_dir or _temporary_folder(model)
            folder = Path(tempfile.mkdtemp(prefix="opsdc-weights-", dir=parent))
            # The config must outlive this call, for a restart.
            shutil.copytree(aside, folder / "config")
            server = VLLMServer(
                dataclasses.replace(options, folder=str(folder / "config")),
                key=key or secrets.token_hex(16),
                weights_dir=folder,
                timeout_s=settings.timeout_s,
                log=log,
            )
        server.check()
        return server


def _temporary_folder(model: Any) -> str | None:
    """Memory where there is room for the weights twice, else the usual place."""
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    if _MEMORY.is_dir() and shutil.disk_usage(_MEMORY).free > 2 * size:
        return str(_MEMORY)
    return None


class VLLMServer:
    """With `address` a server that others run; without one a process of our own.

    Args:
        options: of the engine that is expected there, or that is started.
        weights_dir: folder of weights on their way, which the server sees too; an own server's is
            removed with it.
        timeout_s: of one request.
        log: where an own server's output goes.
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
        self._last_push: tuple[Weights | Path, str, list[int]] | None = None
        self._must_push = False
        if address is None:
            weakref.finalize(self, shutil.rmtree, weights_dir, ignore_errors=True)

    @property
    def description(self) -> str:
        host, port = self._address or ("", 0)
        own = f"a process of this run ({self._process.pid})" if self._process else "a server"
        return f"vLLM in {own} at {host}:{port}"

    def check(self) -> None:
        """Start or find the server; raises ConfigError when it is not what the run needs."""
        deadline = time.monotonic() + self._timeout_s
        try:
            if self._address is None:
                self._start(deadline)
            hello = self._request({"op": "hello"}, deadline)
            found = {k: hello["options"][k] for k in ("dtype", "vocab_size", "max_model_len")}
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
        wanted = self._options
        needed = {k: getattr(wanted, k) for k in found}
        if found["max_model_len"] < needed["max_model_len"] or found != needed | {
            "max_model_len": found["max_model_len"]
        }:
            raise ConfigError(
                f"rollout.server_address: the server runs {found}, this run needs {needed}; start "
                "it with this run's config"
            )

    def load(self, weights: Weights | Path, weights_id: str, probe: list[int]) -> list[float]:
        """As `VLLMEngine.load`, from a folder below `weights_dir` too; raises WeightSyncError."""
        self._last_push = (weights, weights_id, probe)

        def attempt(deadline: float) -> list[float]:
            return self._push(deadline)

        return self._twice(attempt, WeightSyncError, f"push of weights '{weights_id}'")

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        params: SamplingParams,
        eos_ids: Sequence[int],
        probe: list[int],
    ) -> Batch:
        """As `VLLMEngine.sample`; raises RolloutError."""
        requests = [
            {"key": secrets.token_hex(8), "ids": list(ids), "seed": seed}
            for ids, seed in zip(prompts, seeds, strict=True)
        ]
        message = {
            "op": "sample",
            "requests": requests,
            "params": dataclasses.asdict(params),
            "eos_ids": list(eos_ids),
            "probe": probe,
        }

        def attempt(deadline: float) -> Batch:
            if self._must_push:
                self._push(deadline)
            return self._batch(self._request(message, deadline), requests, params, eos_ids, probe)

        return self._twice(attempt, RolloutError, f"sampling of {len(prompts)} responses")

    def close(self) -> None:
        """End an own server."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        pipe.close()
            self._process = None
        if self._log is not None:
            shutil.rmtree(self.weights_dir, ignore_errors=True)

    def _twice(self, attempt: Callable[[float], T], error: type[OPSDCError], what: str) -> T:
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
        if self._last_push is None:
            raise WeightSyncError("no weights were pushed to the server yet")
        weights, weights_id, probe = self._last_push
        folder = self.weights_dir / secrets.token_hex(8)
        try:
            try:
                if isinstance(weights, Path):
                    # The server may read any number of times what is written once.
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
                "probe": probe,
            }
            reply = self._request(message, deadline)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        if reply.get("weights_id") != weights_id:
            raise ServerFault("answered to another push")
        found = _numbers(reply.get("probe"), len(probe) - 1)
        self._must_push = False
        return found

    def _batch(
        self,
        reply: dict[str, Any],
        requests: Sequence[dict[str, Any]],
        params: SamplingParams,
        eos_ids: Sequence[int],
        probe: Sequence[int],
    ) -> Batch:
        rows, weights_id = reply.get("rows"), reply.get("weights_id")
        if not isinstance(rows, list) or not isinstance(weights_id, str):
            raise ServerFault("the answer holds no responses")
        if [r.get("key") if isinstance(r, dict) else None for r in rows] != [
            r["key"] for r in requests
        ]:
            raise ServerFault(f"{len(rows)} responses, not those to {len(requests)} requests")
        if self._last_push is not None and weights_id != self._last_push[1]:
            # A server that was restarted behind our back has lost its weights.
            raise ServerFault(f"sampled by weights '{weights_id}'")
        longest = self._options.max_model_len
        return Batch(
            weights_id=weights_id,
            probe=_numbers(reply.get("probe"), len(probe) - 1),
            rows=[
                self._sampled(row, min(params.max_new_tokens, longest - len(r["ids"])), eos_ids)
                for row, r in zip(rows, requests, strict=True)
            ],
        )

    def _sampled(self, row: dict[str, Any], longest: int, eos_ids: Sequence[int]) -> Sampled:
        """The row, or ServerFault when it cannot be what vLLM sampled."""
        ids, finished = row.get("ids"), row.get("finished")
        vocabulary = range(self._options.vocab_size)
        if not isinstance(ids, list) or not all(type(i) is int and i in vocabulary for i in ids):
            raise ServerFault("a response that is not token ids of this model")
        ends = [i for i, token in enumerate(ids) if token in eos_ids]
        whole = ends == [len(ids) - 1] and len(ids) <= longest
        cut = not ends and len(ids) == longest
        if not (whole if finished is True else cut and finished is False):
            raise ServerFault(
                f"a response of {len(ids)} tokens that neither ends with an end-of-sequence token "
                f"nor has all {longest}"
            )
        logprobs = _numbers(row.get("logprobs"), len(ids))
        return Sampled(ids=ids, logprobs=logprobs, finished=whole)

    def _request(self, message: dict[str, Any], deadline: float) -> dict[str, Any]:
        if self._address is None:
            raise ServerFault("there is no server")
        left = deadline - time.monotonic()
        try:
            with socket.create_connection(self._address, timeout=max(left, 1e-3)) as connection:
                wire.send(connection, message | {"key": self._key}, deadline)
                reply = wire.receive(connection, deadline)
        except (OSError, wire.WireError) as error:
            raise ServerFault(f"{error or type(error).__name__}{self._last_words()}") from error
        if "error" in reply:
            raise ServerFault(f"the server says: {str(reply['error'])[:500]}")
        return reply

    def _start(self, deadline: float) -> None:
        """A new process of our own, with random weights; raises ServerFault."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._address = None
        assert self._log is not None
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "opsdc.rollout.vllm.server"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                # Ctrl-C is the trainer's to handle.
                start_new_session=True,
            )
        # Without it the process would outlive a sampler that is dropped.
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
                raise ServerFault(f"did not start in {waited:.0f} s{self._last_words()}")
        line = self._process.stdout.readline()
        if not line:
            raise ServerFault(f"ended while it started{self._last_words()}")
        self._address = ("127.0.0.1", int(json.loads(line)["port"]))

    def _last_words(self) -> str:
        if self._log is None or self._process is None or self._process.poll() is None:
            return ""
        text = self._log.read_text("utf-8", errors="replace").strip().splitlines()
        return f" (process ended with {self._process.returncode}; {self._log}: {text[-1:]})"


def _numbers(values: Any, count: int) -> list[float]:
    if (
        not isinstance(values, list)
        or len(values) != count
        or not all(type(v) in (int, float) and math.isfinite(v) and v <= 1e-3 for v in values)
    ):
        raise ServerFault(f"not {count} log-probabilities")
    return [float(v) for v in values]
