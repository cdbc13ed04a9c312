"""An adapter merged into the modules that it adapts: by PEFT's own merge, proven before the run.

vLLM is given plain weights. Methods of adapting differ in what they add, scale, turn or replace,
and PEFT knows each; so PEFT merges a copy of one module at a time. A fresh adapter changes nothing,
however wrongly it is merged: what is checked are copies whose trained parameters are moved.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from opsdc.errors import ModelError
from opsdc.models import quantize
from opsdc.models.adapters import unwrap
from opsdc.ranks import shard

_TOLERANCE = {False: 1e-3, True: 0.1}
"""Largest difference of a merged module from the adapted one, relative to what the adapter changes:
in float64, and (True) over a base in 4 bits, whose products are rounded to 16."""

_REMEDY = "use rollout.engine hf, or another adapter"


def adapted_modules(base: Any) -> dict[str, nn.Module]:
    """Return the modules that an adapter has put in the place of the model's own, by name."""
    adapted: dict[str, nn.Module] = {}
    for name, module in base.named_modules():
        if _is_adapted(module) and not any(name.startswith(f"{outer}.") for outer in adapted):
            adapted[name] = module
    return adapted


@torch.no_grad()
def merged(module: nn.Module) -> nn.Module:
    """Return the plain module, whole and in float32, that computes as an adapted one does now.

    A sum is so rounded to the engine's dtype once, and not each part of it.
    """
    return _plain(_copied(module, torch.float32))


@torch.no_grad()
def check_merge(model: Any, probe_ids: Sequence[int]) -> None:
    """Raise ModelError unless the adapter of a model can be merged.

    In one forward over `probe_ids` each adapted module is copied with its trained parameters moved,
    and its outputs are compared with those of the copy that is merged.
    """
    base = unwrap(model)
    adapted = {module: name for name, module in adapted_modules(base).items()}
    if not (adapted or hasattr(model, "peft_config")):
        return
    _check_names(model, base, tuple(f"{name}." for name in adapted.values()))
    checked: set[type] = set()

    def compare(module: nn.Module, inputs: Any, options: Any, _: Any) -> None:
        checked.add(type(module))
        where = f"'{adapted[module]}' ({type(module).__name__})"
        try:
            off = _merge_error(module, inputs, options)
        except Exception as error:  # What cannot be merged says so in many different ways.
            raise ModelError(f"{where} cannot be merged: {error}; {_REMEDY}") from error
        if not off <= _TOLERANCE[bool(quantize.quantized(module))]:
            raise ModelError(
                f"{where}: PEFT's merge is off by {off:.1e} of what the adapter changes, so vLLM "
                f"would sample from another model; {_REMEDY}"
            )

    hooks = [module.register_forward_hook(compare, with_kwargs=True) for module in adapted]
    was_training = base.training
    base.eval()
    try:
        with shard.gathered(model):
            base(input_ids=torch.tensor([list(probe_ids)], device=base.device), use_cache=False)
    finally:
        base.train(was_training)
        for hook in hooks:
            hook.remove()
    # Experts that no token went to are of the kind of one that was checked.
    unseen = [name for module, name in adapted.items() if type(module) not in checked]
    if unseen:
        raise ModelError(f"'{unseen[0]}' is adapted, and no forward calls it; {_REMEDY}")
    _check_tie(base)


def _check_names(model: Any, base: Any, adapted: tuple[str, ...]) -> None:
    """Raise ModelError for an adapter that is no module in the place of another."""
    with torch.device("meta"):
        plain = dict(type(base)(base.config).named_parameters(remove_duplicate=False))
    names = (name for name, _ in base.named_parameters() if not name.startswith(adapted))
    foreign = [f"parameter '{name}'" for name in names if name not in plain]
    configs = getattr(model, "peft_config", {}).values()
    if any(config.is_prompt_learning for config in configs):
        foreign.append("trained prompt")
    if foreign:
        raise ModelError(f"the adapter's {foreign[0]} has no place in plain weights; {_REMEDY}")


def _check_tie(base: Any) -> None:
    """Raise ModelError where an adapter parts an embedding from the head that is tied to it."""
    ends = [base.get_input_embeddings(), base.get_output_embeddings()]
    if not (base.config.get_text_config().tie_word_embeddings and any(map(_is_adapted, ends))):
        return
    embedding, head = (_copied(end, torch.float32, moved=True) for end in ends)
    embedding, head = (_plain(end) if _is_adapted(end) else end for end in (embedding, head))
    if not torch.equal(embedding.weight, head.weight):
        raise ModelError(
            "the adapter parts the embedding from the head, which this model and vLLM take for one "
            f"weight; leave both out of its modules, or {_REMEDY}"
        )


def _is_adapted(module: nn.Module) -> bool:
    """Return True for a module of PEFT's that stands for one of the model's own."""
    return hasattr(module, "base_layer") or hasattr(module, "unload_and_optionally_merge_module")


def _copied(module: nn.Module, dtype: torch.dtype, *, moved: bool = False) -> Any:
    """Copy a module with whole parameters, `moved` by noise where they are trained."""

    def whole(parameter: nn.Parameter) -> nn.Parameter:
        values = shard.full(parameter.detach()).to(dtype, copy=True)
        if moved and parameter.requires_grad:
            # A parameter with two names is moved alike, and no two parameters are.
            noise = torch.Generator(values.device).manual_seed(id(parameter))
            size = float(values.square().mean().sqrt()) or 0.2
            values += torch.empty_like(values).normal_(std=0.1 * size, generator=noise)
        return nn.Parameter(values, requires_grad=False)

    # What `deepcopy` takes for copies that it has made already.
    memo = {id(p): whole(p) for p in module.parameters() if p.is_floating_point()}
    return copy.deepcopy(module, memo).to(dtype).eval()


def _plain(module: Any) -> Any:
    """Merge an adapted module in place and return the plain one, as PEFT does for whole models."""
    if quantize.quantized(module):
        return _dequantized(module)
    if hasattr(module, "unload_and_optionally_merge_module"):
        return module.unload_and_optionally_merge_module(True, False, None)
    module.merge()
    return module.get_base_layer()


def _dequantized(module: Any) -> nn.Linear:
    """Return a 4-bit layer with its adapter's additions; PEFT's merge would round it to 4 bits."""
    layer = module.get_base_layer()
    weight = quantize.dequantize(layer.weight)
    for adapter in module.active_adapters:
        weight = weight + module.get_delta_weight(adapter).to(weight.dtype)
    plain = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    plain.weight, plain.bias = nn.Parameter(weight, requires_grad=False), layer.bias
    return plain


def _merge_error(module: nn.Module, inputs: Any, options: Any) -> float:
    """Measure how far a moved and merged copy is from the moved one, relative to the move."""
    dtype = torch.float32 if quantize.quantized(module) else torch.float64

    def cast(value: Any) -> Any:
        is_float = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.to(dtype) if is_float else value

    inputs, options = tree_map(cast, (inputs, options))
    moved = _copied(module, dtype, moved=True)
    # Not by calling the copies, which have the hook of this check too.
    wanted = moved.forward(*inputs, **options)
    before = _copied(module, dtype).forward(*inputs, **options)
    after = _plain(moved).forward(*inputs, **options)
    effect = float((wanted - before).norm())
    return float((after - wanted).norm()) / effect if effect else 0.0
