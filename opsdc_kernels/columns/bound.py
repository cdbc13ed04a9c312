r"""A bound of what the reverse KL's gradient lacks when vocabulary columns are left out.

Letters as in `reference`. A chunk of tokens keeps the columns K and drops D. On K the gradient is
−q·c̃ with c̃ = d − m̃, m̃ = E_q[d | K]: what (8) becomes when the teacher is not asked about D. It
needs no teacher normalizer, which cancels in c. Then, with W_q = E_q[W] and any vector a::

    dH − dH̃ = −Σ_D q·c̃·(W_v − W_q)                                                          (11)

exactly: the shift m − m̃ = Σ_D q·c̃ of the columns that were kept is what subtracts W_q. The mass
Q = Σ_D q is known, the difference of a dropped column is not, but one head gives both logits::

    c̃_v = Δh·(W_v − E_q[W | K]),   so   |c̃_v| ≤ η·(ρ_v + κ) + ν                             (12)

with Δh the difference of the hidden states in units of the logits, η = ‖Δh‖, ρ_v = ‖W_v − a‖ and
κ = √E_q[ρ²]. ν = 0 for one head. For heads of one size d = Δh·W_v + h_t·(T_v − W_v) + β_v, T the
teacher's, β the difference of the biases; then ν = 2·(‖h_t‖·max‖T_v − W_v‖ + max|β|): a teacher
some steps old is bounded nearly as tightly as one head. Heads of different sizes are taken for one
head [T, W] that sees [h_t, −h_s], η = ‖[h_t, h_s]‖: true, and so loose that few columns go.
a is about the mean row of W, as a shift of all logits changes nothing; 0 under a soft-cap, which
has slope ≤ 1 and so keeps (11) and (12) as bounds, but does change a shifted logit.

With S = Σ_D q·(ρ+κ)² ≤ 2·Σ_D q·ρ² + 2·κ²·Q and Cauchy–Schwarz for the mixed terms, per token::

    ‖dH − dH̃‖ ≤ η·S + ν·√(Q·S),     |m − m̃| ≤ δ = η·√(Q·S) + ν·Q                           (13)

and per column of dW, over the tokens: Σ ‖h‖·q·δ, on a dropped one Σ ‖h‖·q·(η·(ρ+κ) + ν + δ).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from opsdc_kernels.columns import compiled
from opsdc_kernels.problem import Problem
from opsdc_kernels.products import logits_into, operand_dtype

CUTS = 16
CUT_RATIO = 2.5
"""Cuts are this far apart: the choice is within it of the best one."""
LARGEST_CUT = 1e-4
"""The largest cut, in shares of the largest probability; the smallest is at 1e-10."""
SLACK = 1.001
"""Covers the rounding of the sums: all terms are positive."""
CENTRE_STEP = 16
"""The mean of every 16th row is as good a centre, and any is right."""
ROWS = 1024
"""Rows of a head that are compared at once."""


@dataclass(frozen=True, slots=True)
class Geometry:
    """Distances in and between the heads, which the bound is made of."""

    radius_V: Tensor
    """The distance ρ of each row of W from their mean [V]."""
    drift: Tensor
    """The largest ‖T_v − W_v‖, 0-dim."""
    offset: Tensor
    """The largest |β|, 0-dim; infinite where only one of the two masks a column."""
    stacked: bool
    """The heads have different sizes."""

    @classmethod
    def of(cls, problem: Problem) -> Geometry:
        size, dtype = problem.vocab_size, problem.dtype
        weight = problem.student_weight.detach()[:size]
        teacher = problem.teacher_weight
        centred = problem.side(0).cap is None
        radius = _radius(weight, dtype, centred)
        drift = radius.new_zeros(())
        stacked = teacher is not None and teacher.shape[1] != weight.shape[1]
        if teacher is not None:
            teacher = teacher[:size]
            if stacked:
                radius = torch.hypot(radius, _radius(teacher, dtype, centred))
            else:
                drift = _largest_difference(weight, teacher, dtype)
        return cls(radius, drift, _offset(problem).to(radius), stacked)

    def slopes(self, problem: Problem, tokens: slice | Tensor) -> tuple[Tensor, Tensor]:
        """(η, ν), each [C]."""
        factors = [side.scale / side.temperature for side in (problem.side(0), problem.side(1))]
        student = problem.student_hidden.detach()[tokens].to(problem.dtype) * factors[0]
        teacher = problem.teacher_hidden[tokens].to(problem.dtype) * factors[1]
        size = torch.linalg.vector_norm(teacher, dim=1)
        if self.stacked:
            eta = torch.hypot(size, torch.linalg.vector_norm(student, dim=1))
        else:
            eta = torch.linalg.vector_norm(teacher - student, dim=1)
        return eta, 2 * (size * self.drift + self.offset)


def _radius(weight: Tensor, dtype: torch.dtype, centred: bool) -> Tensor:
    """‖row − mean of some rows‖, or ‖row‖, [V]."""
    centre = weight[::CENTRE_STEP].mean(0, dtype=dtype) * centred
    if weight.stride(1) == 1 and compiled.serves(weight):
        return compiled.square_distances(weight, centre).sqrt() * SLACK
    norm = torch.linalg.vector_norm(weight, dim=1, dtype=dtype)
    if not centred:
        return norm
    size = torch.linalg.vector_norm(centre)
    # No [V, D] differences: they take longer than the products do.
    square = norm.square() - 2 * _times(weight, centre) + size.square()
    rounding = 16 * torch.finfo(dtype).eps * (norm + size).square()
    return (square.clamp(min=0) + rounding).sqrt()


def _times(weight: Tensor, vector: Tensor) -> Tensor:
    """weight · vector [V]."""
    out = vector.new_empty(weight.shape[0], 1)
    logits_into(out.T, vector[None].to(operand_dtype(weight, vector.dtype)), weight)
    return out.squeeze(1)


def _largest_difference(weight: Tensor, teacher: Tensor, dtype: torch.dtype) -> Tensor:
    """max ‖row − teacher's row‖, 0-dim."""
    largest = [
        torch.linalg.vector_norm(a.to(dtype) - b.to(dtype), dim=1).amax()
        for a, b in zip(weight.split(ROWS), teacher.split(ROWS), strict=True)
    ]
    return torch.stack(largest).amax()


