"""Peak memory of loss and backward, beside inputs; each contender in a process of its own.

    python -m benchmarks.memory --quick

On a CPU the peak of resident memory, from the kernel; on a GPU the allocator's. What is returned
(the gradients) is counted in, and shown beside.
"""

from __future__ import annotations

import argparse
import multiprocessing
import multiprocessing.context
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass

import torch

from benchmarks.contenders import (
    PEER_MODULES,
    Contender,
    Failure,
    contenders,
    default_device,
)
from benchmarks.inputs import Shape, inputs
from benchmarks.resident import added_mib
from benchmarks.speed import FULL, QUICK
from opsdc_kernels import plan
from opsdc_kernels.memory import PeakMemory

WARM_UP = Shape(tokens=4, dim=8, vocab_size=64)
"""Loads code and thread pools, whose memory is not the contender's."""
PLANNED = {"ours, chunked": "chunked", "ours, fused": "fused"}
"""Backends whose memory follows from the sizes alone."""
PRODUCT_ROWS = 512
"""Enough for the matrix library to take all the packing buffers that it takes for a head."""


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
    """By `opsdc_kernels.plan`, for `PLANNED`."""

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

    _multiply(shape, device)
    # A compiler's own memory is not the contender's either, and it compiles for a shape.
    run(shape if contender.compiled else WARM_UP)
    returned = shape.tokens * shape.dim + (shape.vocab_size * shape.dim if trainable else 0)
    predicted = None
    if contender.name in PLANNED:
        predicted = (
            plan.estimate(
                tokens=shape.tokens,
                vocab_size=shape.vocab_size,
                student_dim=shape.dim,
                device=device,
                trainable_head=trainable,
                backend=PLANNED[contender.name],
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


def _multiply(shape: Shape, device: torch.device) -> None:
    """The three kinds of product with the head. The matrix library keeps its packing buffers, some
    20 MiB, for the life of the process, whoever asks for a product first."""
    hidden = torch.zeros(min(PRODUCT_ROWS, shape.tokens), shape.dim, device=device)
    weight = torch.zeros(shape.vocab_size, shape.dim, device=device)
    logits = hidden @ weight.T
    torch.mm(logits, weight, out=hidden)
    weight.addmm_(logits.T, hidden)


def measure(name: str, shape: Shape, trainable: bool) -> Peak | Failure:
    """In a fresh process."""
    with ProcessPoolExecutor(1, mp_context=fresh_processes()) as fresh:
        try:
            return fresh.submit(_named, name, shape, trainable).result()
        except BrokenProcessPool:
            return Failure(name, "its process was killed, probably for want of memory")
        except Exception as error:
            return Failure.of(name, error)


def fresh_processes() -> multiprocessing.context.BaseContext:
    """Processes forked from one that has imported everything and computed nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.inputs", *PEER_MODULES])
    return context


def _named(name: str, shape: Shape, trainable: bool) -> Peak:
    device = default_device()
    chosen = next(c for c in contenders(device)[0] if c.name == name)
    return measure_here(chosen, shape, trainable, device)


def measure_all(shape: Shape, *, compiled: bool = True) -> list[Peak | Failure]:
    """Every contender, trainable head and frozen; prints each line."""
    found = []
    for contender in contenders(default_device())[0]:
        for trainable in (True, False):
            if compiled or not contender.compiled:
                found.append(measure(contender.name, shape, trainable))
                print(found[-1], flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help=f"{QUICK} instead of {FULL}")
    quick = parser.parse_args().quick
    measure_all(QUICK if quick else FULL, compiled=not quick)


if __name__ == "__main__":
    main()
