"""Memory: the share of it that a call may take, and the peak of what one took."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import threading
from pathlib import Path

import torch

CPU_WORKSPACE_CAP_BYTES = 192 << 20
"""More rows per chunk than this buys at real vocabularies make nothing faster on a CPU."""


def default_workspace_bytes(device: torch.device) -> int:
    """1/64 of the device's *total* memory, so that a run repeats whatever else is running."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory // 64
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(total // 64, CPU_WORKSPACE_CAP_BYTES)


class PeakMemory:
    """Context manager; afterwards `peak_mib` is the most that was held at once, above its start.

    On a GPU exact, from the allocator. Elsewhere resident memory, sampled every millisecond: it
    misses shorter peaks, and counts what other threads of the process take.
    """

    peak_mib = 0.0

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
            return self
        # Memory freed earlier stays resident and would hide what the call takes.
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        self._before = self._peak = _resident_bytes()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            self._peak = torch.cuda.max_memory_allocated(self.device)
        else:
            self._stop.set()
            self._thread.join()
        self.peak_mib = (self._peak - self._before) / 2**20

    def _sample(self) -> None:
        while not self._stop.wait(0.001):
            self._peak = max(self._peak, _resident_bytes())


def _resident_bytes() -> int:
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:  # no /proc: the high-water mark, which cannot fall
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
