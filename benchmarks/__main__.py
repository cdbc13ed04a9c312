"""All benchmarks in one run: first that the loss is right, then who is how fast, big and wrong.

    python -m benchmarks --quick                (about 5 minutes on two CPU cores)
    python -m benchmarks --save cpu-full        (about half an hour; into benchmarks/records/)
    python -m benchmarks.tables --write         (tables and plots of the docs from the records)

Peers come from benchmarks/peers.txt; one that cannot be imported, or fails, is listed with its
reason. What a run with --save has measured when it is stopped is kept in a .part file: the same
command at the same commit goes on from there.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from benchmarks import (
    accuracy,
    columns,
    memory,
    phases,
    planned,
    real_states,
    record,
    scaling,
    speed,
    step,
    tables,
)
from benchmarks.contenders import Failure, contenders, default_device
from opsdc_kernels import testing

GATE = (
    {"entropy": 0.5, "kl": 1e-2},
    {"entropy": 0.05, "kl": 1e-5},
    {"entropy": 1.0, "kl": 1e-4, "shared_head": False},
)


def gate() -> None:
    """No figure of wrong code: raises AssertionError before anything is measured."""
    for options in GATE:
        case = testing.make_case(tokens=33, dim=64, vocab_size=4099, **options)
        for divergence in ("reverse_kl", "forward_kl", "jsd"):
            testing.assert_accurate(case, divergence=divergence)


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    device = default_device()
    environment = record.environment(device)
    if options.save and environment["dirty"]:
        print("benchmarks: uncommitted changes; commit first, or leave --save out", file=sys.stderr)
        return 2
    print(record.describe(environment))
    gate()
    print("correctness gate passed\n")
    running, missing = contenders(device)
    for contender in running:
        print(f"  {contender.name:<28}{contender.package} {contender.version}")
    for name, reason in missing.items():
        print(f"  {name:<28}not run: {reason}")
    shape = speed.QUICK if options.quick else speed.FULL
    found = record.begun(options.save, environment) or {
        "environment": environment,
        "quick": options.quick,
        "missing": missing,
        "shape": asdict(shape),
        "seconds": {},
    }
    unfinished = False
    for key, (title, measure) in _sections(shape, device, quick=options.quick).items():
        if key in found:
            print(f"\n== {title}: measured before")
            continue
        print(f"\n== {title}", flush=True)
        started = time.perf_counter()
        try:
            rows = measure()
        except Exception:
            # What the other sections measure is worth keeping.
            traceback.print_exc()
            unfinished = True
            continue
        found[key] = [asdict(row) for row in rows if not isinstance(row, Failure)]
        found["missing"] |= {r.contender: r.reason for r in rows if isinstance(r, Failure)}
        found["seconds"][key] = round(time.perf_counter() - started)
        print(f"({found['seconds'][key]} s)")
        if options.save:
            record.save(record.part(options.save), found)
    if unfinished:
        print("benchmarks: a section failed, see above; nothing is recorded", file=sys.stderr)
        return 1
    print("\n" + tables.render(found))
    if options.save:
        print(f"\nwritten: {record.finish(options.save)}; now: python -m benchmarks.tables --write")
    return 0


def _sections(
    shape: speed.Shape, device: torch.device, *, quick: bool
) -> dict[str, tuple[str, Callable[[], list[Any]]]]:
    """Key in the record: title, and what measures it."""
    repeats = 3
    on_cpu = device.type == "cpu"
    found: dict[str, tuple[str, Callable[[], list[Any]]]] = {
        "speed": (
            f"Time in units of the bare head GEMM; {shape}",
            lambda: speed.measure(shape, device, repeats=repeats, compiled=not quick),
        ),
        "memory": (
            f"Peak memory beside inputs; {shape}",
            lambda: memory.measure_all(shape, compiled=not quick),
        ),
        "accuracy": (
            "Errors against float64: loss, dH, dW",
            lambda: accuracy.measure(device, quick=quick),
        ),
        "scaling": ("Scaling", lambda: scaling.measure(device, quick=quick)),
    }
    if on_cpu:
        found["planned"] = ("GEMMs planned and counted", planned.measure)
        found["phases"] = (
            "Where the time beyond the GEMMs goes",
            lambda: phases.measure(shape, repeats=repeats),
        )
    if on_cpu and not quick:
        found["columns"] = (
            "Vocabulary columns left out",
            lambda: columns.measure_all(repeats=repeats),
        )
        found["step"] = ("A whole update of the demo's model", lambda: step.measure(repeats=3))
        found["states"] = (
            "Errors on the demo model's hidden states: loss, dH, dW",
            lambda: real_states.measure(*real_states.real_cases()),
        )
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--quick", action="store_true", help="small sizes, no compiled peers, no whole updates"
    )
    parser.add_argument(
        "--save", metavar="NAME", help="write benchmarks/records/NAME.json (needs a clean tree)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
