"""Device functions shared by the forward, backward and row kernels.

Letters: N rows, V vocabulary, D hidden size; q student, p teacher; s, t their logits; d = t - s.
A "part" of a row is any set of its columns. Its statistics merge exactly, whatever the split:

    Mass        of each side: peak = max z; joint and outside = sums of exp(z - peak) over the
                columns finite on both sides and over the others; moment = sum of exp(z - peak)
                (z - peak) over all; argmax
    mean, kl    of the base side (student for reverse KL and JSD, teacher for forward KL) over
                the joint columns: x = other - base, mean = E[x], kl = log E[exp(x - mean)]

`kl` of the whole row is the divergence. For parts i of base weight w_i with offset e_i = mean_i -
mean, and psi(x) = expm1(x) - x >= 0,

    expm1(kl) = sum_i w_i (psi(e_i) + exp(e_i) expm1(kl_i))

is a sum of non-negative terms: one pass over the vocabulary is enough, nothing cancels, and the
result is never negative.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl


class Side(NamedTuple):
    """One model's head as the kernels read it: z = post * tanh(pre * (h W' + b)), or without post
    z = pre * (h W' + b); scale, soft-cap and temperature are folded into `pre` and `post`."""

    hidden: object  # [N, D], or for a shared head the high part of the hidden difference
    low: object  # [N, D] its low part, None where one part is exact (fp32)
    factor: object  # [N] power of two of the row of a hidden difference, or None
    weight: object  # [V, D]
    bias: object  # [V] or None
    hidden_stride: object
    weight_stride: object
    D: object
    pre: object
    post: object  # None without soft-cap


class Mass(NamedTuple):
    """One side of a part: see the module's docstring."""

    peak: object
    joint: object
    outside: object
    moment: object
    argmax: object


class Statistics(NamedTuple):
    """A part of a row: what `merge` merges."""

    student: Mass
    teacher: Mass
    mean: object
    kl: object


@triton.jit
def psi(x):
    """expm1(x) - x without cancellation near 0."""
    series = 1 + x * (1.0 / 8) * (1 + x * (1.0 / 9) * (1 + x * (1.0 / 10)))
    series = 1 + x * (1.0 / 5) * (1 + x * (1.0 / 6) * (1 + x * (1.0 / 7) * series))
    series = 0.5 * x * x * (1 + x * (1.0 / 3) * (1 + x * (1.0 / 4) * series))
    return tl.where(tl.abs(x) < 0.5, series, tl.exp(x) - 1 - x)


@triton.jit
def expm1(x):
    return tl.where(tl.abs(x) < 0.5, x + psi(x), tl.exp(x) - 1)


@triton.jit
def log1p(x):
    """By the atanh series near 0, where log(1 + x) has lost the digits of x."""
    s = x / (2 + x)
    y = s * s
    series = 1.0 / 7 + y * (1.0 / 9 + y * (1.0 / 11 + y * (1.0 / 13)))
    series = 2 * s * (1 + y * (1.0 / 3 + y * (1.0 / 5 + y * series)))
    return tl.where(tl.abs(x) < 0.4, series, tl.log(1 + x))


@triton.jit
def tanh(x):
    e = expm1(-2 * tl.abs(x))
    t = -e / (2 + e)
    return tl.where(x < 0, -t, t)


@triton.jit
def log_ratio_to_mixture(r, beta):
    """log(1 - beta + beta exp(r)) at any r."""
    near = log1p(beta * expm1(tl.minimum(r, 1.0)))
    far = r + log1p((1 - beta) * expm1(-tl.maximum(r, 1.0)))
    return tl.where(r < 1, near, far)


@triton.jit
def program_tile(N, BM: tl.constexpr, GROUP: tl.constexpr, PARTS):
    """(row block, part) of this program. GROUP row blocks walk over the vocabulary together, so
    that their hidden states stay in L2 and every weight tile they need is fetched once."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(N, BM)
    group = pid // (GROUP * PARTS)
    inside = pid % (GROUP * PARTS)
    size = tl.minimum(GROUP, blocks - group * GROUP)
    return group * GROUP + inside % size, inside // size


@triton.jit
def dot(a, b_t, acc, UPCAST: tl.constexpr):
    if UPCAST:  # the interpreter's bf16 dot is wrong
        a = a.to(tl.float32)
        b_t = b_t.to(tl.float32)
    return tl.dot(a, tl.trans(b_t), acc, input_precision="ieee")


@triton.jit
def gemm_tile(
    acc,
    side,
    row0,
    col0,
    N,
    V,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    EVEN: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """acc + h W' for one tile. Rows and columns past the end repeat the last one (the caller drops
    them), so that the loads need no mask. Offsets are int64 per block and int32 inside it."""
    k = tl.arange(0, BK)
    rows = tl.minimum(tl.arange(0, BM), N - 1 - row0)
    cols = tl.minimum(tl.arange(0, BN), V - 1 - col0)
    h_offset = tl.cast(row0, tl.int64) * side.hidden_stride
    h_block = rows[:, None] * side.hidden_stride + k[None, :]
    w_ptr = side.weight + tl.cast(col0, tl.int64) * side.weight_stride
    w_block = cols[:, None] * side.weight_stride + k[None, :]
    for k0 in range(0, side.D, BK):
        if EVEN:
            w = tl.load(w_ptr + w_block + k0)
            h = tl.load(side.hidden + h_offset + h_block + k0)
        else:
            inside = (k0 + k < side.D)[None, :]
            w = tl.load(w_ptr + w_block + k0, mask=inside, other=0.0)
            h = tl.load(side.hidden + h_offset + h_block + k0, mask=inside, other=0.0)
        acc = dot(h, w, acc, UPCAST)
        if side.low is not None:
            if EVEN:
                low = tl.load(side.low + h_offset + h_block + k0)
            else:
                low = tl.load(side.low + h_offset + h_block + k0, mask=inside, other=0.0)
            acc = dot(low, w, acc, UPCAST)
    return acc


@triton.jit
def shared_gemm_tile(
    acc,
    acc_d,
    student,
    delta,
    row0,
    col0,
    N,
    V,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    EVEN: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """As `gemm_tile`, for h and the hidden difference against one weight tile, loaded once."""
    k = tl.arange(0, BK)
    rows = tl.minimum(tl.arange(0, BM), N - 1 - row0)
    cols = tl.minimum(tl.arange(0, BN), V - 1 - col0)
    row_base = tl.cast(row0, tl.int64)
    s_ptr = student.hidden + row_base * student.hidden_stride
    s_block = rows[:, None] * student.hidden_stride + k[None, :]
    d_offset = row_base * delta.hidden_stride
    d_block = rows[:, None] * delta.hidden_stride + k[None, :]
    w_ptr = student.weight + tl.cast(col0, tl.int64) * student.weight_stride
    w_block = cols[:, None] * student.weight_stride + k[None, :]
    for k0 in range(0, student.D, BK):
        inside = (k0 + k < student.D)[None, :] | EVEN
        if EVEN:
            w = tl.load(w_ptr + w_block + k0)
            h = tl.load(s_ptr + s_block + k0)
            high = tl.load(delta.hidden + d_offset + d_block + k0)
        else:
            w = tl.load(w_ptr + w_block + k0, mask=inside, other=0.0)
            h = tl.load(s_ptr + s_block + k0, mask=inside, other=0.0)
            high = tl.load(delta.hidden + d_offset + d_block + k0, mask=inside, other=0.0)
        acc = dot(h, w, acc, UPCAST)
        acc_d = dot(high, w, acc_d, UPCAST)
        if delta.low is not None:
            if EVEN:
                low = tl.load(delta.low + d_offset + d_block + k0)
            else:
                low = tl.load(delta.low + d_offset + d_block + k0, mask=inside, other=0.0)
            acc_d = dot(low, w, acc_d, UPCAST)
    return acc, acc_d


@triton.jit
def logit(acc, side, cols, V):
    """(z, u, x): the side's logit; under soft-cap z = post * u and u = tanh(x)."""
    if side.bias is not None:
        acc += tl.load(side.bias + cols, mask=cols < V, other=0.0).to(tl.float32)[None, :]
    x = acc * tl.cast(side.pre, tl.float32)
    if side.post is not None:
        u = tanh(x)
        return u * tl.cast(side.post, tl.float32), u, x
    else:
        return x, x, x


