"""Everything that there is to measure on one GPU, in at most eight minutes, in one command.

    make gpu-day                             (or: python -m benchmarks.gpu_day)
    python -m benchmarks.gpu_day --forecast  what would be done, and the seconds that it should take
    python -m benchmarks.gpu_day --rehearse  the same on a CPU: tiny sizes, Triton's interpreter

Stages, most valuable first: correctness against float64; the contest with torch, Liger and TRL at
production sizes; tile configurations of `fused`; one training step beside its plan. Every cell is
written to OUT/cells.jsonl when it is done, and the same command with the same code, versions and
device goes on behind what is there. A cell that fails is recorded with its error, one that would
overrun its stage is cut, and the day goes on. At the end: OUT/gpu-day.json, OUT/gpu-day.md,
OUT/configs.txt (the fastest tiles, in the format of configs.py), OUT/measured.json (which
opsdc_kernels/ takes in, for `auto` to go by) and OUT/gpu-day.png.

It needs no network. Where Liger, TRL or PEFT are missing, a line names the wheels to carry.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import queue
import sys
import threading
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks import record
from benchmarks.gpu import report
from benchmarks.gpu.stages import Cell, Stage, stages
from benchmarks.gpu.worker import Worker
from opsdc_kernels.fused.configs import target_of

ROOT = Path(__file__).parent.parent
LIMIT = 480.0
"""Seconds of the whole day."""
PATIENCE, LEAST = 4.0, 30.0
"""A cell is ended after so many times its forecast, but not before so many seconds."""
CARRIED = ("liger-kernel", "trl", "peft")
"""Packages without which cells are skipped; each a wheel of a few megabytes at most."""


class Day:
    """The cells that are done, on disk after each, and the clock."""

    def __init__(self, out: Path, environment: dict[str, Any], limit: float) -> None:
        self.out, self.environment = out, environment
        self.identity = identity(environment)
        self.results: dict[str, dict[str, Any]] = {}
        self.cut: list[str] = []
        self.skipped: list[str] = []
        self._began, self._limit = time.monotonic(), limit
        self._lock = threading.Lock()
        self._file = out / "cells.jsonl"
        out.mkdir(parents=True, exist_ok=True)
        if self._file.exists():
            for line in self._file.read_text("utf-8").splitlines():
                self._read(line)

    def _read(self, line: str) -> None:
        try:
            result = json.loads(line)
        except ValueError:
            return  # the line that was being written when the day was stopped
        if result.get("identity") == self.identity:
            self.results[result["key"]] = result

    def spent(self) -> float:
        return time.monotonic() - self._began

    def fits(self, cell: Cell, until: float) -> bool:
        """True if the cell should end before its stage's and the day's."""
        return self.spent() + cell.seconds <= min(until, self._limit)

    def left(self) -> float:
        return self._limit - self.spent()

    def write(self, key: str, stage: Stage, cell: Cell, answer: Any) -> None:
        """Append a result, and see it to the disk."""
        result = {
            "key": key, "identity": self.identity, "stage": stage.key, "cell": cell.name,
            "seconds": round(answer.seconds, 2), "forecast": round(cell.seconds, 2),
            "error": answer.error, "rows": answer.rows,
        }  # fmt: skip
        with self._lock:
            with self._file.open("a", encoding="utf-8") as file:
                # A line cut short by a kill must not swallow this one.
                file.write("\n" + json.dumps(result, ensure_ascii=False))
                file.flush()
                os.fsync(file.fileno())
            self.results[key] = result
            said = "ok" if answer.error is None else f"FAILED: {answer.error}"
            if answer.rows:
                said = "; ".join(report.line(row) for row in answer.rows)
            print(f"  {cell.name}: {said} ({answer.seconds:.1f} s)", flush=True)

    def skip(self, cell: Cell) -> None:
        with self._lock:
            self.cut.append(cell.name)
            print(f"  {cell.name}: cut, {cell.seconds:.0f} s no longer fit", flush=True)

    def run(self, stage: Stage, until: float, device: str) -> None:
        """Run what is left of a stage before `until` seconds of the day."""
        waiting: queue.SimpleQueue[Cell] = queue.SimpleQueue()
        missing = self.environment["missing"]
        lacking = [c for c in stage.cells if any(c.needs == x.split("==")[0] for x in missing)]
        self.skipped += [cell.name for cell in lacking]
        known = [c for c in stage.cells if f"{stage.key}: {c.name}" in self.results]
        for cell in stage.cells:
            if cell not in known and cell not in lacking:
                waiting.put(cell)
        print(
            f"\n== {stage.key}. {stage.title}: {waiting.qsize()} cells to do, {len(known)} done "
            f"before, {len(lacking)} skipped for want of a package",
            flush=True,
        )
        count = min(stage.workers, waiting.qsize())
        threads = [
            threading.Thread(target=self._work, args=(stage, waiting, until, device))
            for _ in range(count)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _work(
        self, stage: Stage, waiting: queue.SimpleQueue[Cell], until: float, device: str
    ) -> None:
        worker = Worker(device)
        try:
            while True:
                try:
                    cell = waiting.get_nowait()
                except queue.Empty:
                    return
                if not self.fits(cell, until):
                    self.skip(cell)
                    continue
                most = min(max(PATIENCE * cell.seconds, LEAST), max(self.left(), LEAST / 2))
                answer = worker.run(cell.measure, cell.arguments, most)
                self.write(f"{stage.key}: {cell.name}", stage, cell, answer)
        finally:
            worker.close()

    def as_record(self, planned: list[Stage]) -> dict[str, Any]:
        """The record's format: environment, seconds, and everything that was found or not."""
        names = {f"{stage.key}: {cell.name}" for stage in planned for cell in stage.cells}
        results = [self.results[key] for key in self.results if key in names]
        return {
            "kind": report.KIND,
            "environment": self.environment,
            "seconds": {
                stage.key: round(sum(r["seconds"] for r in results if r["stage"] == stage.key), 1)
                for stage in planned
            },
            "cells": [{k: r[k] for k in r if k not in ("key", "identity")} for r in results],
            "cut": self.cut,
            "skipped": self.skipped,
            "missing": self.environment["missing"],
        }  # fmt: skip


