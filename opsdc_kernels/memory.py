"""Peak memory of a call, beside what was held before it."""

from __future__ import annotations

import contextlib
import ctypes
import resource
import threading
from pathlib import Path

import torch


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
