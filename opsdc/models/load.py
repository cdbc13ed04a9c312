"""Loading, preparing and saving of causal language models and their tokenizers."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import extract_commit_hash

from opsdc.config.places import here
from opsdc.config.settings import ModelConfig
from opsdc.errors import ConfigError, ModelError
from opsdc.models import demo_model, quantize
from opsdc.models.adapters import architecture, unwrap, with_adapter
from opsdc.models.admit import admit
from opsdc.models.faster_layers import compile_layers, use_liger

# One bar for every folder read or written would hide this program's own lines.
transformers_logging.disable_progress_bar()

VARIABLE_LENGTH = ("flash_attention_2", "flash_attention_3", "flex_attention")
"""Only these attention kernels skip other sequences' blocks; the rest cost T² on a packed row."""


def load_tokenizer(
    config: ModelConfig, *, setting: str = "model.name_or_path"
) -> PreTrainedTokenizerBase:
    """Load the model's tokenizer, whose chat template makes both prompts; raises ModelError.

    `setting` is the one that names the model, here and below.
    """
    try:
        return AutoTokenizer.from_pretrained(
            demo_model.resolve(config.name_or_path),
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
        )
    except (OSError, ValueError) as error:
        raise ModelError(f"{setting}: no tokenizer in '{config.name_or_path}': {error}") from error


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Return a response's text without control tokens, for scorers and people.

    It is never tokenized again: training uses the sampled ids.
    """
    return str(tokenizer.decode(list(ids), skip_special_tokens=True))


def pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """Return what each token adds to a text, "" for a control token.

    A letter that several tokens share is a replacement character in each of them.
    """
    found = []
    for i, token in enumerate(ids):
        # Some tokenizers drop the space before a token that stands alone: it needs company.
        before = decode(tokenizer, ids[max(i - 4, 0) : i])
        after = decode(tokenizer, ids[max(i - 4, 0) : i + 1])
        alone = not after.startswith(before)
        found.append(decode(tokenizer, [token]) if alone else after[len(before) :])
    return found


def padding_id(model: Any, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return an id for padded places: the tokenizer's, or 0 where the model has no such row.

    Masks hide it, so that any id does.
    """
    pad, embedding = tokenizer.pad_token_id, cast(Any, unwrap(model).get_input_embeddings())
    return pad if pad is not None and pad < len(embedding.weight) else 0


def load_architecture(
    config: ModelConfig, *, setting: str = "model.name_or_path"
) -> PreTrainedConfig:
    """Load an architecture's config, by a name of our table, a config.json, a folder or a Hub name.

    Raises ModelError, asking for a config.json, where it cannot be read.
    """
    name = config.name_or_path
    text = (resources.files("opsdc") / "models" / "architectures.yaml").read_text("utf-8")
    known: dict[str, dict[str, Any]] = yaml.safe_load(text)
    if name in known:
        return AutoConfig.for_model(**known[name])
    path = here(name)
    if path.name == "config.json" and not path.is_file():
        raise ModelError(f"{setting}: there is no file '{name}'")
    source = str(path.parent) if path.name == "config.json" else demo_model.resolve(name)
    try:
        return AutoConfig.from_pretrained(
            source, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    except (OSError, ValueError, StrictDataclassError) as error:
        raise ModelError(
            f"{setting}: no config of '{name}': give its config.json, or a name out of "
            f"{', '.join(known)} ({error})"
        ) from error


def load_model(
    config: ModelConfig,
    *,
    folder: str | Path | None = None,
    trained: bool = True,
    setting: str = "model.name_or_path",
) -> PreTrainedModel:
    """Load the model that the settings name, or the same one from a checkpoint's `folder`.

    Parameters that will be trained are float32, whatever `dtype` says; none are where `trained` is
    False. Raises ModelError.
    """
    trained_whole = trained and config.lora is None
    kwargs: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
    if config.attn_implementation is not None:
        kwargs["attn_implementation"] = config.attn_implementation
    kwargs["dtype"] = torch.float32 if trained_whole else getattr(torch, config.dtype)
    if config.quantize is not None:
        kwargs["quantization_config"] = quantize.loading_config(kwargs["dtype"])
    place = str(folder) if folder is not None else demo_model.resolve(config.name_or_path)
    revision = None if folder is not None else config.revision
    try:
        # A branch or tag is resolved to its commit, so that the record names what is loaded. A
        # plain folder has none.
        commit = extract_commit_hash(cached_file(place, "config.json", revision=revision), None)
        model = AutoModelForCausalLM.from_pretrained(place, revision=commit or revision, **kwargs)
        model.config._commit_hash = commit
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{setting}: cannot load '{folder or config.name_or_path}': {error}"
        ) from error
    except ImportError as error:
        if config.attn_implementation is None:
            raise
        raise ModelError(
            f"model.attn_implementation {config.attn_implementation}: {error}. Use sdpa, or on a "
            "GPU flex_attention, which comes with torch"
        ) from error
    return model


