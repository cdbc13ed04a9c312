"""The server: a process that holds one vLLM engine and serves one trainer.

`opsdc serve --config FILE --rollout.server_address HOST:PORT --rollout.weights_dir DIR` starts one
by hand; a run without `rollout.server_address` starts its own, which ends with the run. One
connection is one request and one answer (`opsdc.rollout.vllm.wire`):

    {"op": "hello"}                                   → protocol, vLLM's version, options
    {"op": "load", "folder", "weights_id", "probe"}   → the probe's log-probabilities
    {"op": "sample", "requests": [{"key", "ids", "seed"}], "params", "eos_ids", "probe"}
                                                      → responses, weights_id, the probe again

Requests are served one after the other, so that no batch can see two versions of the weights.
"""

from __future__ import annotations

import dataclasses
import hmac
import ipaddress
import json
import os
import re
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from opsdc.config.settings import OPSDCConfig
from opsdc.errors import ConfigError
from opsdc.models import demo_model
from opsdc.rollout.base import SamplingParams
from opsdc.rollout.vllm import wire
from opsdc.rollout.vllm.engine import VLLMEngine, engine_options
from opsdc.rollout.vllm.messages import EngineOptions, SampleCall

KEY_VARIABLE = "OPSDC_SERVER_KEY"
"""Server and trainer read their key from this environment variable."""

PROTOCOL = 1
"""Both sides must speak the same version of the messages."""

_PATIENCE_S = 10.0
"""A peer that connects and says nothing keeps the trainer waiting no longer than this."""

_FOLDER = re.compile(r"[0-9a-f-]+")
"""Names of folders of weights have this form, which leads nowhere else."""


def serve(
    engine: VLLMEngine,
    *,
    host: str,
    port: int,
    key: str,
    weights_dir: Path,
    ready: Callable[[int], None],
) -> None:
    """Answer requests until the process ends; `ready` is called with the port first.

    Raises ConfigError for a host that other machines reach, without a key.
    """
    check_place(host, key)
    if not _is_loopback(host):
        print(
            f"opsdc serve: other machines reach {host}; who has the key can use the engine, and "
            "nothing that is sent is encrypted",
            file=sys.stderr,
            flush=True,
        )
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, port), family=family) as listener:
        ready(listener.getsockname()[1])
        while True:
            connection, _ = listener.accept()
            with connection:
                _answer(engine, connection, key, weights_dir)


def check_place(host: str, key: str) -> None:
    """Raise ConfigError for a place that other machines reach without a key."""
    if not _is_loopback(host) and not key:
        raise ConfigError(
            f"rollout.server_address {host} is not only this machine's: set a key in the "
            f"environment variable {KEY_VARIABLE} on both sides, or use 127.0.0.1"
        )


def split_address(address: str) -> tuple[str, int]:
    """Split HOST:PORT, of the form that the settings have checked; [::1]:8000 gives ::1."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def _is_loopback(host: str) -> bool:
    """Return True for a host that only this machine reaches."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        # A name, even 127.0.0.1.example.org, leads wherever its owner wants.
        return False


def _answer(engine: VLLMEngine, connection: socket.socket, key: str, weights_dir: Path) -> None:
    """Serve one connection: a request with the right key gets its answer."""
    try:
        message = wire.receive(connection, time.monotonic() + _PATIENCE_S)
        if key and not hmac.compare_digest(str(message.get("key", "")).encode(), key.encode()):
            reply: dict[str, Any] = {"error": f"wrong or missing key; set {KEY_VARIABLE}"}
        else:
            reply = _reply(engine, message, weights_dir)
        wire.send(connection, reply, time.monotonic() + _PATIENCE_S)
    except wire.WireError as error:
        print(f"opsdc serve: {error}", file=sys.stderr, flush=True)


def _reply(engine: VLLMEngine, message: dict[str, Any], weights_dir: Path) -> dict[str, Any]:
    """Do what a request asks for and return the answer; a failure is an answer too."""
    try:
        if message["op"] == "hello":
            facts = dataclasses.asdict(engine.options)
            return {"protocol": PROTOCOL, "vllm": engine.description, "options": facts}
        if message["op"] == "load":
            name = message["folder"]
            # Whatever is asked for, weights are read below the run's folder only.
            if not _FOLDER.fullmatch(name):
                raise ValueError(f"no folder of weights: {name!r}")
            probe = engine.load(weights_dir / name, message["weights_id"], message["probe"])
            return {"weights_id": message["weights_id"], "probe": probe}
        if message["op"] == "sample":
            requests = message["requests"]
            batch = engine.sample(
                SampleCall(
                    prompts=[r["ids"] for r in requests],
                    seeds=[r["seed"] for r in requests],
                    params=SamplingParams(**message["params"]),
                    eos_ids=message["eos_ids"],
                    probe=message["probe"],
                )
            )
            rows = [
                {"key": r["key"], **dataclasses.asdict(row)}
                for r, row in zip(requests, batch.rows, strict=True)
            ]
            return {"weights_id": batch.weights_id, "probe": batch.probe, "rows": rows}
        raise ValueError(f"no operation {message['op']!r}")
    # The trainer decides what a failure of the engine means, so it is told of each.
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def serve_run(config: OPSDCConfig) -> None:
    """Run the server of `opsdc serve`, for a run with the same configuration.

    Raises ConfigError without an address and a folder of weights.
    """
    address, weights_dir = config.rollout.server_address, config.rollout.weights_dir
    if address is None or weights_dir is None:
        raise ConfigError(
            "opsdc serve needs --rollout.server_address HOST:PORT and --rollout.weights_dir DIR, "
            "the same as the run's"
        )
    host, port = split_address(address)
    key = os.environ.get(KEY_VARIABLE, "")
    check_place(host, key)
    model = AutoConfig.from_pretrained(
        demo_model.resolve(config.model.name_or_path),
        revision=config.model.revision,
        trust_remote_code=config.model.trust_remote_code,
    )
    with tempfile.TemporaryDirectory(prefix="opsdc-vllm-") as folder:
        options = engine_options(config, model.architectures[0], model, Path(folder), sleeps=False)
        engine = VLLMEngine(options)
        serve(
            engine,
            host=host,
            port=port,
            key=key,
            weights_dir=Path(weights_dir),
            ready=lambda port: print(
                f"{engine.description}, listening on {host}:{port}", flush=True
            ),
        )


def main() -> None:
    """Run the server that a run starts itself.

    Its options come by standard input, whose end says that the run is gone.
    """
    spec = json.loads(sys.stdin.readline())
    weights_dir = Path(spec["weights_dir"])

    def end_with_the_run() -> None:
        sys.stdin.read()
        shutil.rmtree(weights_dir, ignore_errors=True)
        os._exit(0)

    threading.Thread(target=end_with_the_run, daemon=True).start()
    # Standard output carries only the line with the port; all that vLLM prints goes to stderr.
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def ready(port: int) -> None:
        print(json.dumps({"port": port}), file=answer, flush=True)

    engine = VLLMEngine(EngineOptions(**spec["options"]))
    serve(engine, host="127.0.0.1", port=0, key=spec["key"], weights_dir=weights_dir, ready=ready)


if __name__ == "__main__":
    main()
