"""All benchmarks in one run: first that the loss is right, then who is how fast, big and wrong.

    python -m benchmarks --quick                (a few minutes on two CPU cores)
    python -m benchmarks --save cpu             (up to an hour; writes benchmarks/records/cpu.json)
    python -m benchmarks.tables --write         (README tables and plots from the records)

Peers come from benchmarks/peers.txt; one that cannot be imported is listed with its reason.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from typing import Any

from benchmarks import accuracy, memory, phases, record, scaling, speed, step, tables
from benchmarks.contenders import contenders, default_device
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
    quick = options.quick
    shape = speed.QUICK if quick else speed.FULL
    repeats = 3 if quick else 7
    found: dict[str, Any] = {
        "environment": environment,
        "quick": quick,
        "missing": missing,
        "shape": asdict(shape),
    }
    _title(f"Time in units of the bare head GEMM; {shape}")
    found["speed"] = _dicts(speed.measure(shape, device, repeats=repeats, compiled=not quick))
    if device.type == "cpu":
        _title("Where the time beyond the GEMMs goes")
        found["phases"] = _dicts(phases.measure(shape, repeats=repeats))
    _title(f"Peak memory beside inputs; {shape}")
    found["memory"] = _dicts(memory.measure_all(shape))
    if device.type == "cpu" and not quick:
        _title(f"A whole update of the demo model, {step.PROMPTS} × {step.RESPONSE} tokens")
        found["step"] = _dicts(step.measure(repeats=3))
    _title("Errors against float64: loss, dH, dW")
    found["accuracy"] = _dicts(accuracy.measure(device, quick=quick))
    _title("Scaling")
    found["scaling"] = _dicts(scaling.measure(device, quick=quick))
    if options.save:
        path = record.RECORDS / f"{options.save}.json"
        record.save(path, found)
        print(f"\nwritten: {path}; now: python -m benchmarks.tables --write")
    print("\n" + tables.render(found))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--quick", action="store_true", help="small sizes, no compiled peers, fewer repeats"
    )
    parser.add_argument(
        "--save", metavar="NAME", help="write benchmarks/records/NAME.json (needs a clean tree)"
    )
    return parser


def _title(text: str) -> None:
    print(f"\n== {text}", flush=True)


def _dicts(rows: list[Any]) -> list[dict[str, Any]]:
    return [asdict(row) for row in rows]


if __name__ == "__main__":
    sys.exit(main())