def receive_model(
    model: str | PreTrainedModel | None,
    config: ModelConfig,
    tokenizer: PreTrainedTokenizerBase | None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, ModelConfig]:
    """Take a model as a caller gives it: a module, a folder or Hub name, or None for the config's.

    Returns the module, its tokenizer, and the settings with the name that was given.

    Raises ConfigError for a module without its tokenizer, ModelError for a name that does not load.
    """
    if model is None or isinstance(model, str):
        config = replace(config, name_or_path=model or config.name_or_path)
        return load_model(config), tokenizer or load_tokenizer(config), config
    if tokenizer is None:
        raise ConfigError("processing_class must be the tokenizer when model is a module")
    return model, tokenizer, config


def load_trained(config: ModelConfig, folder: str | Path) -> Any:
    """Load the model that a run left in `folder`: whole, or the base with the adapter on it.

    Raises ModelError where there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ModelError(f"no trained model in {folder}: has the run ended?")
    if not (folder / "adapter_config.json").is_file():
        return load_model(config, folder=folder)
    try:
        import peft

        return peft.PeftModel.from_pretrained(load_model(config), str(folder))
    except ImportError as error:
        raise ModelError(f'{folder} is an adapter: {error}: pip install "opsdc[lora]"') from error
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ModelError(
            f"the adapter in {folder} does not go onto {config.name_or_path}: "
            f"{' '.join(str(error).split())[:300]}"
        ) from error


def prepare_model(model: PreTrainedModel, config: ModelConfig) -> Any:
    """Attach the adapter, set the layers' kernels and their checkpointing, as the settings say.

    Raises ModelError for a model that cannot be trained, whoever made it; see `admit`.
    """
    if config.quantize is not None:
        quantize.check(model)
        quantize.compute_in_training_precision(model)
    if config.liger:
        use_liger(model)
    if config.lora is not None:
        model = with_adapter(model, config.lora)
    admit(model)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if config.compile:
        compile_layers(unwrap(model))
    return model


def describe(model: Any) -> dict[str, Any]:
    """Return what a run records of its model."""
    base = unwrap(model)
    return {
        "architecture": architecture(model),
        "revision": getattr(base.config, "_commit_hash", None),
        "parameters": sum(quantize.elements(p) for p in model.parameters()),
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "tied_head": base.get_output_embeddings().weight is base.get_input_embeddings().weight,
    }


def save_weights(model: Any, folder: str | Path) -> None:
    """Write an ordinary Hugging Face folder: the whole model, or the adapter alone with LoRA.

    An adapter names its base by the whole path, so that it loads from wherever one stands.
    """
    for adapter in getattr(model, "peft_config", {}).values():
        base = adapter.base_model_name_or_path
        if base and here(base).is_dir():
            adapter.base_model_name_or_path = str(here(base).resolve())
    model.save_pretrained(str(folder))


@torch.no_grad()
def load_weights(model: Any, folder: str | Path) -> None:
    """Copy the parameters of a folder that `save_weights` wrote into the model, bit for bit.

    Raises KeyError for one that is not there or has no place in the model, ValueError for one of
    another shape.
    """
    if hasattr(model, "peft_config"):
        import peft

        # peft's own loader would look on the Hub for what a folder lacks, pickles included.
        adapter = load_file(Path(folder) / "adapter_model.safetensors")
        names = peft.get_peft_model_state_dict(model).keys()
        _none(names - adapter.keys(), "are missing")
        _none(adapter.keys() - names, "have no place in this model")
        peft.set_peft_model_state_dict(model, adapter)
        return
    # Without use_safetensors a folder that has no safetensors would be unpickled.
    saved, loading_info = type(model).from_pretrained(
        str(folder), dtype=torch.float32, use_safetensors=True, output_loading_info=True
    )
    # transformers fills missing tensors with random numbers, and drops what does not fit.
    _none(loading_info["missing_keys"], "are missing")
    _none(loading_info["unexpected_keys"], "have no place in this model")
    parameters = dict(model.named_parameters())
    for name, parameter in saved.named_parameters():
        target = parameters[name]
        if target.shape != parameter.shape:
            raise ValueError(
                f"{name} has shape {list(parameter.shape)} there, {list(target.shape)} here"
            )
        target.copy_(parameter)


def _none(names: Collection[str], fault: str) -> None:
    """Raise KeyError where names of tensors with a fault are given."""
    if names:
        raise KeyError(f"{len(names)} tensors {fault}, {min(names)} for one")
