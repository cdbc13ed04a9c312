"""Memory of the backbone's forward and backward, counted on tensors without data.

The modules that are trained run on fake tensors, and every storage is followed from the operator
that makes it to its end, so no architecture needs a formula. Counts are affine in the number of
layers and of rows, so a few small traces give those of the whole.
"""

from __future__ import annotations

import copy
import functools
import json
import time
import weakref
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from opsdc.config.settings import ModelConfig
from opsdc.errors import ModelError
from opsdc.models.adapters import unwrap
from opsdc.models.head import TokenBatch, hidden_states
from opsdc.models.load import prepare_model

_UNMASKED = "opsdc_unmasked"
"""Under this name transformers has an attention but no mask function, so it makes no mask."""

_TRACE_SECONDS = 30
"""Seconds of the processor for a trace: layers that loop over tokens in Python would take hours."""

AttentionInterface.register(_UNMASKED, ALL_ATTENTION_FUNCTIONS["sdpa"])


@dataclass(frozen=True, kw_only=True, slots=True)
class Activations:
    """Bytes that passes add to what was held before, without the parameters' gradients."""

    teacher: float
    """The most in a forward without gradients."""
    forward: float
    """The most in a forward with gradients."""
    held: float
    """The bytes that this forward leaves for the backward, held while the loss runs."""
    backward: float
    """The most in the backward, which begins with all that the forward has left."""

    @classmethod
    def none(cls) -> Activations:
        """Return no bytes at all, in the place of those that are unknown."""
        return cls(**{f.name: 0.0 for f in fields(cls)})

    def __add__(self, addend: Activations) -> Activations:
        return Activations(
            **{f.name: getattr(self, f.name) + getattr(addend, f.name) for f in fields(self)}
        )

    def __mul__(self, factor: float) -> Activations:
        return Activations(**{f.name: factor * getattr(self, f.name) for f in fields(self)})


class NotTraced(Exception):
    """The passes of an architecture cannot be followed without data."""


@functools.cache
def count_activations(
    architecture: str, config: ModelConfig, *, width: int, masked: bool
) -> tuple[Activations, Activations] | str:
    """Count the bytes of passes over one sequence, and those that every further one adds.

    Passes are traced with the CPU's operators. Other devices' attention kernels keep the same
    tensors (queries, keys, values, output, one logsumexp per row), and may take other workspaces.

    Returns the reason in words where the passes cannot be traced.

    Args:
        architecture: The model's config as JSON; its weights are not needed.
        config: The settings of adapter, dtype and gradient checkpointing.
        width: The number of tokens of a sequence; a forward is [rows, width].
        masked: True for attention through a mask of width² per row, which padded batches need;
            False for attention that is told the sequences' lengths.
    """
    shape = read_architecture(architecture)
    text = shape.get_text_config()
    depth = text.num_hidden_layers
    # One more layer adds what every further one does, if all layers are alike.
    alike = len(set(getattr(text, "layer_types", None) or [0])) == 1
    few = 2 if alike and depth > 3 else depth

    def at_depth(rows: int) -> Activations:
        trace = functools.partial(_trace, shape, config, rows=rows, width=width, masked=masked)
        shallow = trace(layers=few)
        if few == depth:
            return shallow
        return shallow + (trace(layers=few + 1) + shallow * -1.0) * (depth - few)

    try:
        one = at_depth(1)
        return one, at_depth(2) + one * -1.0
    except Exception as error:  # whatever an architecture's own code makes of tensors without data
        why = str(error) if isinstance(error, NotTraced) else type(error).__name__
        return f"the passes of {type(shape).__name__} cannot be traced ({why})"


def read_architecture(text: str) -> PreTrainedConfig:
    """Read a model's config from its JSON; raise ModelError for one that is not transformers'."""

    def plain_float(entry: dict[str, Any]) -> Any:
        # JSON has no infinity, for which transformers writes this.
        return float(entry["__float__"]) if entry.keys() == {"__float__"} else entry

    plain = json.loads(text, object_hook=plain_float)
    kind = plain.pop("model_type")
    try:
        return AutoConfig.for_model(kind, **plain)
    except (ValueError, KeyError, StrictDataclassError) as error:
        raise ModelError(f"the model type '{kind}' cannot be planned: {error}") from error