@triton.jit
def logit_tile(
    student,
    teacher,
    row0,
    col0,
    N,
    V,
    SHARED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    EVEN: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """(s, t, d, u) of one tile in fp32: -inf past the vocabulary; d = 0 where both are -inf.

    With a shared head (`teacher.hidden` is the hidden difference) d is a GEMM of its own, and under
    soft-cap tanh(x + y) - tanh(x) = tanh(y) (1 - tanh(x) tanh(x + y)): its rounding error shrinks
    with the difference of the models.
    """
    cols = col0 + tl.arange(0, BN)
    acc = tl.zeros([BM, BN], tl.float32)
    acc_t = tl.zeros([BM, BN], tl.float32)
    if SHARED:
        acc, acc_t = shared_gemm_tile(
            acc, acc_t, student, teacher, row0, col0, N, V, BM, BN, BK, EVEN, UPCAST
        )
        s, u, x = logit(acc, student, cols, V)
        y = acc_t * tl.cast(teacher.pre, tl.float32)
        if teacher.factor is not None:
            rows = tl.minimum(row0 + tl.arange(0, BM), N - 1)
            y *= tl.load(teacher.factor + rows)[:, None]
        if teacher.post is not None:
            d = tl.cast(teacher.post, tl.float32) * tanh(y) * (1 - u * tanh(x + y))
        else:
            d = y
        s = tl.where((cols < V)[None, :], s, float("-inf"))
        d = tl.where((cols < V)[None, :], d, 0.0)
        t = s + d
    else:
        acc = gemm_tile(acc, student, row0, col0, N, V, BM, BN, BK, EVEN, UPCAST)
        acc_t = gemm_tile(acc_t, teacher, row0, col0, N, V, BM, BN, BK, EVEN, UPCAST)
        s, u, _ = logit(acc, student, cols, V)
        t, _, _ = logit(acc_t, teacher, cols, V)
        s = tl.where((cols < V)[None, :], s, float("-inf"))
        t = tl.where((cols < V)[None, :], t, float("-inf"))
        d = tl.where((s == float("-inf")) & (t == float("-inf")), 0.0, t - s)
    return s, t, d, u


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
        x, e, z, base, other = -d, e_t, t, mass_t, mass_s
    else:
        x, e, z, base, other = d, e_s, s, mass_s, mass_t
    if MASKED:
        x = tl.where(joint, x, 0.0)
        e = tl.where(joint, e, 0.0)
    inverse = 1 / tl.where(base.joint > 0, base.joint, 1.0)
    mean = tl.sum(e * x, 1) * inverse
    c = x - mean[:, None]
    # Past 20 the product of a tiny e and a huge exp(c) must be formed in the exponent.
    y = z - finite(base.peak)[:, None]
    far = tl.exp(tl.minimum(y + c, 80.0))
    if MASKED:
        far = tl.where(joint, far, 0.0)
    terms = tl.where(c < 20, e * psi(tl.minimum(c, 20.0)), far - e * (1 + c))
    kl = kl_from(tl.sum(terms, 1) * inverse, base, other, mean)
    return Statistics(mass_s, mass_t, mean, kl)


@triton.jit
def merge_mass(a, b):
    peak = tl.maximum(a.peak, b.peak)
    y_a = finite(a.peak - finite(peak))
    y_b = finite(b.peak - finite(peak))
    f_a = tl.exp(y_a)
    f_b = tl.exp(y_b)
    outside = f_a * a.outside + f_b * b.outside
    some = (a.outside > 0) | (b.outside > 0)
    moment = f_a * (a.moment + (a.joint + a.outside) * y_a)
    moment += f_b * (b.moment + (b.joint + b.outside) * y_b)
    return Mass(
        peak,
        f_a * a.joint + f_b * b.joint,
        tl.where(some, tl.maximum(outside, 1e-37), 0.0),
        moment,
        tl.where(b.peak > a.peak, b.argmax, a.argmax),
    )


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
def merge(a, b, BASE_TEACHER: tl.constexpr):
    """Statistics of the union of two parts of a row, `a` to the left of `b`."""
    mass_s = merge_mass(a.student, b.student)
    mass_t = merge_mass(a.teacher, b.teacher)
    if BASE_TEACHER:
        w_a, log_w_a = share(a.teacher, mass_t)
        w_b, log_w_b = share(b.teacher, mass_t)
        base, other = mass_t, mass_s
    else:
        w_a, log_w_a = share(a.student, mass_s)
        w_b, log_w_b = share(b.student, mass_s)
        base, other = mass_s, mass_t
    mean = tl.where(w_a == 0, b.mean, a.mean + w_b * (b.mean - a.mean))
    excess = merge_term(w_a, log_w_a, a.mean - mean, a.kl)
    excess += merge_term(w_b, log_w_b, b.mean - mean, b.kl)
    return Statistics(mass_s, mass_t, mean, kl_from(excess, base, other, mean))


@triton.jit
def empty_statistics(ROWS: tl.constexpr):
    zero = tl.zeros([ROWS], tl.float32)
    mass = Mass(zero - float("inf"), zero, zero, zero, tl.zeros([ROWS], tl.int32))
    return Statistics(mass, mass, zero, zero)
