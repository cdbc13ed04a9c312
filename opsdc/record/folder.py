"""The folder of a run: one run at a time, and nothing left in it by a start that failed."""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from opsdc.errors import ConfigError
from opsdc.record.lines import writing

_LOCK = ".lock"
"""The name of the file that a run holds, which says who it is."""


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Hold `folder` for this run within the block, and make it where it is not there.

    The system itself gives a lock back when its process ends, however it ends: what a killed run
    left is taken over, what a living one holds never is. A folder that was made for the block and
    is still empty at its end is removed. Raises ConfigError where another run holds the folder,
    CheckpointError where it cannot be written.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = _lock(folder / _LOCK)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            (folder / _LOCK).unlink()
            for path in made:
                path.rmdir()
        lock.close()


def _lock(path: Path) -> TextIO:
    """Open and lock the file, and write into it who holds it."""
    file = path.open("a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The file may have been removed, by the run that ended, after it was opened here.
        taken = not (path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()))
    except BlockingIOError:
        taken = True
    except OSError as error:
        print(f"{path} cannot be locked ({error}): let no second run use it", file=sys.stderr)
        taken = False
    file.seek(0)
    holder = file.read().strip() or "another run"
    if taken:
        file.close()
        raise ConfigError(
            f"output_dir {path.parent} is in use by {holder}: two runs would overwrite each "
            "other's record; let that one end, or name another output_dir"
        )
    file.truncate(0)
    now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    file.write(f"process {os.getpid()} on {platform.node()}, since {now}")
    file.flush()
    return file