def identity(environment: dict[str, Any]) -> str:
    """What must be the same for a result to count: code, versions, device, rehearsal or not."""
    kept = {key: environment[key] for key in ("source", "versions", "device", "rehearsal")}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]


def source_digest() -> str:
    """One number for all code that is measured: a copy of the tree may come without its git."""
    digest = hashlib.sha256()
    for package in ("opsdc", "opsdc_kernels", "benchmarks"):
        for path in sorted((ROOT / package).rglob("*")):
            if path.suffix in (".py", ".c", ".h", ".yaml"):
                digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def missing_wheels() -> list[str]:
    """The packages to carry, as pip names them with the versions of benchmarks/peers.txt."""
    text = (ROOT / "benchmarks" / "peers.txt").read_text("utf-8")
    pins = dict(line.split("==") for line in text.splitlines() if "==" in line)
    found = []
    for name in CARRIED:
        try:
            version(name)
        except PackageNotFoundError:
            found.append(f"{name}=={pins[name]}" if name in pins else name)
    return found


def main(arguments: list[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(given)
    if options.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"  # for the processes that are started below
    elif not torch.cuda.is_available() and not options.forecast:
        print("gpu-day: there is no GPU here; --rehearse runs it on the CPU", file=sys.stderr)
        return 2
    planned = stages(small=options.rehearse, cores=options.cores)
    _print_forecast(planned, options.minutes * 60)
    missing = missing_wheels()
    if missing:
        wheels = f"pip download --no-deps -d wheels {' '.join(missing)}"
        print(f"not installed, so cells that need them are skipped; to carry them: {wheels}")
    if options.forecast:
        return 0
    device = torch.device("cpu" if options.rehearse else "cuda")
    environment = {
        **record.environment(device),
        "command": " ".join(["python -m benchmarks.gpu_day", *given]),
        "source": source_digest(),
        "rehearsal": options.rehearse,
        "missing": missing,
        "target": "interpreter" if options.rehearse else target_of(device),
    }
    if options.save and (environment["dirty"] or options.rehearse):
        print("gpu-day: --save keeps records of a clean tree on a GPU only", file=sys.stderr)
        return 2
    day = Day(options.out, environment, options.minutes * 60)
    until = 0.0
    for stage in planned:
        until += stage.limit
        day.run(stage, until, device.type)
    found = day.as_record(planned)
    for path in report.write(found, options.out):
        print(f"written: {path}")
    if options.save:
        path = record.RECORDS / f"{options.save}.json"
        record.save(path, found)
        print(f"written: {path}; now: python -m benchmarks.tables --write")
    failed = [cell for cell in found["cells"] if report.is_wrong(cell)]
    print(
        f"\n{len(found['cells'])} cells, {len(failed)} of them wrong or failed, "
        f"{len(day.cut)} cut; {day.spent():.0f} s"
    )
    return 1 if failed else 0


def _print_forecast(planned: list[Stage], limit: float) -> None:
    for stage in planned:
        print(
            f"{stage.key}. {stage.title}: {len(stage.cells)} cells, {stage.arithmetic()} = "
            f"{stage.seconds:.0f} s of at most {stage.limit:.0f}"
        )
    total = sum(stage.seconds for stage in planned)
    print(f"together {' + '.join(f'{s.seconds:.0f}' for s in planned)} = {total:.0f} s "
          f"of {limit:.0f}")  # fmt: skip


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_day",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, default=ROOT / "runs" / "gpu-day", help="(default %(default)s)")
    add("--minutes", type=float, default=LIMIT / 60, help="of this run (default %(default)s)")
    add("--save", metavar="NAME", help="also write benchmarks/records/NAME.json")
    add("--cores", type=int, default=os.cpu_count() or 2, help="CPU cores (default %(default)s)")
    add("--rehearse", action="store_true", help="tiny sizes on the CPU, in Triton's interpreter")
    add("--forecast", action="store_true", help="print the stages and their seconds, and stop")
    return parser


if __name__ == "__main__":
    sys.exit(main())
