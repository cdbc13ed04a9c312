"""Compile C for this processor on first use, and keep the libraries in the user's cache.

A library's name is a hash of source, headers, compiler, flags and processor, so that nothing stale
is loaded. It is built aside and renamed, so that processes may start together. It is loaded only
from a directory of mode 0700 that is ours, below directories that others cannot write to.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import re
import shutil
import stat
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

SWITCH = "OPSDC_NATIVE"
"""Environment variable: 0 leaves everything to torch."""
TIMEOUT_S = 120


@dataclass(frozen=True, slots=True)
class Build:
    """A library, or none."""

    dll: ctypes.CDLL | None
    description: str
    """The code that runs in its place and the reason, or its compiler."""


def built(source: Path) -> Build:
    """`source` as a library, or why there is none. Compiles in the first call that needs to."""
    if os.environ.get(SWITCH, "1") == "0":
        return Build(None, f"torch ({SWITCH}=0)")
    return _built(source, os.environ.get("CC"), os.environ.get("XDG_CACHE_HOME"))


@functools.cache
def _built(source: Path, chosen: str | None, cache: str | None) -> Build:
    names = [chosen] if chosen else ["cc", "gcc", "clang"]
    compiler = next(filter(None, map(shutil.which, names)), None)
    if compiler is None:
        return Build(None, f"torch (no C compiler: {', '.join(names)} not found)")
    try:
        library = load(compiler, source, Path(cache or "~/.cache").expanduser() / "opsdc_kernels")
    except (OSError, subprocess.SubprocessError) as error:
        return Build(None, f"torch ({compiler} or its cache failed: {_reason(error)})")
    return Build(library, f"compiled by {compiler}")


def _reason(error: Exception) -> str:
    lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def load(compiler: str, source: Path, directory: Path) -> ctypes.CDLL:
    """The library made from `source`, compiled unless `directory` has it.

    Raises:
        OSError: the directory cannot be made, or others could have written to it.
        subprocess.SubprocessError: the compiler failed.
    """
    flags = _flags()
    identity = (_with_headers(source), _version(compiler).encode(), repr(flags).encode(), _cpu())
    name = hashlib.sha256(b"\0".join(identity)).hexdigest()[:32]
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    _check_private(directory)
    path = directory / f"{source.stem}-{name}.so"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=directory) as aside:
            made = Path(aside) / path.name
            command = [compiler, *flags, "-o", str(made), str(source), "-lm"]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=TIMEOUT_S)
            made.replace(path)
    _check_owned(path.lstat(), path)
    return ctypes.CDLL(str(path))


def _with_headers(source: Path) -> bytes:
    """The text of a source and of every header of ours that it includes."""
    text = source.read_bytes()
    names = re.findall(rb'^#include "(.+)"', text, re.MULTILINE)
    return b"".join([text, *(_with_headers(source.parent / name.decode()) for name in names)])


def _flags() -> tuple[str, ...]:
    tuned = "-march=native" if platform.machine() in ("x86_64", "AMD64") else "-mcpu=native"
    # Neither may change a result: errno and traps alone keep compilers from making vectors.
    return (
        "-std=gnu11", "-O3", tuned, "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math",
        "-fPIC", "-shared",
    )  # fmt: skip


def _version(compiler: str) -> str:
    return subprocess.run(
        [compiler, "--version"], check=True, capture_output=True, text=True, timeout=TIMEOUT_S
    ).stdout


def _cpu() -> bytes:
    """The meaning of `native` on this machine: a cache may be shared by several."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return repr(platform.uname()[3:]).encode()
    wanted = ("model", "flags", "Features", "CPU implementer", "CPU part", "isa")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)})).encode()


def _check_private(directory: Path) -> None:
    status = directory.lstat()
    if stat.S_ISLNK(status.st_mode) or stat.S_IMODE(status.st_mode) != 0o700:
        raise PermissionError(f"{directory} must be a directory of mode 0700, not a link")
    _check_owned(status, directory)
    for parent in directory.resolve().parents:
        mode = parent.stat().st_mode
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            raise PermissionError(f"{parent} can be written to by everybody")


def _check_owned(status: os.stat_result, path: Path) -> None:
    if status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"{path} belongs to another user, or others can write to it")
