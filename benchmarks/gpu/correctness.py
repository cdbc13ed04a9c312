"""Stage a: every backend against float64 on the device, and the row pass in Triton by itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from opsdc_kernels import linear_divergence, testing
from opsdc_kernels.chunked import run
from opsdc_kernels.row_pass import choose
from opsdc_kernels.testing import Case

BACKENDS = ("chunked", "fused", "chunked, rows in torch")
"""On a GPU `chunked` runs its row pass in Triton. With that in torch, a fault of the products is
told apart from one of the row pass."""
DTYPES = ("bfloat16", "float32", "float16")
DIVERGENCES = ("reverse_kl", "forward_kl", "jsd")
VARIANTS = ("two heads", "one head, odd sizes", "cap and bias", "weights and targets")
FULL = {"tokens": 128, "dim": 256, "vocab_size": 4096}
SMALL = {"tokens": 5, "dim": 32, "vocab_size": 70}


def check(
    device: torch.device, *, backend: str, dtype: str, divergence: str, variant: str, small: bool
) -> list[dict[str, Any]]:
    """Errors of one call with a trainable head and of one with a frozen head, and all that is over
    budget."""
    case, options = _inputs(device, dtype, variant, small=small)
    options["divergence"] = divergence
    true = testing.truth(case, **options)
    limit = testing.budget(case, true)
    with _backend(backend, device) as name:
        got = testing.run(case, backend=name, **options)
        errors = testing.errors(got, true)
        wrong = testing.excesses(errors, limit)
        frozen = _relative(_frozen(case, name, options), true.hidden_gradient)
        if not frozen <= limit.gradient:
            wrong.append(f"dH with a frozen head is off by {frozen:.1e}")
        bias = None
        if "student_bias" in options:
            wide = {k: x.double() if _is_real(x) else x for k, x in options.items()}
            bias = _relative(
                _bias_gradient(case, name, options),
                _bias_gradient(case.to(torch.float64), "reference", wide),
            )
            if not bias <= limit.gradient:
                wrong.append(f"the bias's gradient is off by {bias:.1e}")
    return [
        {
            "backend": backend, "dtype": dtype, "divergence": divergence, "variant": variant,
            "loss": errors.loss, "hidden_gradient": errors.hidden_gradient,
            "weight_gradient": errors.weight_gradient, "worst_row": errors.worst_row,
            "frozen_hidden_gradient": frozen, "bias_gradient": bias, "over_budget": wrong,
        }
    ]  # fmt: skip


def _inputs(
    device: torch.device, dtype: str, variant: str, *, small: bool
) -> tuple[Case, dict[str, Any]]:
    sizes = dict(SMALL if small else FULL)
    if variant == "one head, odd sizes":
        sizes = {name: size - size // 8 + 1 for name, size in sizes.items()}
    case = testing.make_case(
        **sizes,
        entropy=0.5,
        kl=1e-2,
        dtype=getattr(torch, dtype),
        shared_head=variant in ("one head, odd sizes", "weights and targets"),
        device=device,
    )
    tokens, vocab_size = sizes["tokens"], sizes["vocab_size"]
    if variant == "cap and bias":
        bias = torch.linspace(-1, 1, vocab_size, device=device, dtype=getattr(torch, dtype))
        options = {"logit_softcap": 30.0, "temperature": 1.3}
        return case, {**options, "student_bias": bias, "teacher_bias": bias.flip(0)}
    if variant == "weights and targets":
        at = torch.arange(tokens, device=device)
        return case, {
            "token_weight": (at % 3).float() / 2,
            "target_ids": at % (vocab_size - 3),
            "vocab_size": vocab_size - 3,
            "reduction": "sum",
        }
    return case, {}


@contextmanager
def _backend(name: str, device: torch.device) -> Iterator[str]:
    """The backend's own name, with the row pass that is wanted in place."""
    if name == "fused":
        yield name
        return
    row_pass = choose.in_torch(device) if name != "chunked" else choose.in_triton()
    with mock.patch.object(run, "choose", return_value=row_pass):
        yield "chunked"


def _frozen(case: Case, backend: str, options: dict[str, Any]) -> Tensor:
    hidden = case.student_hidden.detach().clone().requires_grad_()
    loss = linear_divergence(
        hidden, case.student_weight, case.teacher_hidden, case.teacher_weight,
        backend=backend, **{**options, "target_ids": None},
    )  # fmt: skip
    loss.backward()
    assert hidden.grad is not None
    return hidden.grad


def _bias_gradient(case: Case, backend: str, options: dict[str, Any]) -> Tensor:
    bias = options["student_bias"].detach().clone().requires_grad_()
    loss = linear_divergence(
        case.student_hidden, case.student_weight, case.teacher_hidden, case.teacher_weight,
        backend=backend, **{**options, "student_bias": bias},
    )  # fmt: skip
    loss.backward()
    assert bias.grad is not None
    return bias.grad


def _is_real(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def _relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())
