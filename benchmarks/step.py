"""One whole OPSDC update: teacher pass, student pass, loss, backward, with ours and with others.

    python -m benchmarks.step                    (about 4 minutes on two CPU cores)

The demo's model, full fine-tuning against a stale teacher, on eight answers it sampled itself; the
same tokens for everyone. Ours and naive logits stand in the same loop; TRL's SDFT trainer brings
its own (`benchmarks.sdft`). Per way: time by phase, the peak memory of the whole update in a
process of its own, and errors against float64, of the loss alone on given hidden states and of the
whole update's parameter gradients, in which every rounding of the fp32 backbone counts too.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks import accuracy, rollouts, sdft
from benchmarks.clock import PHASES, phases
from benchmarks.contenders import Failure, Loss, contenders
from benchmarks.memory import fresh_processes
from benchmarks.resident import added_mib
from benchmarks.rollouts import Rollouts
from opsdc.config.settings import OPSDCConfig
from opsdc.models.head import hidden_states, read_head
from opsdc.models.load import load_model, load_tokenizer
from opsdc_kernels.testing import Case, truth

CPU = torch.device("cpu")
LOSSES = ("ours, chunked", "naive")
"""Those that stand in the plain loop."""


@dataclass(frozen=True, slots=True)
class Step:
    way: str
    teacher: float
    """Seconds, like the other three phases; medians over the repeats."""
    forward: float
    loss: float
    backward: float
    peak_mib: float
    """Of the whole update, gradients included, beside model and teacher."""
    loss_error: float
    """Of dH, relative, on the fp32 hidden states that the backbones gave."""
    update_error: float
    """Of all parameter gradients, relative, against backbones, heads and loss in float64."""

    @property
    def whole(self) -> float:
        return self.teacher + self.forward + self.loss + self.backward

    def __str__(self) -> str:
        split = "  ".join(f"{name} {getattr(self, name):5.2f}" for name in PHASES)
        return (
            f"{self.way:<20}{split}  whole {self.whole:5.2f} s, loss {self.loss / self.whole:4.0%}"
            f"{self.peak_mib:7.0f} MiB  errors: loss {self.loss_error:.1e}, "
            f"update {self.update_error:.1e}"
        )


def measure(*, repeats: int) -> list[Step | Failure]:
    """Ways interleaved; prints each line."""
    found: list[Step | Failure] = []
    recorded = rollouts.sample()
    ways = _Ways(recorded)
    ways.add_plain_loops()
    try:
        ways.add_sdft()
    except Exception as error:
        # A peer may fail to import in any way; it is listed with its reason, never dropped.
        found.append(Failure.of(sdft.NAME, error))
        print(found[-1], flush=True)
    case, true_gradients = _truth(recorded)
    true = truth(case)
    spent: dict[str, list[dict[str, float]]] = {name: [] for name in ways.updates}
    errors: dict[str, float] = {}
    for _ in range(repeats + 1):
        for name, (update, teacher) in ways.updates.items():
            ways.model.zero_grad()
            spent[name].append(phases(update, ways.model.get_decoder(), teacher.get_decoder()))
            if name not in errors:
                errors[name] = relative_error(ways.model, true_gradients)
    for name in ways.updates:
        medians = {
            phase: statistics.median(each[phase] for each in spent[name][1:]) for phase in PHASES
        }
        with ProcessPoolExecutor(1, mp_context=fresh_processes()) as fresh:
            peak = fresh.submit(_peak, name, recorded).result()
        loss_error = accuracy.errors(_loss(name), case, true)[1]
        step = Step(name, **medians, peak_mib=peak, loss_error=loss_error,
                    update_error=errors[name])  # fmt: skip
        print(step, flush=True)
        found.append(step)
    return found


class _Ways:
    """One student model, and per way its update, which adds to the student's gradients, with the
    teacher that it runs."""

    def __init__(self, recorded: Rollouts) -> None:
        self._config = OPSDCConfig.load("smollm2-cpu").model
        self._recorded = recorded
        self.model: Any = load_model(self._config).train()
        self.updates: dict[str, tuple[Callable[[], float], Any]] = {}

    def add_plain_loops(self, names: tuple[str, ...] = LOSSES) -> None:
        teacher = load_model(self._config)
        for name in names:
            loss = _loss(name)
            self.updates[name] = (
                lambda loss=loss: plain_update(self.model, teacher, self._recorded, loss),
                teacher,
            )

    def add_sdft(self) -> None:
        tokenizer = load_tokenizer(self._config)
        self.updates[sdft.NAME] = sdft.update_of(self.model, tokenizer, self._recorded)


def plain_update(model: Any, teacher: Any, recorded: Rollouts, loss: Loss) -> float:
    """Adds to the model's gradients; returns the loss in nats per token."""
    with torch.no_grad():
        teacher_hidden = hidden_states(teacher, recorded.batch("teacher"))
    hidden = hidden_states(model, recorded.batch("student"))
    heads = read_head(model).weight, read_head(teacher).weight.detach()
    value = loss(hidden, heads[0], teacher_hidden, heads[1])
    value.backward()
    return float(value.detach())


def _loss(name: str) -> Loss:
    if name == sdft.NAME:
        return sdft.loss
    return next(c.loss for c in contenders(CPU)[0] if c.name == name)


def _truth(recorded: Rollouts) -> tuple[Case, list[Tensor]]:
    """The loss's inputs in fp32, and all parameter gradients of an update in float64."""
    config = OPSDCConfig.load("smollm2-cpu").model
    model: Any = load_model(config)
    with torch.no_grad():
        states = [hidden_states(model, recorded.batch(side)) for side in ("student", "teacher")]
    weight = read_head(model).weight.detach().clone()
    case = Case(states[0], weight, states[1], weight.clone())
    model.double()

    def exact(h: Tensor, w: Tensor, ht: Tensor, wt: Tensor) -> Tensor:
        from opsdc_kernels import linear_divergence

        return linear_divergence(h, w, ht, wt, backend="reference")

    plain_update(model, model, recorded, exact)
    return case, [parameter.grad for parameter in model.parameters()]


def relative_error(model: Any, true: list[Tensor]) -> float:
    """Frobenius norm of the error of all gradients, over that of all true gradients."""
    error = size = 0.0
    for parameter, want in zip(model.parameters(), true, strict=True):
        error += float((parameter.grad.double() - want).square().sum())
        size += float(want.square().sum())
    return (error / size) ** 0.5


def _peak(name: str, recorded: Rollouts) -> float:
    ways = _Ways(recorded)
    if name == sdft.NAME:
        ways.add_sdft()
    else:
        ways.add_plain_loops((name,))
    return added_mib(ways.updates[name][0])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3, help="(default %(default)s)")
    measure(repeats=parser.parse_args().repeats)


if __name__ == "__main__":
    main()
