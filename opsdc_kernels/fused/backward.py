"""Backward kernel: recomputes logit tiles and writes the gradient tile, unweighted, for two GEMMs.

The gradient with respect to the student's logits lies between -1 and 1 and shrinks with the
divergence, so it is scaled per row by a power of two before it is rounded to 16 bits. What the
rounding adds to a row's sum is kept in fp32: multiplied by the mean row of the weight it is the
part of the error that all rows of the weight share, and the launcher subtracts it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from opsdc_kernels.fused.configs import Config
from opsdc_kernels.fused.heads import Heads
from opsdc_kernels.fused.logit_tiles import load_factor, product_tile, program_tile, slices
from opsdc_kernels.problem import GradientsWanted, Options
from opsdc_kernels.products import add_weight_gradient, hidden_gradient_into
from opsdc_kernels.triton.logits import logit_gradient, logits


@triton.jit
def gradient_kernel(
    student, teacher, normalizer_ptr, anchor_ptr, offset_ptr, mean_ptr, scale_ptr, coefficient_ptr,
    dz_ptr, residual_ptr, dbias_ptr, beta, row_begin, row_end, V, PARTS,
    SHARED: tl.constexpr, DIVERGENCE: tl.constexpr, MASKED: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, SLICES: tl.constexpr, GROUP: tl.constexpr,
    EVEN: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Write dz[row - row_begin, column], scaled by scale[row]. residual[tile, row - row_begin] sums
    its rounding over the tile; dbias[block, column] sums the true gradient, times the row's
    coefficient, over the block's rows."""
    C = row_end - row_begin
    block, tile = program_tile(C, BM, GROUP, PARTS)
    local = block * BM + tl.arange(0, BM)
    row0 = row_begin + block * BM
    rows = row0 + tl.arange(0, BM)
    inside = rows < row_end
    normalizer = tl.load(normalizer_ptr + rows, mask=inside, other=0.0)
    anchor = tl.load(anchor_ptr + rows, mask=inside, other=0.0)
    offset = tl.load(offset_ptr + rows, mask=inside, other=0.0)
    scale = tl.load(scale_ptr + rows, mask=inside, other=0.0)
    coefficient = tl.load(coefficient_ptr + rows, mask=inside, other=0.0)
    mean = tl.zeros_like(anchor)
    if DIVERGENCE == 2:
        mean = tl.load(mean_ptr + rows, mask=inside, other=0.0)
    beta = tl.cast(beta, tl.float32)
    factor = load_factor(teacher, row0, row_end, BM)
    acc, acc_t = product_tile(
        student, teacher, row0, tile * BN, row_end, V, SHARED, BM, BN, BK, EVEN, UPCAST
    )
    acc, acc_t = slices(acc, SLICES), slices(acc_t, SLICES)
    residual = tl.zeros_like(anchor)
    for i in tl.static_range(SLICES):
        cols = tile * BN + i * (BN // SLICES) + tl.arange(0, BN // SLICES)
        s, t, d, u = logits(student, teacher, acc[i], acc_t[i], factor, cols, V, SHARED)
        g = logit_gradient(s, t, d, normalizer, anchor, offset, mean, beta, DIVERGENCE, MASKED)
        if student.post is not None:
            g *= 1 - u * u
        g *= scale[:, None]
        valid = inside[:, None] & (cols < V)[None, :]
        rounded = g.to(dz_ptr.dtype.element_ty)
        row_offsets = tl.cast(local, tl.int64) * V
        tl.store(dz_ptr + row_offsets[:, None] + cols[None, :], rounded, mask=valid)
        residual += tl.sum(tl.where(valid, rounded.to(tl.float32) - g, 0.0), 1)
        if dbias_ptr is not None:
            column = tl.sum(tl.where(valid, g * coefficient[:, None], 0.0), 0)
            tl.store(dbias_ptr + tl.cast(block, tl.int64) * V + cols, column, mask=cols < V)
    if residual_ptr is not None:
        tl.store(residual_ptr + tl.cast(tile, tl.int64) * C + local, residual, mask=inside)


def backward(
    heads: Heads,
    saved: Tensor,
    coefficient_K: Tensor,
    options: Options,
    vocab_size: int,
    wanted: GradientsWanted,
    workspace_bytes: int,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The fp32 gradients of the kept hidden states [K, D], of the weight and of the bias, or None.

    `saved`: each row's normalizer, anchor, offset, mean and power-of-two scale. `coefficient_K`:
    the factor of the row's scaled logit gradient. It is applied to dH in fp32; in dW to the hidden
    states, divided by the largest of them, so that rows of equal weight get powers of two and
    round nothing.
    """
    hidden, full_weight = heads.student.hidden, heads.student.weight
    n_rows, weight = hidden.shape[0], full_weight[:vocab_size]
    # The three gradients, and what is needed for them beside the tile.
    dh_KD = coefficient_K.new_zeros(hidden.shape) if wanted.hidden else None
    dw_VD = coefficient_K.new_zeros(full_weight.shape) if wanted.weight else None
    dbias_V = coefficient_K.new_zeros(full_weight.shape[0]) if wanted.bias else None
    largest = coefficient_K.abs().amax()
    share_K1 = (coefficient_K / torch.where(largest > 0, largest, 1.0))[:, None]
    rounded = hidden.dtype != torch.float32
    mean_row_D = weight.mean(0, dtype=torch.float32) if rounded and wanted.hidden else None
    # Chunks of whole row blocks whose gradient tile [C, V] fits the workspace.
    kernel = "jsd" if options.divergence == "jsd" else "gradient"
    config = heads.config(kernel, extras=wanted.bias)
    height = workspace_bytes // (vocab_size * hidden.element_size()) // config.BM
    height = min(max(height, 1) * config.BM, n_rows)
    buffer = hidden.new_empty((height, vocab_size))
    for start in range(0, n_rows, height):
        rows = slice(start, min(start + height, n_rows))
        dz_CV = buffer[: rows.stop - rows.start]
        residual_C, dbias = gradient_tile(
            heads, config, options, saved, coefficient_K, rows, dz_CV,
            residual=mean_row_D is not None, bias=wanted.bias,
        )  # fmt: skip
        if dh_KD is not None:
            hidden_gradient_into(dh_KD[rows], dz_CV, weight)
            if residual_C is not None and mean_row_D is not None:
                dh_KD[rows] -= residual_C[:, None] * mean_row_D
        if dw_VD is not None:
            weighted = (hidden[rows] * share_K1[rows]).to(hidden.dtype)
            add_weight_gradient(dw_VD[:vocab_size], dz_CV, weighted)
        if dbias_V is not None and dbias is not None:
            dbias_V[:vocab_size] += dbias
    if dh_KD is not None:
        dh_KD *= coefficient_K[:, None]
    if dw_VD is not None:
        dw_VD *= largest
    return dh_KD, dw_VD, dbias_V


def gradient_tile(
    heads: Heads,
    config: Config,
    options: Options,
    saved: Tensor,
    coefficient_K: Tensor,
    rows: slice,
    dz_CV: Tensor,
    *,
    residual: bool,
    bias: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Fill `dz_CV` for `rows`; the rounding's row sums [C] and the bias gradient [V], if wanted."""
    n_rows, V = dz_CV.shape
    blocks, tiles = triton.cdiv(n_rows, config.BM), triton.cdiv(V, config.BN)
    residuals = saved.new_empty((tiles, n_rows)) if residual else None
    dbias = saved.new_empty((blocks, V)) if bias else None
    gradient_kernel[(blocks * tiles,)](
        heads.student, heads.teacher, *saved, coefficient_K, dz_CV, residuals, dbias,
        options.beta, rows.start, rows.stop, V, tiles,
        DIVERGENCE=options.kind, MASKED=heads.masked, **heads.launch_options(config),
    )  # fmt: skip
    return (
        None if residuals is None else residuals.sum(0),
        None if dbias is None else dbias.sum(0),
    )
