"""How wrong each contender is, against float64 from the same inputs.

    python -m benchmarks.accuracy --quick

Student and teacher close to each other, as in self-distillation: entropy and KL are given per
regime. Errors are relative to the truth's own size; gradients by the Frobenius norm. Errors of
16-bit gradients include the rounding of the result, which alone is about 1.7e-3.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass

import torch

from benchmarks.contenders import Loss, contenders, default_device
from opsdc_kernels.testing import Case, Outcome, make_case, truth

REGIMES = (
    ("far", 2.0, 1.0),
    ("training", 0.5, 1e-2),
    ("near", 1.0, 1e-4),
    ("peaked, near", 0.05, 1e-5),
)
"""(name, student entropy, KL), in nats per token."""
SIZES = {"tokens": 64, "dim": 512, "vocab_size": 32000}
QUICK_SIZES = {"tokens": 32, "dim": 128, "vocab_size": 4096}


@dataclass(frozen=True, slots=True)
class Error:
    contender: str
    regime: str
    dtype: str
    loss: float
    hidden_gradient: float
    weight_gradient: float

    def __str__(self) -> str:
        errors = (self.loss, self.hidden_gradient, self.weight_gradient)
        return f"{self.dtype:<9}{self.regime:<14}{self.contender:<26}" + "".join(
            f"{error:10.1e}" for error in errors
        )


def measure(
    device: torch.device, *, quick: bool, regimes: tuple[tuple[str, float, float], ...] = REGIMES
) -> list[Error]:
    """Every eager contender in every regime, fp32 and bf16 inputs; prints each line."""
    found = []
    running = [c for c in contenders(device)[0] if not (c.compiled or c.other_loss)]
    for dtype in (torch.float32, torch.bfloat16):
        for name, entropy, kl in regimes:
            sizes = QUICK_SIZES if quick else SIZES
            case = make_case(**sizes, entropy=entropy, kl=kl, dtype=dtype)
            true = truth(case)
            for contender in running:
                found_errors = errors(contender.loss, case, true)
                error = Error(
                    contender.name, name, str(dtype).removeprefix("torch."), *found_errors
                )
                print(error, flush=True)
                found.append(error)
    return found


def errors(
    loss: Loss, case: Case, true: Outcome, *, trainable: bool = True
) -> tuple[float, float, float]:
    """Of the loss, dH and dW; the last is NaN for a frozen head."""
    hidden = case.student_hidden.detach().clone().requires_grad_()
    weight = case.student_weight.detach().clone().requires_grad_(trainable)
    shared = case.teacher_weight is None
    value = loss(hidden, weight, case.teacher_hidden, weight if shared else case.teacher_weight)
    value.backward()
    assert hidden.grad is not None
    assert (weight.grad is not None) == trainable
    return (
        _relative(value.detach(), true.loss),
        _relative(hidden.grad, true.hidden_gradient),
        math.nan if weight.grad is None else _relative(weight.grad, true.weight_gradient),
    )


def _relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="smaller inputs")
    options = parser.parse_args()
    device = default_device()
    measure(device, quick=options.quick)


if __name__ == "__main__":
    main()