def _offset(problem: Problem) -> Tensor:
    """max |β|, 0-dim."""
    zero = problem.student_weight.new_zeros((), dtype=problem.dtype)
    if problem.shared_logits:
        return zero
    student, teacher = (
        zero if side.bias is None else side.bias.to(problem.dtype) * side.scale
        for side in (problem.side(0), problem.side(1))
    )
    # −inf on both sides: no such column.
    difference = (teacher - student).nan_to_num(0.0, torch.inf, -torch.inf)
    return (difference / problem.options.temperature).abs().amax()


class Bounds(NamedTuple):
    """Bounds of a chunk's tokens [C], or of them at every cut [C, CUTS]."""

    hidden: Tensor
    """Largest ‖dH̃ − dH‖ of each token, unweighted."""
    shift: Tensor
    """The shift δ of each token."""


def bounds(
    mass: Tensor, squares: Tensor, kappa2_C: Tensor, slopes: tuple[Tensor, Tensor]
) -> Bounds:
    """(13) from Q and Σ_D q·ρ², [C] or [C, CUTS], and κ² and (η, ν), [C]."""
    eta, nu, kappa2 = (x.view(-1, *[1] * (mass.dim() - 1)) for x in (*slopes, kappa2_C))
    around = 2 * (squares + kappa2 * mass)  # S
    mixed = (mass * around).sqrt()
    return Bounds((eta * around + nu * mixed) * SLACK, (eta * mixed + nu * mass) * SLACK)


def cuts_of(peak_V: Tensor, forced: Tensor) -> Tensor:
    """The first cut that drops each column [V] int64: those go whose largest probability (or other
    mass) in the chunk is below it. `CUTS` where none does, as of `forced` columns."""
    steps = torch.arange(CUTS - 1, -1, -1, device=peak_V.device, dtype=peak_V.dtype)
    edges = peak_V.amax() * LARGEST_CUT * CUT_RATIO**-steps  # rising
    return torch.bucketize(peak_V, edges).index_fill_(0, forced, CUTS)


def sums_at_cuts(mass_CV: Tensor, cut_V: Tensor, feature_V: Tensor) -> tuple[Tensor, Tensor]:
    """Σ_D mass and Σ_D mass·feature at each cut, each [C, CUTS]."""
    table = mass_CV.new_zeros(len(cut_V), 2, CUTS + 1)
    table[:, 0].scatter_(1, cut_V[:, None], 1)
    table[:, 1].scatter_(1, cut_V[:, None], feature_V[:, None])
    parts = (mass_CV @ table.flatten(1)).unflatten(1, (2, CUTS + 1))
    return parts[:, :, :-1].cumsum(2).unbind(1)  # type: ignore[return-value]