def shallower(architecture: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    """Return the same architecture with its first `layers` layers only."""
    fewer = copy.deepcopy(architecture)
    text = fewer.get_text_config()
    depth = text.num_hidden_layers
    text.num_hidden_layers = layers
    for name, value in list(vars(text).items()):
        # Lists with an entry for each layer, such as its type.
        if "layer" in name and isinstance(value, (list, tuple)) and len(value) == depth:
            setattr(text, name, value[:layers])
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
    """Run the passes on fake tensors and count the bytes that they hold."""
    dtype = getattr(torch, config.dtype)
    # Adapters cannot be attached to fake tensors, whose parameters refuse to be moved.
    model = on_meta(shallower(architecture, layers), replace(config, attn_implementation=None))
    base = unwrap(model)
    if base.config._attn_implementation != "sdpa" and not masked:
        raise NotTraced("attention of other kernels than torch's")
    with FakeTensorMode(allow_non_fake_inputs=True), _OnFakes():
        model = model.to_empty(device="cpu").train()
        if not masked:
            base.config._attn_implementation = _UNMASKED
        for module in base.modules():
            # Positions that depend on the length ask the values of tensors.
            rope = getattr(module, "rope_type", None)
            if rope is not None:
                plain = dict.fromkeys(rope, "default") if isinstance(rope, dict) else "default"
                setattr(module, "rope_type", plain)  # noqa: B010 (mypy takes it for a module)
        base.tie_weights()
        # The embedding's gradient is made last, when all else is gone, so no peak here has it.
        base.get_input_embeddings().weight.requires_grad_(False)
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
        # Once without counting, so that every parameter has its gradient.
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
                most, held = live.peak, live.now
            live.restart()
            hidden.backward(torch.ones_like(hidden))
            return Activations(teacher=teacher, forward=most, held=held, backward=live.peak)


def on_meta(architecture: PreTrainedConfig, config: ModelConfig) -> Any:
    """Build the model to be trained, adapter attached, without memory for its weights."""
    # These settings do not change the parameters, and 4-bit ones are counted by `Sizes`. What
    # other kernels keep for the backward is not known here.
    config = replace(config, compile=False, liger=False, quantize=None)
    keywords: dict[str, Any] = {}
    if config.attn_implementation is not None:
        keywords["attn_implementation"] = config.attn_implementation
    with torch.device("meta"):
        try:
            model = AutoModelForCausalLM.from_config(
                architecture,
                dtype=torch.float32 if config.lora is None else getattr(torch, config.dtype),
                trust_remote_code=config.trust_remote_code,
                **keywords,
            )
        except (ValueError, ImportError) as error:
            raise ModelError(f"model.name_or_path: {error}") from error
        return prepare_model(model, config)


class _OnFakes(TorchDispatchMode):
    """A limit of time, and products by groups (experts), whose fakes know bfloat16 alone."""

    def __init__(self) -> None:
        super().__init__()
        self._end = time.process_time() + _TRACE_SECONDS

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if time.process_time() > self._end:
            raise NotTraced(f"it takes more than {_TRACE_SECONDS} s")
        if func is not torch.ops.aten._grouped_mm.default:
            return func(*args, **(kwargs or {}))
        a, b = args[:2]
        groups = [] if a.dim() != b.dim() else [a.shape[0]]
        if a.dim() == b.dim() == 2:
            offsets = args[2] if len(args) > 2 else (kwargs or {})["offs"]
            groups = [len(offsets)]
        return a.new_empty([*groups, a.shape[-2], b.shape[-1]])


class _LiveBytes(TorchDispatchMode):
    """A count of the bytes in storages that operators make, until they are freed."""

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
        """Forget the peak, but not the bytes that are held."""
        self.peak = self.now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                self._follow(tensor.untyped_storage())
        self.peak = max(self.peak, self.now)
        return output

    def _follow(self, storage: torch.UntypedStorage) -> None:
        """Count a storage that is new, and take it off when it is freed."""
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.now += size
            weakref.finalize(storage, self._end, key, size)

    def _end(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size
