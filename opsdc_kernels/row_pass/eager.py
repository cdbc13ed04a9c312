"""Raw products of a block of rows to divergence, statistics and logit gradient, in torch.

Here the transforms of eq. (1) in `reference`; then `rows_cpu` where it applies, else `rows_exact`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from opsdc_kernels import plan
from opsdc_kernels.problem import Problem
from opsdc_kernels.reference import statistics_of_logits
from opsdc_kernels.row_pass.exact import divergence_and_gradient
from opsdc_kernels.row_pass.fast import fast_rows_

SMALLEST = 2.0**-100


class Rows(NamedTuple):
    """What a block of rows gives; the gradient replaces the student's logits in their buffer."""

    divergence: Tensor
    """[B]"""
    factor: Tensor
    """[B]: the gradient with respect to hidden · weightᵀ is the buffer times this."""
    statistics: tuple[Tensor, ...] | None
    """[B] each, in the order of `DivergenceStats` after the divergence."""


def divergence_rows_(
    student_BV: Tensor,
    other_BV: Tensor,
    problem: Problem,
    *,
    gradient: bool,
    target_ids_B: Tensor | None = None,
    buffers: Tensor | None = None,
) -> Rows:
    """Consumes raw products: student_BV = h·Wᵀ and other_BV = the teacher's h·Wᵀ, or, where
    `problem.shared_logits`, (teacher hidden − student hidden)·Wᵀ. Both are overwritten, and so are
    the `buffers` [plan.CPU_BUFFERS, ≥ B, V] that spare a CPU fresh pages (None: allocated here).
    """
    if buffers is None:
        buffers = student_BV.new_empty(plan.CPU_BUFFERS, *student_BV.shape)
    difference, *free = buffers[:, : student_BV.shape[0]]
    s, t, d, slope = transform_(student_BV, other_BV, problem, difference)
    kind, beta = problem.divergence, problem.beta
    fast = None
    if s.device.type == "cpu" and not _masked_by_shared_bias(problem):
        fast = fast_rows_(
            s,
            d,
            kind,
            beta,
            gradient=gradient,
            statistics=problem.return_stats,
            target_ids_B=target_ids_B,
            free=free,
        )
    if fast is not None:
        value, factor, statistics = fast
    else:
        t = s + d if t is None else t
        value, statistics = exact_rows_(s, t, d, problem, gradient, target_ids_B)
        factor = torch.ones_like(value)
    if gradient and slope is not None:
        s.mul_(slope)
    if gradient and s.device.type == "cpu":
        without_denormals_(s)
    if gradient and s is not student_BV:
        student_BV.copy_(s)
    return Rows(value, factor * problem.logit_factor, statistics)


def exact_rows_(
    s: Tensor, t: Tensor, d: Tensor, problem: Problem, gradient: bool, target_ids: Tensor | None
) -> tuple[Tensor, tuple[Tensor, ...] | None]:
    """(divergence, statistics) of a block by `rows_exact`; the gradient replaces s."""
    values, statistics = [], []
    height = plan.exact_rows(len(s))
    for start in range(0, len(s), height):
        part = slice(start, start + height)
        if problem.return_stats:
            targets = None if target_ids is None else target_ids[part]
            statistics.append(statistics_of_logits(s[part], t[part], targets))
        dz = s[part] if gradient else None
        kind, beta = problem.divergence, problem.beta
        values.append(divergence_and_gradient(s[part], t[part], d[part], kind, beta, dz))
    found = tuple(torch.cat(each) for each in zip(*statistics, strict=True)) or None
    return torch.cat(values), found


def without_denormals_(gradient_BV: Tensor) -> None:
    """0 for what makes denormal sums, with which a CPU computes at a hundredth of its speed: a few
    in a thousand numbers, in rows of real vocabularies, slow the products that read the gradient
    1.4 times."""
    torch.hardshrink(gradient_BV, SMALLEST, out=gradient_BV)


def _masked_by_shared_bias(problem: Problem) -> bool:
    """−inf logits that t − s does not show, because the bias of a shared head cancels in it."""
    bias = problem.student_bias
    if bias is None or not problem.shared_logits:
        return False
    return not bool(torch.isfinite(bias[: problem.vocab_size]).all())


def transform_(
    x: Tensor, other: Tensor, problem: Problem, difference: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """(s, t, t − s, ds/dx up to scale/temperature) of eq. (1); t is None where s + d gives it.

    t − s goes to `difference` where t is kept (None: a new tensor). `x` and `other` are
    overwritten, `x` by s where the student has no soft-cap, else by what `capped` makes s of."""
    size, temperature = problem.vocab_size, problem.temperature
    (scale, other_scale), (cap, other_cap) = problem.logit_scale, problem.logit_softcap

    def affine_(x: Tensor, bias: Tensor | None, scale: float) -> Tensor:
        if bias is not None:
            x.add_(bias[:size])
        return x if scale == 1.0 else x.mul_(scale)

    affine_(x, problem.student_bias, scale)
    slope = None if cap is None else slope_of(x, cap)
    s = capped(x, cap, temperature)
    if not problem.shared_logits:
        t = capped(affine_(other, problem.teacher_bias, other_scale), other_cap, temperature)
        return s, t, torch.sub(t, s, out=difference), slope
    delta = affine_(other, None, scale)
    if cap is None:
        d = delta if temperature == 1.0 else delta.div_(temperature)
        return s, None, d, slope
    x_t = x + delta
    both = torch.tanh(x / cap) * torch.tanh(x_t / cap)
    d = torch.tanh(delta / cap).mul_(cap / temperature).mul_(1 - both)
    return s, capped(x_t, cap, temperature), d, slope


def capped(x: Tensor, cap: float | None, temperature: float) -> Tensor:
    """Soft-cap and temperature of eq. (1); in place where there is no cap."""
    x = x if cap is None else torch.tanh(x / cap).mul_(cap)
    return x if temperature == 1.0 else x.div_(temperature)


def slope_of(x: Tensor, cap: float) -> Tensor:
    """The derivative of the soft-cap."""
    return torch.cosh(x / cap).pow_(-2)
