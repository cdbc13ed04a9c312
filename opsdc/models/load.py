"""Loading a causal language model, its hidden states at chosen positions, and its head."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import extract_commit_hash

from opsdc.config import LoRAConfig, ModelConfig
from opsdc.errors import ModelError
from opsdc.method.batch import TokenBatch
from opsdc.models import demo_model as embedded
from opsdc.models import quantize
from opsdc.models.faster_layers import compile_layers, use_liger

# A bar per folder that is read or written would drown our own lines.
transformers_logging.disable_progress_bar()

# Attention kernels that skip the blocks of other sequences; the rest would pay T² for a packed row.
VARIABLE_LENGTH = ("flash_attention_2", "flash_attention_3", "flex_attention")

# Config attributes by which known architectures scale their logits, and the exponent to apply.
_SCALES = {"logit_scale": 1, "logits_scaling": -1, "lm_head_multiplier": 1}
# Largest difference between our head and the model's own logits, relative to the largest logit.
_HEAD_TOLERANCE = {
    torch.float64: 1e-6,
    torch.float32: 1e-4,
    torch.bfloat16: 2e-2,
    torch.float16: 4e-3,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Head:
    """logits = softcap(logit_scale · (h·Wᵀ + b)), softcap(x) = cap·tanh(x / cap)."""

    weight: torch.Tensor
    """[V, D]"""
    bias: torch.Tensor | None = None
    """[V]"""
    logit_scale: float = 1.0
    logit_softcap: float | None = None

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, D] → [n, V], materialised: for checks and single positions, not for training."""
        z = nn.functional.linear(hidden.to(self.weight.dtype), self.weight, self.bias)
        z = z * self.logit_scale
        cap = self.logit_softcap
        return z if cap is None else cap * torch.tanh(z / cap)


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of the model; its chat template makes both prompts."""
    try:
        return AutoTokenizer.from_pretrained(
            embedded.resolve(config.name_or_path),
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
        )
    except (OSError, ValueError) as error:
        raise ModelError(
            f"model.name_or_path: no tokenizer in '{config.name_or_path}': {error}"
        ) from error


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Text of a response without control tokens, for scorers and people; never re-tokenized."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True))


def load_model(config: ModelConfig, *, folder: str | Path | None = None) -> PreTrainedModel:
    """Load by transformers. Parameters that will be trained are float32, whatever `dtype` says.

    `folder` loads the same model from a checkpoint's folder instead.
    """
    trained_whole = config.lora is None
    kwargs: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
    if config.attn_implementation is not None:
        kwargs["attn_implementation"] = config.attn_implementation
    kwargs["dtype"] = torch.float32 if trained_whole else getattr(torch, config.dtype)
    if config.quantize is not None:
        kwargs["quantization_config"] = quantize.loading_config(kwargs["dtype"])
    place = str(folder) if folder is not None else embedded.resolve(config.name_or_path)
    revision = None if folder is not None else config.revision
    try:
        # The commit that a branch or tag is now: what is loaded, and what is recorded. None for a
        # plain folder.
        commit = extract_commit_hash(cached_file(place, "config.json", revision=revision), None)
        model = AutoModelForCausalLM.from_pretrained(place, revision=commit or revision, **kwargs)
        model.config._commit_hash = commit
    except (OSError, ValueError) as error:
        raise ModelError(
            f"model.name_or_path: cannot load '{folder or config.name_or_path}': {error}"
        ) from error
    except ImportError as error:
        if config.attn_implementation is None:
            raise
        raise ModelError(
            f"model.attn_implementation {config.attn_implementation}: {error}. Use sdpa, or on a "
            "GPU flex_attention, which comes with torch"
        ) from error
    return model


def load_trained(config: ModelConfig, folder: str | Path) -> Any:
    """The model that a run left in `folder`: whole, or the base with the adapter in it."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ModelError(f"no trained model in {folder}: has the run ended?")
    if not (folder / "adapter_config.json").is_file():
        return load_model(config, folder=folder)
    import peft

    return peft.PeftModel.from_pretrained(load_model(config), str(folder))


def prepare_model(model: PreTrainedModel, config: ModelConfig) -> Any:
    """Attach the adapter, choose the layers' kernels and their checkpointing, by the config."""
    if config.quantize is not None:
        quantize.check(model)
        quantize.compute_in_training_precision(model)
    if config.liger:
        use_liger(model)
    if config.lora is not None:
        model = _with_adapter(model, config.lora)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if config.compile:
        compile_layers(unwrap(model))
    return model


