"""Peak memory of loss and backward, beside inputs; each contender in a process of its own.

    python -m benchmarks.memory --quick

On a CPU the peak of resident memory, from the kernel; on a GPU the allocator's. What is returned
(the gradients) is counted in, and shown beside.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import asdict, dataclass

import torch

from benchmarks.contenders import Contender, contenders
from benchmarks.inputs import Shape, inputs
from benchmarks.resident import added_mib
from benchmarks.speed import FULL, QUICK
from opsdc_kernels import plan
from opsdc_kernels.memory import PeakMemory

WARM_UP = Shape(tokens=4, dim=8, vocab_size=64)
"""Loads code and thread pools, whose memory is not the contender's."""


@dataclass(frozen=True, slots=True)
class Peak:
    contender: str
    tokens: int
    dim: int
    vocab_size: int
    trainable: bool
    peak_mib: float
    returned_mib: float
    """Gradients of hidden states and head."""
    predicted_mib: float | None
    """By `opsdc_kernels.plan`, for ours."""

    def __str__(self) -> str:
        head = "trainable" if self.trainable else "frozen"
        predicted = "" if self.predicted_mib is None else f"  planned {self.predicted_mib:.0f}"
        return (
            f"{self.contender:<26}{head:<10} N {self.tokens:<6} V {self.vocab_size:<7}"
            f"{self.peak_mib:8.0f} MiB (of which returned {self.returned_mib:.0f}){predicted}"
        )


def measure_here(contender: Contender, shape: Shape, trainable: bool, device: torch.device) -> Peak:
    """In this process, which should have done nothing else."""

    def run(at: Shape) -> float:
        case = inputs(at, device=device)
        assert case.teacher_weight is not None
        hidden = case.student_hidden.requires_grad_()
        weight = case.student_weight.requires_grad_(trainable)

        def call() -> None:
            contender.loss(hidden, weight, case.teacher_hidden, case.teacher_weight).backward()

        if device.type == "cuda":
            with PeakMemory(device) as memory:
                call()
            return memory.peak_mib
        return added_mib(call)

    run(WARM_UP)
    returned = shape.tokens * shape.dim + (shape.vocab_size * shape.dim if trainable else 0)
    predicted = None
    if contender.package == "opsdc":
        predicted = (
            plan.estimate(
                tokens=shape.tokens,
                vocab_size=shape.vocab_size,
                student_dim=shape.dim,
                device=device,
                trainable_head=trainable,
                backend=contender.name.split()[-1],
            ).peak_bytes
            / 2**20
        )
    return Peak(
        contender.name,
        **asdict(shape),
        trainable=trainable,
        peak_mib=run(shape),
        returned_mib=4 * returned / 2**20,
        predicted_mib=predicted,
    )


def measure(name: str, shape: Shape, trainable: bool) -> Peak | str:
    """In a fresh process; a string says why there is no figure."""
    command = [sys.executable, "-m", "benchmarks.memory", "--only", name]
    command += ["--tokens", str(shape.tokens), "--dim", str(shape.dim)]
    command += ["--vocab-size", str(shape.vocab_size)]
    command += [] if trainable else ["--frozen"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["no output"]
        return f"{name}: exit status {done.returncode}: {last[0]}"
    return Peak(**json.loads(done.stdout.splitlines()[-1]))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help=f"{QUICK} instead of {FULL}")
    for hidden, kind in (("--only", str), ("--tokens", int), ("--dim", int), ("--vocab-size", int)):
        parser.add_argument(hidden, type=kind, help=argparse.SUPPRESS)
    parser.add_argument("--frozen", action="store_true", help=argparse.SUPPRESS)
    return parser


def main() -> None:
    options = _parser().parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    running, _ = contenders(device)
    if options.only:
        shape = Shape(tokens=options.tokens, dim=options.dim, vocab_size=options.vocab_size)
        chosen = next(c for c in running if c.name == options.only)
        print(json.dumps(asdict(measure_here(chosen, shape, not options.frozen, device))))
        return
    shape = QUICK if options.quick else FULL
    for contender in running:
        for trainable in (True, False):
            print(measure(contender.name, shape, trainable), flush=True)


if __name__ == "__main__":
    main()
