"""Peak resident memory of a call on Linux, from the kernel's own high-water mark."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path


def added_mib(call: Callable[[], object]) -> float:
    """MiB that `call` held at once above what was resident before it.

    Needs a process in which little was freed before: freed memory that the allocator kept would
    hide what the call takes.
    """
    ctypes.CDLL(None).malloc_trim(0)
    before = _status_mib("VmRSS")
    # proc(5): writing 5 resets the high-water mark of the resident set.
    Path("/proc/self/clear_refs").write_text("5")
    call()
    return _status_mib("VmHWM") - before


def resident_peak() -> int:
    """The high-water mark of the resident set, in bytes."""
    return round(_status_mib("VmHWM") * 2**20)


def _status_mib(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {field}: this benchmark needs Linux")
