"""Raw products to logits and their difference: eq. (1) of `reference`, in place."""

from __future__ import annotations

import torch
from torch import Tensor

from opsdc_kernels.maths import capped, slope_of
from opsdc_kernels.problem import Problem, Side


def transform_(
    x: Tensor, other: Tensor, problem: Problem, difference: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """(s, t, t − s, ds/dx up to scale/temperature); t is None where s + (t − s) gives it.

    t − s goes to `difference` where t is kept (None: a new tensor). `x` and `other` are
    overwritten, `x` by s where the student has no soft-cap, else by what `capped` makes s of.
    """
    student, teacher = problem.side(0), problem.side(1)
    cap, temperature = student.cap, student.temperature
    _affine_(x, student)
    _affine_(other, teacher)
    slope = None if cap is None else slope_of(x, cap)
    s = capped(x, cap, temperature)
    if not problem.shared_logits:
        t = capped(other, teacher.cap, temperature)
        return s, t, torch.sub(t, s, out=difference), slope
    if cap is None:
        return s, None, other if temperature == 1.0 else other.div_(temperature), slope
    # tanh(A) − tanh(B) = tanh(A − B)·(1 − tanh(A)·tanh(B)): no cancellation.
    x_t = x + other
    both = torch.tanh(x / cap) * torch.tanh(x_t / cap)
    d = torch.tanh(other / cap).mul_(cap / temperature).mul_(1 - both)
    return s, capped(x_t, cap, temperature), d, slope


def _affine_(x: Tensor, side: Side) -> None:
    if side.bias is not None:
        x.add_(side.bias)
    if side.scale != 1.0:
        x.mul_(side.scale)
