"""One whole OPSDC update: teacher pass, student pass, loss, backward, with each loss in turn.

    python -m benchmarks.step                    (about 5 minutes on two CPU cores)

The demo's model, its prompts, responses of the demo's cap; full fine-tuning against a teacher with
a head of its own. Same tokens for everyone; only the loss changes. Peak memory is that of loss and
backward in a process of its own. End to end the bf16 backbone's rounding adds to every loss alike:
see `python -m benchmarks.real_states`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from benchmarks.contenders import Contender, contenders
from benchmarks.memory import fresh_processes
from benchmarks.resident import added_mib
from opsdc.batch import TokenBatch, token_batch
from opsdc.config import OPSDCConfig
from opsdc.dataset import prompted_sets
from opsdc.model import hidden_states, load_model, load_tokenizer, read_head

PROMPTS, RESPONSE = 8, 96
CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Step:
    """Medians over the repeats, seconds."""

    contender: str
    teacher: float
    forward: float
    loss: float
    """Its forward and its own backward, to hidden states and head."""
    backward: float
    """Of the backbone."""
    peak_mib: float
    """Added by loss and backward."""

    @property
    def whole(self) -> float:
        return self.teacher + self.forward + self.loss + self.backward

    def __str__(self) -> str:
        return (
            f"{self.contender:<18}teacher {self.teacher:5.2f} s  forward {self.forward:5.2f}  loss "
            f"{self.loss:5.2f} ({self.loss / self.whole:4.0%})  backward {self.backward:5.2f}  "
            f"whole {self.whole:5.2f} s  {self.peak_mib:6.0f} MiB"
        )


def measure(*, repeats: int) -> list[Step]:
    """Contenders interleaved; prints each line."""
    running = [c for c in contenders(CPU)[0] if not (c.compiled or c.cross_entropy)]
    model, batches = _setting()
    stale_head = read_head(model).weight.detach().clone()
    times: dict[tuple[str, str], list[float]] = defaultdict(list)
    for _ in range(repeats + 1):
        for contender in running:
            for phase, spent in _phases(model, batches, stale_head, contender).items():
                times[contender.name, phase].append(spent)
    found = []
    for contender in running:
        medians = {
            phase: statistics.median(values[1:])
            for (name, phase), values in times.items()
            if name == contender.name
        }
        with ProcessPoolExecutor(1, mp_context=fresh_processes()) as fresh:
            peak = fresh.submit(_peak, contender.name).result()
        step = Step(contender.name, **medians, peak_mib=peak)
        print(step, flush=True)
        found.append(step)
    return found


def _setting() -> tuple[Any, dict[str, TokenBatch]]:
    config = OPSDCConfig.load("smollm2-cpu")
    tokenizer = load_tokenizer(config.model)
    problems, _ = prompted_sets(config, tokenizer)
    generator = torch.Generator().manual_seed(0)
    responses = torch.randint(99, 49_000, (PROMPTS, RESPONSE), generator=generator).tolist()
    batches = {
        side: token_batch(
            [
                (getattr(item.prompts, f"{side}_ids"), response)
                for item, response in zip(problems.batch(1, PROMPTS), responses, strict=True)
            ],
            packed=False,
            pad_id=0,
            device=CPU,
        )
        for side in ("student", "teacher")
    }
    model = load_model(config.model)
    model.train()
    return model, batches


def _phases(
    model: Any, batches: dict[str, TokenBatch], stale_head: Tensor, contender: Contender
) -> dict[str, float]:
    clock = [time.perf_counter()]

    def lap() -> None:
        clock.append(time.perf_counter())

    model.zero_grad()
    with torch.no_grad():
        teacher = hidden_states(model, batches["teacher"])
    lap()
    student = hidden_states(model, batches["student"])
    lap()
    leaf = student.detach().requires_grad_()
    weight = read_head(model).weight
    contender.loss(leaf, weight, teacher, stale_head).backward()
    lap()
    student.backward(leaf.grad)
    lap()
    spent = [after - before for before, after in pairwise(clock)]
    return dict(zip(("teacher", "forward", "loss", "backward"), spent, strict=True))


def _peak(name: str) -> float:
    contender = next(c for c in contenders(CPU)[0] if c.name == name)
    model, batches = _setting()
    with torch.no_grad():
        teacher = hidden_states(model, batches["teacher"])
    student = hidden_states(model, batches["student"])
    weight = read_head(model).weight
    stale = weight.detach().clone()
    return added_mib(lambda: contender.loss(student, weight, teacher, stale).backward())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3, help="(default %(default)s)")
    measure(repeats=parser.parse_args().repeats)


if __name__ == "__main__":
    main()
