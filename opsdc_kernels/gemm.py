"""The four matrix products of a chunk, with fp32 (or float64) results whatever the inputs' dtype.

A CPU has no fast 16-bit product (it is hundreds of times slower than fp32), so 16-bit weights are
upcast there block by block; a GPU multiplies 16-bit inputs and accumulates and stores fp32.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

UPCAST_BLOCK_BYTES = 8 << 20


def upcasts(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether products with `weight` go through upcast blocks: 16-bit weights on a CPU."""
    return weight.dtype != dtype and weight.device.type == "cpu"


def logits_into(out_CV: Tensor, hidden_CD: Tensor, weight_VD: Tensor) -> None:
    """out = hidden · weightᵀ; `hidden` in the dtype of `operand_dtype`."""
    for columns, block in _row_blocks(weight_VD, out_CV.dtype):
        _mm_into(out_CV[:, columns], hidden_CD, block.T)


def hidden_gradient_into(out_CD: Tensor, tile_CV: Tensor, weight_VD: Tensor) -> None:
    """out = tile · weight."""
    if tile_CV.dtype == weight_VD.dtype and not upcasts(weight_VD, out_CD.dtype):
        _mm_into(out_CD, tile_CV, weight_VD)
        return
    out_CD.zero_()
    for columns, block in _row_blocks(weight_VD, out_CD.dtype):
        out_CD.addmm_(tile_CV[:, columns].to(block.dtype), block)


def add_weight_gradient(
    out_VD: Tensor, tile_CV: Tensor, hidden_CD: Tensor, *, first: bool = False
) -> None:
    """out += tileᵀ · hidden; `first`: out is not initialized yet, and is not read."""
    beta = 0 if first else 1
    if tile_CV.dtype == out_VD.dtype:
        out_VD.addmm_(tile_CV.T, hidden_CD, beta=beta)
    elif tile_CV.device.type == "cpu":
        out_VD.addmm_(tile_CV.T.to(out_VD.dtype), hidden_CD.to(out_VD.dtype), beta=beta)
    else:
        torch.ops.aten.addmm.dtype_out(
            out_VD, tile_CV.T, hidden_CD, out_VD.dtype, beta=beta, out=out_VD
        )


def operand_dtype(weight: Tensor, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which the other factor of a product with `weight` must come."""
    return dtype if weight.device.type == "cpu" else weight.dtype


def _mm_into(out: Tensor, left: Tensor, right: Tensor) -> None:
    if left.dtype == out.dtype:
        torch.mm(left, right, out=out)
    else:
        torch.ops.aten.mm.dtype_out(left, right, out.dtype, out=out)


def _row_blocks(weight_VD: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    size, dim = weight_VD.shape
    if not upcasts(weight_VD, dtype):
        yield slice(0, size), weight_VD
        return
    step = max(UPCAST_BLOCK_BYTES // (dim * dtype.itemsize), 1)
    buffer = weight_VD.new_empty((min(step, size), dim), dtype=dtype)
    for start in range(0, size, step):
        stop = min(start + step, size)
        yield slice(start, stop), buffer[: stop - start].copy_(weight_VD[start:stop])
