"""The four matrix products of a chunk, with fp32 (or float64) results whatever the inputs' dtype.

A CPU has no fast 16-bit product (it is hundreds of times slower than fp32), so 16-bit weights are
upcast there block by block; a GPU multiplies 16-bit inputs and accumulates and stores fp32.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

UPCAST_BLOCK_BYTES = 8 << 20
GATHER_BLOCK_BYTES = 128 << 20
"""Of the rows of a head that are gathered at once on a GPU; a CPU upcasts and gathers in one go."""
FEW_TOKENS, SUMMED_TERMS = 2, 1024
"""A CPU's BLAS may sum a product of one or two rows term by term: on a large partial sum, what the
many small terms of a peaked row add up to is lost (5e-5 of dH at V 32,000 with MKL on AVX2)."""


def upcasts(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether products with `weight` go through upcast blocks: 16-bit weights on a CPU."""
    return weight.dtype != dtype and weight.device.type == "cpu"


def logits_into(
    out_CV: Tensor, hidden_CD: Tensor, weight_VD: Tensor, kept_K: Tensor | None = None
) -> None:
    """out = hidden · weightᵀ; `hidden` in the dtype of `operand_dtype`. `kept_K`, here and below:
    with these rows of the weight alone, gathered block by block."""
    for columns, block in row_blocks(weight_VD, out_CV.dtype, kept_K):
        _mm_into(out_CV[:, columns], hidden_CD, block.T)


def hidden_gradient_into(
    out_CD: Tensor, tile_CV: Tensor, weight_VD: Tensor, kept_K: Tensor | None = None
) -> None:
    """out = tile · weight."""
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
    """out += tileᵀ · hidden; `first`: out is not initialized yet, and is not read."""
    _addmm_into(out_VD, tile_CV.T, hidden_CD, first=first)


def scatter_weight_gradient(
    out_VD: Tensor, tile_CK: Tensor, hidden_CD: Tensor, kept_K: Tensor
) -> None:
    """out[kept] += tileᵀ · hidden, block by block."""
    size, dim = len(kept_K), out_VD.shape[1]
    on_cpu = out_VD.device.type == "cpu"
    most = UPCAST_BLOCK_BYTES if on_cpu else GATHER_BLOCK_BYTES
    step = max(most // (dim * out_VD.dtype.itemsize), 1)
    buffer = out_VD.new_empty(min(step, size), dim)
    for start in range(0, size, step):
        rows = kept_K[start : start + step]
        block = buffer[: len(rows)]
        add_weight_gradient(block, tile_CK[:, start : start + step], hidden_CD, first=True)
        out_VD.index_add_(0, rows, block)


def mean_row(weight_VD: Tensor, dtype: torch.dtype, kept_K: Tensor | None = None) -> Tensor:
    """[D] in `dtype`."""
    if kept_K is None:
        return weight_VD.mean(0, dtype=dtype)
    total = weight_VD.new_zeros(weight_VD.shape[1], dtype=dtype)
    for _, block in row_blocks(weight_VD, dtype, kept_K):
        total += block.sum(0, dtype=dtype)
    return total / max(len(kept_K), 1)


def operand_dtype(weight: Tensor, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which the other factor of a product with `weight` must come."""
    return dtype if weight.device.type == "cpu" else weight.dtype


def _mm_into(out: Tensor, left: Tensor, right: Tensor) -> None:
    if left.dtype == out.dtype:
        torch.mm(left, right, out=out)
    else:
        torch.ops.aten.mm.dtype_out(left, right, out.dtype, out=out)


def _addmm_into(out: Tensor, left: Tensor, right: Tensor, *, first: bool) -> None:
    """out += left · right; `first`: out is not read."""
    beta = 0 if first else 1
    if left.dtype == out.dtype:
        out.addmm_(left, right, beta=beta)
    elif left.device.type == "cpu":
        out.addmm_(left.to(out.dtype), right.to(out.dtype), beta=beta)
    else:
        torch.ops.aten.addmm.dtype_out(out, left, right, out.dtype, beta=beta, out=out)


def row_blocks(
    weight_VD: Tensor, dtype: torch.dtype, kept_K: Tensor | None = None
) -> Iterator[tuple[slice, Tensor]]:
    """(which, block) of the rows that products with results of `dtype` take at once."""
    dim, upcast = weight_VD.shape[1], upcasts(weight_VD, dtype)
    size = len(weight_VD) if kept_K is None else len(kept_K)
    if kept_K is None and not upcast:
        yield slice(0, size), weight_VD
        return
    on_cpu = weight_VD.device.type == "cpu"
    block_dtype = dtype if upcast else weight_VD.dtype
    most = UPCAST_BLOCK_BYTES if on_cpu else GATHER_BLOCK_BYTES
    step = max(most // (dim * block_dtype.itemsize), 1)
    buffer = weight_VD.new_empty((min(step, size), dim), dtype=block_dtype)
    for start in range(0, size, step):
        stop = min(start + step, size)
        block = buffer[: stop - start]
        if kept_K is None:
            block.copy_(weight_VD[start:stop])
        elif upcast:
            block.copy_(weight_VD.index_select(0, kept_K[start:stop]))
        else:
            torch.index_select(weight_VD, 0, kept_K[start:stop], out=block)
        yield slice(start, stop), block
