"""The matrix products of a chunk: logits, dH and dW; how logits lie in memory; what rounding needs.

Results are fp32 (or float64) whatever the inputs' dtype. A CPU has no fast 16-bit product (it is
hundreds of times slower than fp32), so 16-bit weights are upcast there block by block; a GPU
multiplies 16-bit inputs and accumulates and stores fp32.

On tensor cores the gradient tile dZ is rounded to 16 bits, before token weights, normalization and
the upstream gradient enter: those are folded into the fp32 result (dH) and into the hidden states
(dW). Rows of fp16 tiles are scaled by powers of two first, or small gradients would be lost: fp16
ends at 6e-8, and a row of KL 1e-10 lives there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

UPCAST_BLOCK_BYTES = 8 << 20
"""Rows of a head that a CPU upcasts, and gathers, at once."""
GATHER_BLOCK_BYTES = 128 << 20
"""Rows of a head that a GPU gathers at once."""
FEW_TOKENS, SUMMED_TERMS = 2, 1024
"""A CPU's BLAS may sum a product of one or two rows term by term: on a large partial sum, what the
many small terms of a peaked row add up to is lost (5e-5 of dH at V 32,000 with MKL on AVX2)."""
FP16_OPERAND_LIMIT = 2.0**14


AddRows = Callable[[Tensor, Tensor, Tensor], Tensor]
"""`add_rows_`, or a function that keeps its contract."""


class Layout(Enum):
    """The way in which a chunk's logits [C, V] lie in memory."""

    BY_ROW = "row by row"
    BY_COLUMN = "the tokens of a column side by side"
    """MKL writes it, and multiplies it back, about a tenth faster; columns are gathered from it in
    one piece each."""


def empty_logits(
    like: Tensor, count: int, rows: int, columns: int, dtype: torch.dtype, layout: Layout
) -> Tensor:
    """New logits [count, rows, columns], on the device of `like`, to be cut into chunks by rows."""
    if layout is Layout.BY_COLUMN:
        return like.new_empty(count, columns, rows, dtype=dtype).transpose(1, 2)
    return like.new_empty(count, rows, columns, dtype=dtype)


def by_column(x_CV: Tensor) -> bool:
    """True for logits of `Layout.BY_COLUMN`."""
    return x_CV.stride(0) == 1


def select_columns(x_CV: Tensor, columns: Tensor, out_CK: Tensor | None = None) -> Tensor:
    """Return x[:, columns], laid out as x."""
    if not by_column(x_CV):
        return torch.index_select(x_CV, 1, columns, out=out_CK)
    return torch.index_select(x_CV.T, 0, columns, out=None if out_CK is None else out_CK.T).T


