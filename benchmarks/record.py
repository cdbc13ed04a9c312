"""What is kept of a run: figures, and on what machine, versions and commit they were measured."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

RECORDS = Path(__file__).parent / "records"
PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "liger-kernel",
    "trl",
    "orda-kernel",
    "unsloth-zoo",
    "cut-cross-entropy",
)


class DirtyTree(RuntimeError):
    """Figures of code that no commit holds."""


def environment(device: torch.device) -> dict[str, Any]:
    """Machine, versions, commit and command."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "command": "python -m benchmarks " + " ".join(sys.argv[1:]),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }


def save(path: Path, record: dict[str, Any]) -> None:
    """Raises DirtyTree for a record of uncommitted code."""
    if record["environment"]["dirty"]:
        raise DirtyTree(
            f"{path} is not written: the tree has uncommitted changes, so no commit holds the code "
            "that was measured; commit first"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", "utf-8")


def part(name: str) -> Path:
    """What an unfinished run has measured so far."""
    return RECORDS / f"{name}.json.part"


def begun(name: str | None, environment: dict[str, Any]) -> dict[str, Any] | None:
    """An unfinished run of the same command, commit, versions and machine; else None."""
    if name is None or not part(name).exists():
        return None
    found = load(part(name))
    same = {**found["environment"], "date": environment["date"]} == environment
    return found if same else None


def finish(name: str) -> Path:
    """The unfinished run becomes the record."""
    return part(name).rename(RECORDS / f"{name}.json")


def load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text("utf-8"))


def describe(environment: dict[str, Any]) -> str:
    """One line for tables and plots."""
    return (
        f"{environment['device']}, {environment['threads']} threads, "
        f"torch {environment['versions']['torch']}, commit {environment['commit'][:10]}, "
        f"{environment['date']}"
    )


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git(*arguments: str) -> str:
    folder = Path(__file__).parent
    done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else "unknown"
