"""A trained model as a folder for others: its adapter merged, its weights cast, both proven."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from transformers import AutoModelForCausalLM, AutoTokenizer

from opsdc.config.places import here
from opsdc.config.settings import ModelConfig
from opsdc.errors import ConfigError, ModelError
from opsdc.models.load import load_trained, save_weights

DTYPES = ("bfloat16", "float16", "float32")

_PROBE = "What is 7 times 8? Seven multiplied by eight is 56, and 56 is the answer."
"""A merged model must read this text as the adapted one does."""

_MERGE_LIMIT = 1e-3
"""Largest difference of a log-probability in float32, in nats, that a right merge may make."""


@torch.no_grad()
def export_model(
    config: ModelConfig, trained: Path, target: Path, *, merge: bool, dtype: str
) -> float | None:
    """Write a trained model to a new folder, read it back, and return what the cast has changed.

    That is the mean difference of log-probabilities on a short text, in nats. What is read back
    must equal what was to be written, bit for bit. An adapter alone is copied as it is: None.

    Args:
        config: The settings of the run's model, whose base an adapter goes onto.
        trained: The folder that the run left.
        target: The folder to write; it must not exist, or be empty.
        merge: True to write a whole model where the trained one is an adapter. It is merged in
            float32 onto the base as it is without quantization.
        dtype: One of DTYPES, for the weights of a whole model. An adapter alone keeps its own.

    Raises ConfigError for a target with files in it, ModelError for a model that cannot be loaded
    or merged, or that reads otherwise once it is merged.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target} is there already: name another folder")
    adapter = (trained / "adapter_config.json").is_file()
    if adapter and not merge:
        shutil.copytree(trained, target, dirs_exist_ok=True)
        return None
    model = load_trained(replace(config, quantize=None, dtype="float32"), trained).eval()
    tokenizer = AutoTokenizer.from_pretrained(trained)
    probe = torch.tensor([tokenizer.encode(_PROBE, add_special_tokens=False)])
    truth = _log_probabilities(model, probe)
    if adapter:
        try:
            model = model.merge_and_unload(safe_merge=True)
        except (ValueError, AttributeError, NotImplementedError) as error:
            raise ModelError(f"the adapter in {trained} cannot be merged: {error}") from error
        off = (_log_probabilities(model, probe) - truth).abs().max().item()
        if not off <= _MERGE_LIMIT:
            raise ModelError(
                f"the adapter in {trained} changes when it is merged: log-probabilities differ by "
                f"{off:.1e} nats; export it without --merge"
            )
    model.to(getattr(torch, dtype))
    save_weights(model, target)
    tokenizer.save_pretrained(str(target))
    if (trained / "README.md").is_file():
        _copy_card(trained / "README.md", target / "README.md")
    again = AutoModelForCausalLM.from_pretrained(target, dtype=dtype).eval()
    written = model.state_dict()
    wrong = [name for name, t in again.state_dict().items() if not t.equal(written[name])]
    if wrong:
        raise ModelError(f"{target} holds other weights than were written: {wrong[0]} for one")
    return (_log_probabilities(again, probe) - truth).abs().mean().item()


def _log_probabilities(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Return log-probabilities [T-1] of the tokens after the first, in nats."""
    logits = model(input_ids=ids).logits[0, :-1].float()
    return logits.log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]


def _copy_card(source: Path, target: Path) -> None:
    """Copy a model's card; a merged model is transformers' and no adapter any more."""
    card = ModelCard.load(source)
    card.data["library_name"] = "transformers"
    card.save(target)


def push_model(folder: Path, name: str, *, private: bool) -> str:
    """Upload a model's folder to the Hub, its card included, and return its address.

    A card without a licence gets that of a base on the Hub. Raises ModelError, before anything is
    uploaded, for a folder without weights or card, and for an adapter whose base lies on this
    machine only; later for what the Hub says.
    """
    weights = [*folder.glob("*.safetensors")]
    if not weights or not (folder / "README.md").is_file():
        missing = "README.md" if weights else "weights"
        raise ModelError(f"{folder} has no {missing}: name a run's model/, or what export wrote")
    adapter = folder / "adapter_config.json"
    if adapter.is_file():
        base = str(json.loads(adapter.read_text("utf-8"))["base_model_name_or_path"])
        if here(base).is_dir():
            raise ModelError(
                f"the adapter in {folder} goes onto {base}, which is on this machine only: "
                "opsdc export --merge makes a whole model of the two"
            )
    api = HfApi()
    try:
        url = api.create_repo(name, private=private, exist_ok=True)
        _inherit_licence(api, folder / "README.md")
        api.upload_folder(
            repo_id=url.repo_id, folder_path=folder, commit_message="A model trained with OPSDC"
        )
    except HFValidationError as error:
        raise ModelError(f"'{name}' is no name of a repository: {error}") from error
    except (HfHubHTTPError, OSError) as error:
        why = " ".join(str(error).split())[:300]
        raise ModelError(
            f"{name} is not uploaded: {why}; `hf auth login`, or HF_TOKEN, says who you are"
        ) from error
    return str(url)


def _inherit_licence(api: HfApi, file: Path) -> None:
    """Write the licence of a base on the Hub into a card that has none."""
    card = ModelCard.load(file)
    base = card.data.get("base_model")
    if card.data.get("license") or not isinstance(base, str):
        return
    try:
        its_card = api.model_info(base).card_data
    except HfHubHTTPError:
        return  # A base that nobody may see has no licence to read.
    if its_card is not None and its_card.get("license"):
        card.data.license = its_card["license"]
        card.save(file)
