"""Sums of the student's probabilities q, over tokens and over columns, that choosing columns needs:
from the raw products of a chunk, without a tile of q. In torch here, in C in `columns.compiled`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from opsdc_kernels.columns import compiled
from opsdc_kernels.maths import capped, weighted_excess
from opsdc_kernels.plan import column_block_rows
from opsdc_kernels.problem import Problem
from opsdc_kernels.products import by_column
from opsdc_kernels.row_pass.transform import transform_

LOWEST = -70.0
"""Logits that are below the largest by more count as this, a mass of 4e-31: products with denormal
ones take a CPU a hundred times as long."""


class StudentSums(NamedTuple):
    """Sums of a chunk's q; `square`, `along` and `apart` are what `student_sums` was given."""

    lse_C: Tensor
    """Log-normalizer [C]."""
    entropy_C: Tensor
    spread_C: Tensor
    """E_q[square] [C]."""
    peak_V: Tensor
    """Largest q of a column [V]."""
    slope_V: Tensor
    """Σ_C along·q [V]."""
    rest_V: Tensor
    """Σ_C (along·√spread + apart)·q [V]."""


def student_sums(
    problem: Problem, x_CV: Tensor, square_V: Tensor, along_C: Tensor, apart_C: Tensor
) -> StudentSums:
    """The sums of a chunk from its raw products `x_CV` = h·Wᵀ, which stay."""
    if _in_c(x_CV):
        return StudentSums(*compiled.student_sums(problem, x_CV, square_V, along_C, apart_C))
    peak_V = torch.zeros_like(square_V)
    sums_2V = square_V.new_zeros(2, len(square_V))
    rows = []
    for block in _blocks(x_CV):
        z = _logits_(problem, x_CV[block].clone())
        top = z.amax(1, keepdim=True)
        z = z.sub_(top).clamp_(min=LOWEST)
        q = z.exp()
        total = q.sum(1, keepdim=True)
        entropy = total.log() - torch.linalg.vecdot(q, z)[:, None] / total
        torch.maximum(peak_V, q.div_(total).amax(0), out=peak_V)
        spread = q @ square_V
        along = along_C[block]
        sums_2V.addmm_(torch.stack([along, along * spread.sqrt() + apart_C[block]]), q)
        rows.append(torch.stack([(top + total.log()).squeeze(1), entropy.squeeze(1), spread]))
    lse_C, entropy_C, spread_C = torch.cat(rows, 1)
    slope_V, rest_V = sums_2V
    return StudentSums(lse_C, entropy_C, spread_C, peak_V, slope_V, rest_V)


class StudentMasses(NamedTuple):
    """Sums of a chunk's q with the `reach` that `student_masses` was given."""

    lse_C: Tensor
    """Log-normalizer [C]."""
    entropy_C: Tensor
    mass_V: Tensor
    """√Σ_C (reach·q)² [V]."""


def student_masses(problem: Problem, x_CV: Tensor, reach_C: Tensor) -> StudentMasses:
    """The sums of a chunk from its raw products `x_CV` = h·Wᵀ, which stay."""
    if _in_c(x_CV):
        return StudentMasses(*compiled.student_masses(problem, x_CV, reach_C))
    square_V = x_CV.new_zeros(x_CV.shape[1])
    rows = []
    for block in _blocks(x_CV):
        z = _logits_(problem, x_CV[block].clone())
        lse = z.logsumexp(1, keepdim=True)
        z = z.sub_(lse).clamp_(min=LOWEST)
        q = z.exp()
        rows.append(torch.stack([lse.squeeze(1), -torch.linalg.vecdot(q, z)]))
        square_V += q.mul_(reach_C[block, None]).square_().sum(0)
    lse_C, entropy_C = torch.cat(rows, 1)
    return StudentMasses(lse_C, entropy_C, square_V.sqrt_())


class SampleSums(NamedTuple):
    """Sums over a sample of the columns, with the letters of `columns.unbiased`, each [C]. The
    factor of a sum is a; of a sum of squares, which is a variance, (1 − π)/π²."""

    shift: Tensor
    """δ = Σ a·q·c̃."""
    excess: Tensor
    """Σ a·q·f(c̃)."""
    more_square: Tensor
    """The square of q·(e^c̃ − 1)."""
    more_times_c: Tensor
    """q·(e^c̃ − 1)·q·c̃."""
    c_square: Tensor
    """The square of q·c̃."""
    error_square: Tensor
    """The square of q·(c̃ − δ)."""
    concentration: Tensor
    """Σ q², without a factor."""
    mass: Tensor
    """Σ a·q·e^c̃; this and what follows only where statistics are wanted."""
    log_mass: Tensor
    """Σ a·q·e^c̃·log(q·e^c̃)."""
    agreement: Tensor
    """1 where one column is the top of q and of q·e^c̃, else 0."""
    target_q: Tensor
    """log q of the target."""
    target_p: Tensor
    """log(q·e^c̃) of the target."""