def two_tiles(x_CV: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Two tiles [C, width] in the memory of one [C, V]; `width` is at most half of V."""
    if by_column(x_CV):
        first, second = x_CV[:, : 2 * width].split(width, 1)
        return first, second
    first, second = x_CV.view(-1)[: 2 * len(x_CV) * width].view(2, len(x_CV), width)
    return first, second


# The products. Where `kept_K` is given, they are with these rows of the weight alone, gathered
# block by block.


def operand_dtype(weight: Tensor, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which the other factor of a product with `weight` must come."""
    return dtype if weight.device.type == "cpu" else weight.dtype


def logits_into(
    out_CV: Tensor, hidden_CD: Tensor, weight_VD: Tensor, kept_K: Tensor | None = None
) -> None:
    """Write out = hidden · weightᵀ; `hidden` in the dtype of `operand_dtype`."""
    for columns, block in row_blocks(weight_VD, out_CV.dtype, kept_K):
        out, right = out_CV[:, columns], block.T
        if hidden_CD.dtype == out.dtype:
            torch.mm(hidden_CD, right, out=out)
        else:
            torch.ops.aten.mm.dtype_out(hidden_CD, right, out.dtype, out=out)


def hidden_gradient_into(
    out_CD: Tensor, tile_CV: Tensor, weight_VD: Tensor, kept_K: Tensor | None = None
) -> None:
    """Write out = tile · weight."""
    if out_CD.device.type == "cpu" and len(out_CD) <= FEW_TOKENS:
        out_CD.zero_()
        for columns, block in row_blocks(weight_VD, out_CD.dtype, kept_K):
            tiles = tile_CV[:, columns].to(block.dtype).split(SUMMED_TERMS, 1)
            for tile, rows in zip(tiles, block.split(SUMMED_TERMS), strict=True):
                out_CD += tile @ rows
        return
    first = True
    for columns, block in row_blocks(weight_VD, out_CD.dtype, kept_K):
        _addmm_into(out_CD, tile_CV[:, columns].to(block.dtype), block, first=first)
        first = False
    if first:
        out_CD.zero_()


def add_weight_gradient(
    out_VD: Tensor, tile_CV: Tensor, hidden_CD: Tensor, *, first: bool = False
) -> None:
    """Add out += tileᵀ · hidden; `first`: out is not initialized yet, and is not read."""
    _addmm_into(out_VD, tile_CV.T, hidden_CD, first=first)


def scatter_weight_gradient(
    out_VD: Tensor,
    tile_CK: Tensor,
    hidden_CD: Tensor,
    kept_K: Tensor,
    add_rows: AddRows,
) -> Tensor:
    """Add out[kept] += tileᵀ · hidden, block by block. Returns ‖row‖² of what was added [K]."""
    square_K = out_VD.new_empty(len(kept_K))
    step = _rows_at_once(out_VD, out_VD.dtype)
    buffer = out_VD.new_empty(min(step, len(kept_K)), out_VD.shape[1])
    for start in range(0, len(kept_K), step):
        rows = kept_K[start : start + step]
        block = buffer[: len(rows)]
        add_weight_gradient(block, tile_CK[:, start : start + step], hidden_CD, first=True)
        square_K[start : start + step] = add_rows(out_VD, rows, block)
    return square_K


def add_rows_(matrix_VD: Tensor, rows_K: Tensor, block_KD: Tensor) -> Tensor:
    """Add matrix[rows] += block; returns ‖row‖² of the block [K]."""
    matrix_VD.index_add_(0, rows_K, block_KD)
    return torch.linalg.vector_norm(block_KD, dim=1).square_()


def mean_row(weight_VD: Tensor, dtype: torch.dtype, kept_K: Tensor | None = None) -> Tensor:
    """The mean row [D], in `dtype`."""
    if kept_K is None:
        return weight_VD.mean(0, dtype=dtype)
    total = weight_VD.new_zeros(weight_VD.shape[1], dtype=dtype)
    for _, block in row_blocks(weight_VD, dtype, kept_K):
        total += block.sum(0, dtype=dtype)
    return total / max(len(kept_K), 1)


def row_blocks(
    weight_VD: Tensor, dtype: torch.dtype, kept_K: Tensor | None = None
) -> Iterator[tuple[slice, Tensor]]:
    """Yield (place, block) of the rows that products with results of `dtype` take at once."""
    upcast = weight_VD.dtype != dtype and weight_VD.device.type == "cpu"
    size = len(weight_VD) if kept_K is None else len(kept_K)
    if kept_K is None and not upcast:
        yield slice(0, size), weight_VD
        return
    block_dtype = dtype if upcast else weight_VD.dtype
    step = _rows_at_once(weight_VD, block_dtype)
    buffer = weight_VD.new_empty((min(step, size), weight_VD.shape[1]), dtype=block_dtype)
    for start in range(0, size, step):
        place = slice(start, min(start + step, size))
        block = buffer[: place.stop - start]
        if kept_K is None:
            block.copy_(weight_VD[place])
        elif upcast:
            block.copy_(weight_VD.index_select(0, kept_K[place]))
        else:
            torch.index_select(weight_VD, 0, kept_K[place], out=block)
        yield place, block


def _rows_at_once(weight_VD: Tensor, dtype: torch.dtype) -> int:
    most = UPCAST_BLOCK_BYTES if weight_VD.device.type == "cpu" else GATHER_BLOCK_BYTES
    return max(most // (weight_VD.shape[1] * dtype.itemsize), 1)


def _addmm_into(out: Tensor, left: Tensor, right: Tensor, *, first: bool) -> None:
    """Add out += left · right; `first`: out is not read."""
    beta = 0 if first else 1
    if left.dtype == out.dtype:
        out.addmm_(left, right, beta=beta)
    elif left.device.type == "cpu":
        out.addmm_(left.to(out.dtype), right.to(out.dtype), beta=beta)
    else:
        torch.ops.aten.addmm.dtype_out(out, left, right, out.dtype, beta=beta, out=out)


@dataclass(frozen=True, slots=True)
class Tile:
    """The gradient tile dZ of a chunk, as `values` times `row_scale`."""

    values: Tensor
    """Shape [C, V], in fp32 or rounded."""
    row_scale: Tensor | None
    """Powers of two [C, 1], or None for 1."""
    residual: Tensor | None
    """Shape [C, 1]: Σ_v of what rounding added to a row of `values`; None where not rounded."""


def rounded_tile(dz_CV: Tensor, scratch_CV: Tensor, dtype: torch.dtype) -> Tile:
    """Return dZ in `dtype`, written over `scratch_CV`, or dZ itself in its own dtype; consumes
    `dz_CV`."""
    if dtype == dz_CV.dtype:
        return Tile(dz_CV, None, None)
    scale = None
    if dtype == torch.float16:
        exponent = torch.frexp(dz_CV.abs().amax(1, keepdim=True)).exponent.clamp_(-126, 0)
        scale = torch.ldexp(torch.ones_like(dz_CV[:, :1]), exponent)
        dz_CV.div_(scale)
    rounded = scratch_CV.reshape(-1).view(dtype)[: dz_CV.numel()].view_as(dz_CV).copy_(dz_CV)
    return Tile(rounded, scale, dz_CV.neg_().add_(rounded).sum(1, keepdim=True))


def hidden_gradient(
    tile: Tile, weight_VD: Tensor, mean_row_D: Tensor | None, kept_K: Tensor | None = None
) -> Tensor:
    """`tile.values` · W [C, D], corrected for the tile's rounding.

    Rounding leaves Σ_v (round(dZ) − dZ) ≠ 0, which multiplies whatever all rows of W have in
    common; taking off that sum times the mean row of W removes the error. Sum and mean run over
    the same columns, so it holds under a soft-cap and on a shard of the vocabulary too, where Σ_v
    dZ itself is not 0.
    """
    dtype = tile.values.dtype if tile.residual is None else tile.residual.dtype
    size = tile.values.shape[0], weight_VD.shape[1]
    out_CD = torch.empty(size, dtype=dtype, device=weight_VD.device)
    hidden_gradient_into(out_CD, tile.values, weight_VD, kept_K)
    if tile.residual is not None:
        assert mean_row_D is not None
        out_CD.addmm_(tile.residual, mean_row_D[None, :], alpha=-1)
    return out_CD


def operand_scale(hidden_KD: Tensor, row_weight_K: Tensor | None, factor: float) -> Tensor:
    """A power of two (0-dim, on the device) that brings weighted hidden states just below
    `FP16_OPERAND_LIMIT`: the other factor of dW, whose smallest rows then stay normal in fp16."""
    largest = hidden_KD.abs().amax().float() * abs(factor)
    if row_weight_K is not None:
        largest = largest * row_weight_K.abs().amax()
    exponent = torch.frexp(FP16_OPERAND_LIMIT / largest).exponent - 1
    return torch.ldexp(torch.ones_like(largest), exponent.clamp_(-100, 100))
