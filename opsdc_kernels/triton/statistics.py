"""Statistics of a row's distributions that merge over its columns, in one pass.

Letters: q student, p teacher; s, t their logits; d = t - s.
A "part" of a row is any set of its columns. Its statistics merge exactly, whatever the split:

    Mass        of each side: peak = max z; joint and outside = sums of exp(z - peak) over the
                columns finite on both sides and over the others; moment = sum of exp(z - peak)
                (z - peak) over all; argmax
    kl          of the base side (student for reverse KL and JSD, teacher for forward KL) over
                the joint columns: x = other - base, kl = log E[exp(x - E[x])]
    anchor      x at the base's argmax; mean = E[x - anchor]. Where one column holds nearly all of
                the mass, x - E[x] is tiny there, and exact only by way of the anchor

`kl` of the whole row is the divergence. For parts i of base weight w_i with offset e_i = E_i[x] -
E[x], and psi(x) = expm1(x) - x >= 0,

    expm1(kl) = sum_i w_i (psi(e_i) + exp(e_i) expm1(kl_i))

is a sum of non-negative terms: one pass over the vocabulary is enough, nothing cancels, and the
result is never negative.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from opsdc_kernels.triton.numerics import expm1, log1p, log_mixture_from, log_ratios_to_mixture, psi

RESULTS = 12
"""Rows of `store_results`: every `Stat`, then what the gradient needs."""
FOR_GRADIENT = slice(8, 11)
"""Normalizer, anchor and offset of `logits.logit_gradient`."""
JOINT_KL = 11
"""The kl over the columns finite on both sides."""


class Mass(NamedTuple):
    """One side of a part, see above."""

    peak: Any
    joint: Any
    outside: Any
    moment: Any
    argmax: Any


class Statistics(NamedTuple):
    """A part of a row: what `merge` merges."""

    student: Mass
    teacher: Mass
    anchor: Any
    mean: Any
    kl: Any


@triton.jit
def finite(x):
    """x, or 0 where x is -inf: the peak of a part without columns."""
    return tl.where(x > float("-inf"), x, 0.0)


@triton.jit
def side_statistics(z, cols, V, joint, MASKED: tl.constexpr):
    """(mass, exp(z - peak)) of one tile of one side."""
    peak = tl.max(z, 1)
    argmax = tl.min(tl.where(z == peak[:, None], cols[None, :], V), 1)
    y = z - finite(peak)[:, None]
    e = tl.exp(y)
    moment = tl.sum(tl.where(e > 0, e * y, 0.0), 1)
    if MASKED:
        inside = tl.sum(tl.where(joint, e, 0.0), 1)
        outside = tl.sum(tl.where(joint, 0.0, e), 1)
        # Not to be lost by underflow: whether there is such a column decides about infinity.
        any_outside = tl.max(((z > float("-inf")) & (joint == 0)).to(tl.int32), 1) > 0
        outside = tl.where(any_outside, tl.maximum(outside, 1e-37), 0.0)
    else:
        inside = tl.sum(e, 1)
        outside = tl.zeros_like(inside)
    return Mass(peak, inside, outside, moment, argmax), e


@triton.jit
def log_mass(mass):
    """log of the joint mass; -inf for an empty part."""
    some = mass.joint > 0
    return tl.where(some, mass.peak + tl.log(tl.where(some, mass.joint, 1.0)), float("-inf"))


@triton.jit
def kl_from(excess, base, other, mean):
    """kl from expm1(kl); where that is large, from the masses, which cannot overflow."""
    direct = log_mass(other) - log_mass(base) - mean
    return tl.where(excess < 1e4, log1p(tl.minimum(excess, 1e4)), direct)


@triton.jit
def tile_statistics(s, t, d, cols, V, BASE_TEACHER: tl.constexpr, MASKED: tl.constexpr):
    """Statistics of one tile (see the module's docstring). MASKED: a logit may be -inf on one side
    only."""
    joint = (s > float("-inf")) & (t > float("-inf"))
    mass_s, e_s = side_statistics(s, cols, V, joint, MASKED)
    mass_t, e_t = side_statistics(t, cols, V, joint, MASKED)
    if BASE_TEACHER:
        x, e, e_other, base, other = -d, e_t, e_s, mass_t, mass_s
    else:
        x, e, e_other, base, other = d, e_s, e_t, mass_s, mass_t
    if MASKED:
        x = tl.where(joint, x, 0.0)
        e = tl.where(joint, e, 0.0)
        e_other = tl.where(joint, e_other, 0.0)
    inverse = 1 / tl.where(base.joint > 0, base.joint, 1.0)
    anchor = tl.sum(tl.where(cols[None, :] == base.argmax[:, None], x, 0.0), 1)
    x -= anchor[:, None]
    mean = tl.sum(e * x, 1) * inverse
    c = x - mean[:, None]
    # Past 20 the product of a tiny e and a huge exp(c) is formed from the other side's mass.
    far = (
        e_other
        * tl.exp(tl.minimum(finite(other.peak) - finite(base.peak) - anchor - mean, 80.0))[:, None]
    )
    terms = tl.where(c < 20, e * psi(tl.minimum(c, 20.0)), far - e * (1 + c))
    kl = kl_from(tl.sum(terms, 1) * inverse, base, other, anchor + mean)
    return Statistics(mass_s, mass_t, anchor, mean, kl)


@triton.jit
def merge_mass(a, b, MASKED: tl.constexpr):
    peak = tl.maximum(a.peak, b.peak)
    y_a = finite(a.peak - finite(peak))
    y_b = finite(b.peak - finite(peak))
    f_a = tl.exp(y_a)
    f_b = tl.exp(y_b)
    joint = f_a * a.joint + f_b * b.joint
    argmax = tl.where(b.peak > a.peak, b.argmax, a.argmax)
    if MASKED:
        some = (a.outside > 0) | (b.outside > 0)
        outside = f_a * a.outside + f_b * b.outside
        outside = tl.where(some, tl.maximum(outside, 1e-37), 0.0)
        moment = f_a * (a.moment + (a.joint + a.outside) * y_a)
        moment += f_b * (b.moment + (b.joint + b.outside) * y_b)
    else:
        outside = a.outside
        moment = f_a * (a.moment + a.joint * y_a) + f_b * (b.moment + b.joint * y_b)
    return Mass(peak, joint, outside, moment, argmax)


@triton.jit
def share(part, union):
    """(w, log w) of a part in the joint mass of the union: w is exact to rounding, and log w has
    the range that w lacks."""
    empty = part.joint == 0
    y = tl.where(empty, 0.0, part.peak - union.peak)
    ratio = part.joint / tl.where(union.joint > 0, union.joint, 1.0)
    return tl.exp(y) * ratio, tl.where(empty, float("-inf"), y + tl.log(ratio))


@triton.jit
def merge_term(w, log_w, offset, kl):
    """w (psi(offset) + exp(offset) expm1(kl)), in the exponent where the product overflows."""
    near = w * (psi(offset) + tl.exp(offset) * expm1(kl))
    far = tl.exp(tl.minimum(log_w + offset + kl, 80.0)) - w * (1 + offset)
    return tl.where((offset < 20) & (kl < 20), near, far)


@triton.jit
def merge(a, b, BASE_TEACHER: tl.constexpr, MASKED: tl.constexpr):
    """Statistics of the union of two parts of a row, `a` to the left of `b`."""
    mass_s = merge_mass(a.student, b.student, MASKED)
    mass_t = merge_mass(a.teacher, b.teacher, MASKED)
    if BASE_TEACHER:
        w_a, log_w_a = share(a.teacher, mass_t)
        w_b, log_w_b = share(b.teacher, mass_t)
        base, other, a_peak, b_peak = mass_t, mass_s, a.teacher.peak, b.teacher.peak
    else:
        w_a, log_w_a = share(a.student, mass_s)
        w_b, log_w_b = share(b.student, mass_s)
        base, other, a_peak, b_peak = mass_s, mass_t, a.student.peak, b.student.peak
    left = a_peak >= b_peak
    anchor = tl.where(left, a.anchor, b.anchor)
    mean_a = tl.where(left, a.mean, a.anchor - anchor + a.mean)
    mean_b = tl.where(left, b.anchor - anchor + b.mean, b.mean)
    mean = w_a * mean_a + w_b * mean_b
    excess = merge_term(w_a, log_w_a, mean_a - mean, a.kl)
    excess += merge_term(w_b, log_w_b, mean_b - mean, b.kl)
    kl = kl_from(excess, base, other, anchor + mean)
    return Statistics(mass_s, mass_t, anchor, mean, kl)


@triton.jit
def empty_statistics(ROWS: tl.constexpr):
    zero = tl.zeros([ROWS], tl.float32)
    mass = Mass(zero - float("inf"), zero, zero, zero, tl.zeros([ROWS], tl.int32))
    return Statistics(mass, mass, zero, zero, zero)


@triton.jit
def at_target(so_far, z, cols, target):
    """The target's logit where it is in this tile, else `so_far`."""
    hit = cols[None, :] == target[:, None]
    return tl.maximum(so_far, tl.max(tl.where(hit, z, float("-inf")), 1))


@triton.jit
def logsumexp_and_entropy(mass):
    total = mass.joint + mass.outside
    entropy = tl.log(total) - mass.moment / total
    return mass.peak + tl.log(total), tl.maximum(entropy, 0.0)


@triton.jit
def store_results(stats, s_target, t_target, out, N, inside, DIVERGENCE: tl.constexpr):
    """out[RESULTS, row]; for the gradient (d - anchor) - offset is d - E_q[d] or log(p / q).

    Mass outside the joint columns enters as log1p(outside / joint): exact, and 0 where there is
    none. A column that the base has and the other side excludes makes the divergence infinite.
    """
    student = stats.student
    teacher = stats.teacher
    lse_s, entropy_s = logsumexp_and_entropy(student)
    lse_t, entropy_t = logsumexp_and_entropy(teacher)
    outside_s = log1p(student.outside / student.joint)
    outside_t = log1p(teacher.outside / teacher.joint)
    normalizer = lse_s
    anchor = stats.anchor
    if DIVERGENCE == 0:
        value = tl.where(student.outside > 0, float("inf"), stats.kl + outside_t)
        normalizer = log_mass(student)
        offset = stats.mean
    elif DIVERGENCE == 1:
        value = tl.where(teacher.outside > 0, float("inf"), stats.kl + outside_s)
        anchor = -anchor
        offset = outside_t - outside_s - (stats.mean + stats.kl)
    else:
        value = stats.kl
        offset = outside_t - outside_s + (stats.mean + stats.kl)
    agreement = (student.argmax == teacher.argmax).to(tl.float32)
    tl.store(out, value, mask=inside)
    tl.store(out + N, lse_s, mask=inside)
    tl.store(out + 2 * N, lse_t, mask=inside)
    tl.store(out + 3 * N, entropy_s, mask=inside)
    tl.store(out + 4 * N, entropy_t, mask=inside)
    tl.store(out + 5 * N, agreement, mask=inside)
    tl.store(out + 6 * N, s_target - lse_s, mask=inside)
    tl.store(out + 7 * N, t_target - lse_t, mask=inside)
    tl.store(out + 8 * N, normalizer, mask=inside)
    tl.store(out + 9 * N, anchor, mask=inside)
    tl.store(out + 10 * N, offset, mask=inside)
    tl.store(out + 11 * N, stats.kl, mask=inside)
    return lse_s, lse_t, anchor, offset


@triton.jit
def jsd_terms(s, t, d, lse_s, lse_t, anchor, offset, beta):
    """Sums over the columns of the JSD's terms, each >= 0, and of q (a - a at the anchor).

    With a = log(mixture / q), b = log(mixture / p) a column's term is (1 - beta) q psi(a) +
    beta p psi(b); past 2 the exponentials are the mixture itself and cannot overflow.
    """
    # Probabilities of the tile, and their log-ratios to the mixture.
    q = tl.exp(s - lse_s[:, None])
    p = tl.exp(t - lse_t[:, None])
    x = d - anchor[:, None]
    a, b = log_ratios_to_mixture(x - offset[:, None], beta)
    # Each side's terms: q psi(a) where a is small, and where it is large mixture - q (1 + a).
    mixture = (1 - beta) * q + beta * p
    far_q = mixture - tl.where(q > 0, q * (1 + a), 0.0)
    far_p = mixture - tl.where(p > 0, p * (1 + b), 0.0)
    from_q = tl.where(a < 2, q * psi(tl.minimum(a, 2.0)), far_q)
    from_p = tl.where(b < 2, p * psi(tl.minimum(b, 2.0)), far_p)
    value = tl.sum((1 - beta) * from_q + beta * from_p, 1)
    # The gradient's mean of a: at the anchor r is -offset.
    from_anchor = log_mixture_from(x, -offset[:, None], beta)
    return value, tl.sum(tl.where(q > 0, q * from_anchor, 0.0), 1)