def sample_sums_(
    problem: Problem,
    x_CK: Tensor,
    other_CK: Tensor,
    factors_2K: Tensor,
    lse_C: Tensor,
    base_C: Tensor,
    targets_C: Tensor | None,
) -> SampleSums:
    """The sums of a sample from the raw products of both sides; dZ of eq. (15) in `unbiased`, up to
    the logits' factor, replaces those of the student.

    `problem`: of these columns alone. `factors_2K`: a and (1 − π)/π². `base_C`: m₀. `targets_C`:
    places among the columns, or None.
    """
    if _in_c(x_CK):
        fields = compiled.sample_sums_(
            problem, x_CK, other_CK, factors_2K, lse_C, base_C, targets_C, len(SampleSums._fields)
        )
        return SampleSums(*fields)
    sums = [
        _sample_rows_(
            problem, x_CK[rows], other_CK[rows], factors_2K, lse_C[rows], base_C[rows],
            None if targets_C is None else targets_C[rows],
        )
        for rows in _blocks(x_CK)
    ]  # fmt: skip
    return SampleSums(*torch.cat(sums, 1))


def _sample_rows_(
    problem: Problem,
    x: Tensor,
    other: Tensor,
    factors_2K: Tensor,
    lse_C: Tensor,
    base_C: Tensor,
    targets_C: Tensor | None,
) -> Tensor:
    """The fields of `SampleSums` [fields, C] of a block of rows."""
    weight_K, doubt_K = factors_2K
    s, _, d, slope = transform_(x, other, problem, None)
    log_q, c = s.sub(lse_C[:, None]).clamp_(min=LOWEST), d.sub_(base_C[:, None])
    q = log_q.exp()
    log_p, qc = log_q + c, q * c
    more = torch.where(c > 1, log_p.exp() - q, q * torch.expm1(c))
    shift_C = qc @ weight_K
    apart = c - shift_C[:, None]
    fields = [
        shift_C,
        weighted_excess(log_q, c, log_p) @ weight_K,
        more.square() @ doubt_K,
        (more * qc) @ doubt_K,
        qc.square() @ doubt_K,
        (q * apart).square() @ doubt_K,
        q.square().sum(1),
    ]
    mass = log_p.exp() * weight_K
    none_C = torch.zeros_like(shift_C)
    at_C1 = None if targets_C is None else targets_C[:, None]
    fields += [
        mass.sum(1),
        torch.linalg.vecdot(mass, log_p),
        (log_q.argmax(1) == log_p.argmax(1)).to(shift_C),
        none_C if at_C1 is None else log_q.gather(1, at_C1).squeeze(1),
        none_C if at_C1 is None else log_p.gather(1, at_C1).squeeze(1),
    ]
    # c̃ − δ_v of (14) is (c̃ − δ) + (a − 1)·q·c̃.
    dz = (weight_K - 1).mul(qc).add_(apart).mul_(q).mul_(-weight_K)
    x.copy_(dz if slope is None else dz.mul_(slope))
    return torch.stack(fields)


def dropped_sums(
    problem: Problem, x_CV: Tensor, lse_C: Tensor, keeps_V: Tensor, square_V: Tensor
) -> tuple[Tensor, Tensor]:
    """Σ q and Σ q·square over the columns that are not kept, each [C]."""
    if _in_c(x_CV):
        return compiled.dropped_sums(problem, x_CV, lse_C, keeps_V, square_V)
    weights = torch.stack([torch.ones_like(square_V), square_V], 1).masked_fill_(
        keeps_V[:, None], 0
    )
    sums = [
        probabilities_(problem, x_CV[block].clone(), lse_C[block]) @ weights
        for block in _blocks(x_CV)
    ]
    return torch.cat(sums).unbind(1)  # type: ignore[return-value]


def probabilities_(problem: Problem, x_CK: Tensor, lse_C: Tensor) -> Tensor:
    """Replace raw products by q."""
    for block in _blocks(x_CK):
        z = _logits_(problem, x_CK[block]).sub_(lse_C[block, None])
        torch.exp(z.clamp_(min=LOWEST), out=x_CK[block])
    return x_CK


def _logits_(problem: Problem, x_CK: Tensor) -> Tensor:
    """The student's z of eq. (1) in `reference`; overwrites raw products."""
    side = problem.side(0)
    if side.bias is not None:
        x_CK.add_(side.bias)
    if side.scale != 1.0:
        x_CK.mul_(side.scale)
    return capped(x_CK, side.cap, side.temperature)


def _in_c(x_CV: Tensor) -> bool:
    return by_column(x_CV) and compiled.serves(x_CV)


def _blocks(x_CV: Tensor) -> list[slice]:
    """Blocks of rows that passes in torch take at once."""
    height, size = x_CV.shape
    step = column_block_rows(size, x_CV.device)
    return [slice(i, min(i + step, height)) for i in range(0, height, step)]
