"""Runs in processes of their own that can be killed: forked from one that has imported everything.

A fresh interpreter needs seconds for torch and transformers; a fork of the warm server 20 ms. The
server never starts a thread, and each fork is a process like any other to signals and to disks.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import sys
import time
from multiprocessing import forkserver
from pathlib import Path

_CONTEXT = multiprocessing.get_context("forkserver")


def warm():
    """Start the server; later calls do nothing."""
    _CONTEXT.set_forkserver_preload(["helpers.runs_warm"])
    # The server gets our search path through its environment alone, when it starts.
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def start(settings, prepare=None, *arguments):
    """Train in another process, after `prepare(*arguments)` in it; exit status 0 or the error's."""
    warm()
    process = _CONTEXT.Process(target=_run, args=(settings, prepare, arguments))
    process.start()
    # Else a start in another thread would look after this process too, and of two that ask for its
    # exit status one is told 255.
    multiprocessing.process._children.discard(process)
    return process


def finish(settings, prepare=None, *arguments):
    """Train to the end; the exit status (a signal's is negative)."""
    process = start(settings, prepare, *arguments)
    assert wait(process, 120) < 120, "a run of seconds took minutes"
    return process.exitcode


def wait(process, limit_s):
    """Seconds until the process ended, `limit_s` where it did not.

    By a clock that stands still while this process is suspended itself, as a busy machine may do
    with all of them.
    """
    waited = 0.0
    while process.exitcode is None and waited < limit_s:
        began = time.monotonic()
        process.join(0.1)
        waited += min(time.monotonic() - began, 0.2)
    return waited


def _run(settings, prepare, arguments):
    import torch

    from opsdc import cli
    from opsdc.eval import report

    torch.set_num_threads(1)
    out = Path(settings["output_dir"])
    out.parent.mkdir(parents=True, exist_ok=True)
    log = os.open(f"{out}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    # The picture of a run is drawn from its record and takes longer than all else here.
    report.plot_run = lambda run: run
    # YAML reads JSON; the command's own way in brings its handlers and its exit status.
    config = out.with_suffix(".json")
    # Aside and renamed: ranks of one run all write it.
    aside = config.with_suffix(f".{os.getpid()}")
    aside.write_text(json.dumps(settings))
    aside.replace(config)
    if prepare is not None:
        prepare(*arguments)
    sys.exit(cli.main(["train", "--config", str(config)]))


def leftovers(out):
    """Names below a run's folder that no finished run has."""
    return sorted(str(p.relative_to(out)) for p in Path(out).rglob("*") if "tmp" in p.name)


def outcome(out):
    """What must not depend on how a run came about: every recorded number, every final weight."""
    out = Path(out)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    record = [{k: v for k, v in row.items() if not k.startswith("perf/")} for row in rows]
    (last,) = sorted((out / "checkpoints").glob("step-*"))[-1:]
    weights = [last / "model", last / "teacher", out / "model", *last.glob("optimizer*")]
    return {
        "record": record,
        "rollouts": (out / "rollouts.jsonl").read_text(),
        "sha256": {
            str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
            for root in weights
            for path in ([root] if root.is_file() else sorted(root.glob("*.safetensors")))
        },
    }


def log(out):
    return Path(f"{out}.log").read_text()