def _with_adapter(model: PreTrainedModel, lora: LoRAConfig) -> Any:
    try:
        import peft
    except ImportError as error:
        raise ModelError('model.lora needs peft: pip install "opsdc[lora]"') from error
    head = next(n for n, m in model.named_modules() if m is model.get_output_embeddings())
    modules = lora.target_modules
    adapted = peft.get_peft_model(
        model,
        peft.LoraConfig(
            r=lora.r,
            lora_alpha=lora.alpha,
            target_modules=modules if isinstance(modules, str) else list(modules),
            task_type="CAUSAL_LM",
        ),
    )
    if not isinstance(model.get_output_embeddings(), nn.Linear):
        raise ModelError(
            f"model.lora.target_modules {lora.target_modules!r} puts an adapter on the head "
            f"'{head}', whose product the fused loss does not see; name other modules or use "
            "'all-linear'"
        )
    return adapted


def unwrap(model: Any) -> PreTrainedModel:
    """The transformers model inside a PEFT wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def architecture(model: Any) -> str:
    """The name of the transformers class, which FSDP replaces by a class of its own."""
    return type(unwrap(model)).__name__.removeprefix("FSDP")


def read_head(model: Any) -> Head:
    """The output head as the loss describes it; raises ModelError for one it cannot."""
    base = unwrap(model)
    layer = base.get_output_embeddings()
    if not isinstance(layer, nn.Linear):
        raise ModelError(
            f"the head of {type(base).__name__} is {type(layer).__name__}, not a linear layer: "
            "its logits cannot be computed from hidden states and one weight matrix"
        )
    text = base.config.get_text_config()
    scale = 1.0
    for name, exponent in _SCALES.items():
        value = getattr(text, name, None)
        if value is not None:
            scale *= float(value) ** exponent
    return Head(
        weight=layer.weight,
        bias=layer.bias,
        logit_scale=scale,
        logit_softcap=getattr(text, "final_logit_softcapping", None),
    )


@torch.no_grad()
def check_head(model: Any) -> float:
    """Compare the described head with the model's own logits on a few tokens.

    Returns the largest difference relative to the largest logit. Raises ModelError when it is more
    than rounding: the model then does something between hidden states and logits that is not in
    its description, and training on the description would be silently wrong.
    """
    base = unwrap(model)
    head = read_head(model)
    device = head.weight.device
    ids = torch.arange(7, device=device)[None] % head.weight.shape[0]
    was_training = base.training
    base.eval()
    own = base(input_ids=ids, use_cache=False).logits[0].float()
    hidden = base.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[0]
    base.train(was_training)
    ours = head.logits(hidden).float()
    difference = float((own - ours).abs().max() / own.abs().max().clamp_min(1e-30))
    if own.shape != ours.shape or not difference <= _HEAD_TOLERANCE[head.weight.dtype]:
        raise ModelError(
            f"the logits of {type(base).__name__} are not softcap(scale·(h·Wᵀ + b)): relative "
            f"difference {difference:.1e} on a probe. The head has a feature that the fused loss "
            "does not describe, so this model cannot be trained exactly"
        )
    return difference


def hidden_states(model: Any, batch: TokenBatch) -> torch.Tensor:
    """[n, D]: the head's input at the scored positions, prompt positions left out."""
    output = unwrap(model).get_decoder()(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        # Packed rows are told apart only without a cache.
        use_cache=False,
    )
    return output.last_hidden_state.flatten(0, 1)[batch.scored]


def describe(model: Any) -> dict[str, Any]:
    """What a run records of its model."""
    base = unwrap(model)
    return {
        "architecture": architecture(model),
        "revision": getattr(base.config, "_commit_hash", None),
        "parameters": sum(quantize.elements(p) for p in model.parameters()),
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "tied_head": base.get_output_embeddings().weight is base.get_input_embeddings().weight,
    }


def save_weights(model: Any, folder: str | Path) -> None:
    """An ordinary Hugging Face folder: the whole model, or the adapter alone with LoRA."""
    model.save_pretrained(str(folder))


@torch.no_grad()
def load_weights(model: Any, folder: str | Path) -> None:
    """Copy the parameters of a folder that `save_weights` wrote into the model, bit for bit.

    Raises KeyError for one that is not there, ValueError for one of another shape.
    """
    if hasattr(model, "peft_config"):
        import peft

        # Not peft's own loader: it looks for what a folder lacks on the Hub, pickles included.
        adapter = load_file(Path(folder) / "adapter_model.safetensors")
        _none_missing(peft.get_peft_model_state_dict(model).keys() - adapter.keys())
        peft.set_peft_model_state_dict(model, adapter)
        return
    # Without use_safetensors a folder that has no safetensors would be unpickled.
    saved, found = type(model).from_pretrained(
        str(folder), dtype=torch.float32, use_safetensors=True, output_loading_info=True
    )
    # transformers fills them with random numbers.
    _none_missing(found["missing_keys"])
    own = dict(model.named_parameters())
    for name, parameter in saved.named_parameters():
        if own[name].shape != parameter.shape:
            raise ValueError(
                f"{name} has shape {list(parameter.shape)} there, {list(own[name].shape)} here"
            )
        own[name].copy_(parameter)


def _none_missing(names: Collection[str]) -> None:
    if names:
        raise KeyError(f"{len(names)} tensors are missing, {min(names)} for one")
