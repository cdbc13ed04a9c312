"""A progress bar on a terminal, and a line now and then in a log file."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

QUIET_SECONDS = 2.0
LOG_SECONDS = 20.0


class Progress:
    """Counts up to `total`; silent for work that ends within two seconds."""

    def __init__(self, label: str, *, total: int, unit: str) -> None:
        self._label, self._total, self._unit = label, total, unit
        self._n = 0
        self._started = time.monotonic()
        self._bar = (
            tqdm(total=total, desc=label, unit=unit, leave=False, delay=QUIET_SECONDS)
            if sys.stderr.isatty()
            else None
        )
        self._next_line = self._started + LOG_SECONDS

    def advance(self, n: int = 1) -> None:
        self.jump(self._n + n)

    def jump(self, n: int) -> None:
        """Move to n: work may end early, a batch whose responses are all complete for example."""
        step, self._n = n - self._n, n
        if self._bar is not None:
            self._bar.update(step)
        elif time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + LOG_SECONDS
            seconds = time.monotonic() - self._started
            print(
                f"  {self._label}: {self._n}/{self._total} {self._unit}s, {seconds:.0f} s",
                file=sys.stderr,
                flush=True,
            )

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
