"""One tile of both sides' logits from their products, and the gradient with respect to them.

Letters: s student logits, t teacher logits, d = t - s; q and p their distributions.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from opsdc_kernels.triton.numerics import expm1, log_mixture_from, tanh


class SideOfTriton(NamedTuple):
    """One head as the kernels read it: z = post * tanh(pre * (x + b)), or without post z = pre *
    (x + b), x being h W' or, for the row pass, products in memory."""

    hidden: Any = None  # [N, D], or for a shared head the high part of the hidden difference
    low: Any = None  # [N, D] its low part, None where one part is exact (fp32)
    factor: Any = None  # [N] power of two of the row of a hidden difference, or None
    weight: Any = None  # [V, D]
    bias: Any = None  # [V] or None
    hidden_stride: Any = 0
    weight_stride: Any = 0
    D: Any = 0
    pre: Any = 1.0
    post: Any = None  # None without soft-cap


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


@triton.jit
def logit_gradient(
    s, t, d, normalizer, anchor, offset, mean, beta, DIVERGENCE: tl.constexpr, MASKED: tl.constexpr
):
    """Gradient with respect to s, without the factors that are constant in a row.

    reverse KL -q (d - E_q[d]); forward KL q - p = -q expm1(r), r = log(p / q); JSD, without its
    1 - beta, -q (a - E_q[a]), a = log(mixture / q) from its value at the anchor. Nothing flows
    through an infinite logit s.
    """
    q = tl.exp(s - normalizer[:, None])
    x = d - anchor[:, None]
    c = x - offset[:, None]
    if DIVERGENCE == 1:
        far = tl.exp(tl.minimum(s - normalizer[:, None] + c, 0.0)) - q
        c = tl.where(c < 20, q * expm1(tl.minimum(c, 20.0)), far)
    else:
        if DIVERGENCE == 2:
            c = log_mixture_from(x, -offset[:, None], beta) - mean[:, None]
        c = q * c
    if MASKED:
        c = tl.where(s == float("-inf"), 0.0, c)
        if DIVERGENCE == 0:
            c = tl.where(t == float("-inf"), 0.0, c)
    return -c
