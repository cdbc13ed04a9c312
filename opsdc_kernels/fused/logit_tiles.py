"""Tiles of both heads' products, from hidden states and weights, in fp32.

Letters: N rows, V vocabulary, D hidden size.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def program_tile(N, BM: tl.constexpr, GROUP: tl.constexpr, PARTS):
    """Return (row block, part) of this program. GROUP row blocks walk over the vocabulary together,
    so that their hidden states stay in L2 and every weight tile they need is fetched once."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(N, BM)
    group = pid // (GROUP * PARTS)
    inside = pid % (GROUP * PARTS)
    size = tl.minimum(GROUP, blocks - group * GROUP)
    return group * GROUP + inside % size, inside // size


@triton.jit
def dot(a, b_t, acc, UPCAST: tl.constexpr):
    """Return acc + a b_t'."""
    if UPCAST:  # the interpreter's bf16 dot is wrong
        a = a.to(tl.float32)
        b_t = b_t.to(tl.float32)
    return tl.dot(a, tl.trans(b_t), acc, input_precision="ieee")


@triton.jit
def load_step(pointers, k, D, EVEN: tl.constexpr):
    """Load [rows, BK] of one step over the hidden units, 0 past the last one."""
    if EVEN:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=(k < D)[None, :], other=0.0)


@triton.jit
def row_pointers(base, stride, first, limit, ROWS: tl.constexpr, BK: tl.constexpr):
    """Pointers to the first BK units of ROWS rows; rows past the end repeat the last one (the
    caller drops them). Offsets are int64 up to the first row and int32 from there."""
    rows = tl.minimum(tl.arange(0, ROWS), limit - 1 - first)
    block = base + tl.cast(first, tl.int64) * stride
    return block + (rows[:, None] * stride + tl.arange(0, BK)[None, :])


@triton.jit
def gemm_tile(
    acc, side, row0, col0, N, V,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Return acc + h W' for one tile."""
    h_ptr = row_pointers(side.hidden, side.hidden_stride, row0, N, BM, BK)
    w_ptr = row_pointers(side.weight, side.weight_stride, col0, V, BN, BK)
    for k0 in range(0, side.D, BK):
        k = k0 + tl.arange(0, BK)
        w = load_step(w_ptr + k0, k, side.D, EVEN)
        h = load_step(h_ptr + k0, k, side.D, EVEN)
        acc = dot(h, w, acc, UPCAST)
    return acc


@triton.jit
def shared_gemm_tile(
    acc, acc_d, student, delta, row0, col0, N, V,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Do the same for h and the hidden difference, against one weight tile that is loaded once."""
    h_ptr = row_pointers(student.hidden, student.hidden_stride, row0, N, BM, BK)
    w_ptr = row_pointers(student.weight, student.weight_stride, col0, V, BN, BK)
    high_ptr = row_pointers(delta.hidden, delta.hidden_stride, row0, N, BM, BK)
    if delta.low is not None:
        low_ptr = row_pointers(delta.low, delta.hidden_stride, row0, N, BM, BK)
    for k0 in range(0, student.D, BK):
        k = k0 + tl.arange(0, BK)
        w = load_step(w_ptr + k0, k, student.D, EVEN)
        h = load_step(h_ptr + k0, k, student.D, EVEN)
        acc = dot(h, w, acc, UPCAST)
        high = load_step(high_ptr + k0, k, student.D, EVEN)
        acc_d = dot(high, w, acc_d, UPCAST)
        if delta.low is not None:
            low = load_step(low_ptr + k0, k, student.D, EVEN)
            acc_d = dot(low, w, acc_d, UPCAST)
    return acc, acc_d


@triton.jit
def product_tile(
    student, teacher, row0, col0, N, V,
    SHARED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Return (h W', h_t W_t') of a tile; with a shared head the second is (h_t - h) W' / factor."""
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
def slices(x, SLICES: tl.constexpr):
    """Cut x along its columns into a tuple. Passes over slices hold fewer registers than over x."""
    if SLICES == 1:
        return (x,)
    else:
        halves = tl.reshape(x, [x.shape[0], 2, x.shape[1] // 2])
        left, right = tl.split(tl.permute(halves, (0, 2, 1)))
        return slices(left, SLICES // 2) + slices(right, SLICES // 2)


@triton.jit
def load_factor(teacher, row0, N, BM: tl.constexpr):
    """Powers of two of the hidden difference's rows, or ones."""
    if teacher.factor is not None:
        return tl.load(teacher.factor + tl.minimum(row0 + tl.arange(0, BM), N - 1))
    else:
        return tl.full([BM], 1.0, tl.float32)
