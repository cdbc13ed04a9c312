"""Tiles of both heads' logits, from hidden states and weights, in fp32.

Letters: N rows, V vocabulary, D hidden size; s student logits, t teacher logits, d = t - s.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from opsdc_kernels.triton.numerics import tanh


class Side(NamedTuple):
    """One model's head as the kernels read it: z = post * tanh(pre * (h W' + b)), or without post
    z = pre * (h W' + b); scale, soft-cap and temperature are folded into `pre` and `post`."""

    hidden: Any  # [N, D], or for a shared head the high part of the hidden difference
    low: Any  # [N, D] its low part, None where one part is exact (fp32)
    factor: Any  # [N] power of two of the row of a hidden difference, or None
    weight: Any  # [V, D]
    bias: Any  # [V] or None
    hidden_stride: Any
    weight_stride: Any
    D: Any
    pre: Any
    post: Any  # None without soft-cap


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
def product_tile(
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
    """(h W', h_t W_t') of one tile; with a shared head the second is (h_t - h) W' / factor."""
    acc = tl.zeros([BM, BN], tl.float32)
    acc_t = tl.zeros([BM, BN], tl.float32)
    if SHARED:
        acc, acc_t = shared_gemm_tile(
            acc, acc_t, student, teacher, row0, col0, N, V, BM, BN, BK, EVEN, UPCAST
        )
    else:
        acc = gemm_tile(acc, student, row0, col0, N, V, BM, BN, BK, EVEN, UPCAST)
        acc_t = gemm_tile(acc_t, teacher, row0, col0, N, V, BM, BN, BK, EVEN, UPCAST)
    return acc, acc_t


@triton.jit
def columns(x, SLICES: tl.constexpr):
    """x cut along its columns into a tuple. Passes over slices hold fewer registers than over x."""
    if SLICES == 1:
        return (x,)
    else:
        halves = tl.reshape(x, [x.shape[0], 2, x.shape[1] // 2])
        left, right = tl.split(tl.permute(halves, (0, 2, 1)))
        return columns(left, SLICES // 2) + columns(right, SLICES // 2)


@triton.jit
def load_factor(teacher, row0, N, BM: tl.constexpr):
    if teacher.factor is not None:
        return tl.load(teacher.factor + tl.minimum(row0 + tl.arange(0, BM), N - 1))
    else:
        return tl.full([BM], 1.0, tl.float32)


@triton.jit
def logits(student, teacher, acc, acc_t, factor, cols, V, SHARED: tl.constexpr):
    """(s, t, d, u) from products: -inf past the vocabulary; d = 0 where both are -inf.

    With a shared head the difference is a product of its own, and under soft-cap
    tanh(x + y) - tanh(x) = tanh(y) (1 - tanh(x) tanh(x + y)): its rounding error shrinks with the
    difference of the models. Under soft-cap ds/dx is proportional to 1 - u^2.
    """
    inside = (cols < V)[None, :]
    s, u, x = logit(acc, student, cols, V)
    s = tl.where(inside, s, float("-inf"))
    if SHARED:
        d = acc_t * tl.cast(teacher.pre, tl.float32) * factor[:, None]
        if teacher.post is not None:
            d = tl.cast(teacher.post, tl.float32) * tanh(d) * (1 - u * tanh(x + d))
        d = tl.where(inside, d, 0.0)
        t = s + d
    else:
        t, _, _ = logit(acc_t, teacher, cols, V)
        t = tl.where(inside, t, float("-inf"))
        d = tl.where((s == float("-inf")) & (t == float("-inf")), 0.0, t - s)
    return s, t, d, u
