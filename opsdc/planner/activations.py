"""What a forward and backward of the backbone hold in memory, counted on tensors without data.

The very modules that are trained run on fake tensors, and every storage is followed from the
operator that makes it to its end: no formula per architecture. Counts are affine in the number of
layers and of rows, so a few small traces tell those of the whole.
"""

from __future__ import annotations

import copy
import functools
import json
import weakref
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from opsdc.config.settings import ModelConfig, OPSDCConfig
from opsdc.models.adapters import unwrap
from opsdc.models.head import TokenBatch, hidden_states
from opsdc.models.load import prepare_model

# transformers makes no mask for an attention that it was given no mask function for.
_UNMASKED = "opsdc_unmasked"
AttentionInterface.register(_UNMASKED, ALL_ATTENTION_FUNCTIONS["sdpa"])


@dataclass(frozen=True, kw_only=True, slots=True)
class Activations:
    """Bytes above what was held before, gradients that stay held not counted."""

    teacher: float
    """the most in a forward without gradient"""
    forward: float
    """the most in a forward with gradient"""
    kept: float
    """held when it is done, while the loss runs"""
    backward: float
    """the most in the backward, its first layers' temporaries with all that is still kept"""

    def __add__(self, other: Activations) -> Activations:
        return Activations(
            **{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        )

    def __mul__(self, factor: float) -> Activations:
        return Activations(**{f.name: factor * getattr(self, f.name) for f in fields(self)})


@functools.cache
def activations(
    architecture: str, config: str, *, width: int, masked: bool
) -> tuple[Activations, Activations]:
    """Of the passes over one sequence of `width` tokens, and what every further one adds.

    Traced with the CPU's operators: other devices' attention kernels keep the same tensors
    (queries, keys, values, output, one logsumexp per row), and may take other workspaces.

    Args:
        architecture: the model's config as JSON; its weights are not needed.
        config: `ModelConfig` as JSON: adapter, dtype and gradient checkpointing.
        width: a forward is [rows, width].
        masked: attention through a mask of width² per row, which padded batches need; False for
            attention that knows the sequences' lengths.
    """
    shape, model = read_architecture(architecture), read_model(config)
    text = shape.get_text_config()
    depth = text.num_hidden_layers
    # One layer more and one row more: exact where every layer is alike.
    alike = len(set(getattr(text, "layer_types", None) or [0])) == 1
    few = 2 if alike and depth > 3 else depth

    def at_depth(rows: int) -> Activations:
        trace = functools.partial(_trace, shape, model, rows=rows, width=width, masked=masked)
        shallow = trace(layers=few)
        if few == depth:
            return shallow
        return shallow + (trace(layers=few + 1) + shallow * -1.0) * (depth - few)

    one = at_depth(1)
    return one, at_depth(2) + one * -1.0


def read_architecture(text: str) -> PreTrainedConfig:
    """A model's config from its JSON."""
    plain = json.loads(text)
    return AutoConfig.for_model(plain.pop("model_type"), **plain)


def read_model(text: str) -> ModelConfig:
    """`ModelConfig` from its JSON."""
    return OPSDCConfig.from_dict({"model": json.loads(text)}).model


def shallower(architecture: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    """The same architecture with its first `layers` layers only."""
    fewer = copy.deepcopy(architecture)
    text = fewer.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    return fewer


def _trace(
    architecture: PreTrainedConfig,
    config: ModelConfig,
    *,
    layers: int,
    rows: int,
    width: int,
    masked: bool,
) -> Activations:
    dtype = getattr(torch, config.dtype)
    # Adapters cannot be attached to fake tensors, whose parameters refuse to be moved.
    model = on_meta(shallower(architecture, layers), replace(config, attn_implementation="sdpa"))
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = model.to_empty(device="cpu").train()
        if not masked:
            unwrap(model).config._attn_implementation = _UNMASKED
        unwrap(model).tie_weights()
        # Its gradient comes last, when all else is gone: not part of the peak counted here.
        unwrap(model).get_input_embeddings().weight.requires_grad_(False)
        ids = torch.zeros(rows, width, dtype=torch.int64)
        batch = TokenBatch(
            input_ids=ids,
            attention_mask=torch.ones_like(ids) if masked else None,
            position_ids=torch.arange(width).expand(rows, -1),
            scored=torch.arange(rows * width),
            lengths=[width] * rows,
        )

        def forward() -> torch.Tensor:
            return hidden_states(model, batch)

        cast = functools.partial(torch.autocast, "cpu", dtype, enabled=dtype != torch.float32)
        with cast():
            forward().sum().backward()
        live = _LiveBytes(model)
        with live:
            with torch.no_grad(), cast():
                forward()
            teacher = live.peak
            live.restart()
            with cast():
                hidden = forward()
                most, kept = live.peak, live.now
            live.restart()
            hidden.backward(torch.ones_like(hidden))
            return Activations(teacher=teacher, forward=most, kept=kept, backward=live.peak)


def on_meta(architecture: PreTrainedConfig, config: ModelConfig) -> Any:
    """The model to be trained, adapter attached, without memory for its weights."""
    # Parameters are the same, 4-bit ones counted elsewhere; what other kernels keep for the
    # backward is not known here.
    config = replace(config, compile=False, liger=False, quantize=None)
    keywords: dict[str, Any] = {}
    if config.attn_implementation is not None:
        keywords["attn_implementation"] = config.attn_implementation
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            architecture,
            dtype=torch.float32 if config.lora is None else getattr(torch, config.dtype),
            trust_remote_code=config.trust_remote_code,
            **keywords,
        )
        return prepare_model(model, config)


class _LiveBytes(TorchDispatchMode):
    """Counts the storages that operators make, until they are freed."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = {
            t.untyped_storage()._cdata
            for p in model.parameters()
            for t in (p, p.grad)
            if t is not None
        }

    def restart(self) -> None:
        """Forget the peak, not what is held."""
        self.peak = self.now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                self._follow(tensor.untyped_storage())
        self.peak = max(self.peak, self.now)
        return output

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.now += size
            weakref.finalize(storage, self._end, key, size)

    def _end(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size
