"""How a chunk's logits [C, V] lie in memory: where the row passes are in C with the tokens of a
column side by side, elsewhere row by row. MKL writes the former, and multiplies it back, about a
tenth faster; vocabulary columns are gathered from it in one piece each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from opsdc_kernels import plan


def empty_logits(
    like: Tensor, count: int, rows: int, size: int, dtype: torch.dtype, *, in_torch: bool = False
) -> Tensor:
    """[count, rows, size] on the device of `like`, each to be cut into chunks by rows. `in_torch`:
    the row passes are, wherever they run."""
    if plan.compiled_rows(like.device, dtype) and not in_torch:
        return like.new_empty(count, size, rows, dtype=dtype).transpose(1, 2)
    return like.new_empty(count, rows, size, dtype=dtype)


def tokens_last(x_CV: Tensor) -> bool:
    return x_CV.stride(0) == 1


def select_columns(x_CV: Tensor, columns: Tensor, out_CK: Tensor | None = None) -> Tensor:
    """x[:, columns], laid out as x."""
    if not tokens_last(x_CV):
        return torch.index_select(x_CV, 1, columns, out=out_CK)
    return torch.index_select(x_CV.T, 0, columns, out=None if out_CK is None else out_CK.T).T


def two_tiles(x_CV: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """[C, width] each in the memory of [C, V], `width` at most half of V."""
    if tokens_last(x_CV):
        first, second = x_CV[:, : 2 * width].split(width, 1)
        return first, second
    first, second = x_CV.view(-1)[: 2 * len(x_CV) * width].view(2, len(x_CV), width)
    return first, second
