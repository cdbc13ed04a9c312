"""PyTorch's function transforms, seen from a tensor: forward AD, `torch.func`, `vmap`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd import forward_ad


def differentiated(x: Tensor) -> bool:
    """True for a tensor with a tangent, and for one within a transform that wants its gradient."""
    layers = list(_layers(x))
    wanted = len(layers) > 1 and torch.is_grad_enabled() and any(y.requires_grad for y in layers)
    return wanted or any(forward_ad.unpack_dual(y).tangent is not None for y in layers)


def batched(x: Tensor) -> bool:
    """True within `vmap`."""
    functorch = torch._C._functorch
    if functorch.is_legacy_batchedtensor(x):  # that of `is_grads_batched`
        return True
    return any(functorch.is_batchedtensor(y) for y in _layers(x))


def _layers(x: Tensor) -> Iterator[Tensor]:
    """`x` as every transform sees it, and last the tensor that they all wrap."""
    functorch = torch._C._functorch
    yield x
    while functorch.is_functorch_wrapped_tensor(x):
        x = functorch.get_unwrapped(x)
        yield x
