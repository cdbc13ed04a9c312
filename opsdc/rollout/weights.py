"""The trainer's side of a weight push: names as in a checkpoint, tied tensors once, LoRA merged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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

_SHARD_BYTES = 1 << 30


class Weights:
    """The weights that a model has now, to be read once or again.

    Reading after the model was updated raises WeightSyncError: a push that is repeated, to a
    server that had to be restarted say, must carry the same numbers under the same version.
    """

    def __init__(self, model: Any, dtype: torch.dtype) -> None:
        self._model = model
        self._dtype = dtype
        self._written = self._count()

    @property
    def is_sharded(self) -> bool:
        """Whether all ranks must read together, because each tensor is gathered for it."""
        return is_sharded(self._model)

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        if self._count() != self._written:
            raise WeightSyncError(
                "the model was updated since these weights were named; push the new version"
            )
        yield from named_weights(self._model, self._dtype)

    def _count(self) -> int:
        """Grows with every write in place to a parameter, an optimizer's step included."""
        return sum(p._version for p in self._model.parameters())


@torch.no_grad()
def named_weights(model: Any, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the model as a checkpoint names it; an adapter is added to what it adapts,
    4-bit weights are dequantized.

    One tensor exists at a time beside the model's own, but for architectures that transformers
    keeps in another layout than their checkpoints (mixtures of experts). Of a model that is cut
    over ranks each is gathered: all ranks must read at once.
    """
    base = unwrap(model)
    if _changes_layout(base):
        yield from revert_weight_conversion(base, dict(_merged(base, dtype))).items()
    else:
        yield from _merged(base, dtype)


def _changes_layout(base: Any) -> bool:
    found = getattr(base, "_weight_conversions", None)
    return bool(get_model_conversion_mapping(base, add_legacy=False) if found is None else found)


def _merged(base: Any, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    adapted = {n: m for n, m in base.named_modules() if hasattr(m, "get_delta_weight")}
    in_4_bits = tuple(f"{name}." for name in quantize.quantized(base))
    seen: set[int] = set()
    for name, tensor in base.state_dict(keep_vars=True).items():
        # Behind a 4-bit weight follow its scales.
        if id(tensor) in seen or name.startswith(in_4_bits):
            continue
        seen.add(id(tensor))
        if f"{name}." in in_4_bits:
            tensor = quantize.dequantize(tensor)
        if not tensor.is_floating_point():
            raise ModelError(
                f"'{name}' is {tensor.dtype}: weights that are quantized, but by model.quantize "
                "nf4, cannot be pushed to vLLM; use rollout.engine hf"
            )
        owner, _, parameter = name.partition(".base_layer.")
        if parameter == "weight" and owner in adapted:
            layer = adapted[owner]
            # Added in float32: the sum, not each part of it, is rounded to the engine's dtype.
            tensor = tensor.float()
            for adapter in layer.active_adapters:
                tensor = tensor + layer.get_delta_weight(adapter).float()
        elif not parameter and any(name.startswith(f"{n}.") for n in adapted):
            continue
        plain = f"{owner}.{parameter}" if parameter else name
        # Rounded first: half as many bytes to gather.
        yield plain, full(tensor.detach().to(dtype))


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
    """What `write_weights` wrote, tensor by tensor."""
    for path in sorted(folder.glob("weights-*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                yield name, file.get_tensor(name)


@torch.no_grad()
def sequence_logprobs(model: Any, ids: Sequence[int], dtype: torch.dtype) -> list[float]:
    """log p(ids[i] | ids[:i]), i ≥ 1, at temperature 1, as the trainer's forward computes them."""
    base = unwrap(model)
    was_training = base.training
    base.eval()
    row = torch.tensor([list(ids)], device=base.device)
    with torch.autocast(base.device.type, dtype=dtype, enabled=dtype != torch.float32):
        logits = base(input_ids=row, use_cache=False).logits[0, :-1]
    base.train(was_training)
    chosen = logits.float().log_softmax(-1).gather(1, row[0, 1:, None])
    return chosen[:, 0].tolist()
