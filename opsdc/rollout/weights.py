"""Weights on their way to vLLM: named as in a checkpoint, tied tensors once, adapters merged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import revert_weight_conversion

from opsdc.errors import ModelError, WeightSyncError
from opsdc.models import quantize
from opsdc.models.adapters import unwrap
from opsdc.ranks.shard import full, is_sharded
from opsdc.rollout.merge import adapted_modules, merged

_SHARD_BYTES = 1 << 30
"""A file of pushed weights is closed at this size."""


class Weights:
    """The weights that a model has now, as (name, tensor), to be read once or again.

    Reading after the model was updated raises WeightSyncError, because a push that is repeated, for
    example to a server that was restarted, must carry the same numbers under the same version.
    """

    def __init__(self, model: Any, dtype: torch.dtype) -> None:
        self._model = model
        self._dtype = dtype
        self._writes = self._count_writes()

    @property
    def is_sharded(self) -> bool:
        """True where all ranks must read together, because each tensor is gathered for it."""
        return is_sharded(self._model)

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        if self._count_writes() != self._writes:
            raise WeightSyncError(
                "the model was updated since these weights were named; push the new version"
            )
        yield from named_weights(self._model, self._dtype)

    def _count_writes(self) -> int:
        """Count the writes in place to parameters so far, such as an optimizer's."""
        return sum(p._version for p in self._model.parameters())


@torch.no_grad()
def named_weights(model: Any, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor of the model in `dtype`, by the name that a checkpoint gives it.

    An adapter is merged into the modules it adapts, 4-bit weights are dequantized. One module's
    tensors exist at a time beside the model's own, except for architectures that transformers keeps
    in another layout than their checkpoints (mixtures of experts). A model that is cut over ranks
    is gathered tensor by tensor, so all ranks must read at once. Raises ModelError for weights
    quantized in any other way.
    """
    base = unwrap(model)
    if _changes_layout(base):
        yield from revert_weight_conversion(base, dict(_merged(base, dtype))).items()
    else:
        yield from _merged(base, dtype)


def _changes_layout(base: Any) -> bool:
    """Return True where transformers keeps weights in another layout than checkpoints do."""
    conversions = getattr(base, "_weight_conversions", None)
    if conversions is None:
        conversions = get_model_conversion_mapping(base, add_legacy=False)
    return bool(conversions)


def _merged(base: Any, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the model's tensors by their plain names, adapters merged, whole on each rank."""
    adapted = adapted_modules(base)
    in_4_bits = tuple(f"{name}." for name in quantize.quantized(base))
    seen, done = set[int](), set[str]()
    for name, tensor in base.state_dict(keep_vars=True).items():
        owner = next((p for p in accumulate(name.split("."), "{}.{}".format) if p in adapted), None)
        # The scales of a 4-bit weight are named behind it.
        if id(tensor) in seen or (owner is None and name.startswith(in_4_bits)):
            continue
        seen.add(id(tensor))
        if owner is not None:
            # All that stands for the module is read at the first of its tensors.
            if owner not in done:
                done.add(owner)
                for key, value in merged(adapted[owner]).state_dict().items():
                    yield f"{owner}.{key}", value.to(dtype)
            continue
        if f"{name}." in in_4_bits:
            tensor = quantize.dequantize(tensor)
        if not tensor.is_floating_point():
            raise ModelError(
                f"'{name}' is {tensor.dtype}: weights that are quantized, but by model.quantize "
                "nf4, cannot be pushed to vLLM; use rollout.engine hf"
            )
        # Rounded before it is gathered, which halves the bytes that ranks exchange.
        yield name, full(tensor.detach().to(dtype))


def write_weights(weights: Weights, folder: Path) -> None:
    """Write safetensors files of about 1 GiB into `folder`, which must not exist yet."""
    folder.mkdir(parents=True)
    shard: dict[str, torch.Tensor] = {}
    size = count = 0

    def flush() -> None:
        nonlocal shard, size, count
        save_file(shard, folder / f"weights-{count:05d}.safetensors")
        shard, size, count = {}, 0, count + 1

    for name, tensor in weights:
        shard[name] = tensor.cpu().contiguous()
        size += tensor.numel() * tensor.element_size()
        if size >= _SHARD_BYTES:
            flush()
    if shard:
        flush()


def read_weights(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the (name, tensor) of a folder that `write_weights` wrote."""
    for path in sorted(folder.glob("weights-*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                yield name, file.get_tensor(name)


@torch.no_grad()
def sequence_logprobs(model: Any, ids: Sequence[int], dtype: torch.dtype) -> list[float]:
    """Return log p(ids[i] | ids[:i]) for i ≥ 1 at temperature 1, by the trainer's own forward."""
    base = unwrap(model)
    was_training = base.training
    base.eval()
    row = torch.tensor([list(ids)], device=base.device)
    with torch.autocast(base.device.type, dtype=dtype, enabled=dtype != torch.float32):
        logits = base(input_ids=row, use_cache=False).logits[0, :-1]
    base.train(was_training)
    chosen = logits.float().log_softmax(-1).gather(1, row[0, 1:, None])
    return chosen[:, 0].tolist()
