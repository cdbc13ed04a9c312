"""A model as a command line names it: a run, a plain folder, a Hub name, an adapter's folder."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from opsdc.config.places import here
from opsdc.config.settings import LoRAConfig, ModelConfig, OPSDCConfig
from opsdc.errors import ModelError
from opsdc.models import demo_model
from opsdc.models.load import load_architecture, load_model, load_tokenizer, load_trained


@dataclass(frozen=True, kw_only=True)
class GivenModel:
    """A model that is answered with, and where its parts are."""

    name: str
    """The name as it was given."""
    config: ModelConfig
    """Settings of the whole model, or of the base below the adapter."""
    adapter: Path | None = None
    """Folder of the adapter on the base."""

    @property
    def short_name(self) -> str:
        """The last part of the name, for tables and folders."""
        is_folder = here(self.name).is_dir()
        # The name of a folder given as "." stands in its whole path alone.
        name = str(here(self.name).resolve()) if is_folder else self.name.rstrip("/")
        return name.replace(":", "/").rpartition("/")[2] or "model"

    def architecture(self) -> PreTrainedConfig:
        """Load the architecture's config, no weights; raises ModelError."""
        try:
            return load_architecture(self.config)
        except ModelError as error:
            raise self._blamed(error) from error

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the tokenizer: an adapter's own where its folder has one; raises ModelError."""
        config = self.config
        if self.adapter is not None and (self.adapter / "tokenizer_config.json").is_file():
            config = replace(config, name_or_path=str(self.adapter), revision=None)
        try:
            return load_tokenizer(config)
        except ModelError as error:
            raise self._blamed(error) from error

    def load(self) -> Any:
        """Load the weights in `model.dtype`, the adapter on its base; raises ModelError."""
        # Whole, a model would come in float32, as training wants it.
        config = replace(self.config, lora=self.config.lora or LoRAConfig())
        try:
            if self.adapter is not None:
                return load_trained(config, self.adapter)
            return load_model(config)
        except ModelError as error:
            raise self._blamed(error) from error

    def _blamed(self, error: ModelError) -> ModelError:
        """Return the error with the name that was given, in one line."""
        text = " ".join(str(error).removeprefix("model.name_or_path: ").split())
        if self.adapter is None:
            return ModelError(f"{self.name}: {text}")
        return ModelError(
            f"{self.name} is an adapter on '{self.config.name_or_path}', which fails: {text}; name "
            "its base with --model"
        )


def given_model(name: str, settings: ModelConfig, base: str | None = None) -> GivenModel:
    """Find out what a name means, without loading anything.

    Args:
        settings: How a model is loaded; of a run the settings in its own config.yaml count, but for
            the dtype.
        base: An adapter's base in the place of the one that its folder names.

    Raises ModelError for a folder that is not there or holds no model, for a base that is not
    found, and for a `base` below what is no adapter; ConfigError for a run's broken config.yaml.
    """
    folder = here(name)
    if not folder.is_dir():
        demo_model.check_known(name)
        _no_base(name, base)
        return GivenModel(name=name, config=replace(settings, name_or_path=name))
    below = base
    if (folder / "config.yaml").is_file():
        run = OPSDCConfig.load(folder / "config.yaml").model
        folder, below = folder / "model", base or run.name_or_path
        revision = settings.revision if base else run.revision
        settings = replace(run, dtype=settings.dtype, revision=revision)
        if not folder.is_dir():
            raise ModelError(f"no trained model in {folder}: has the run ended?")
    if (folder / "adapter_config.json").is_file():
        return GivenModel(name=name, config=_base_of(folder, settings, below), adapter=folder)
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"{folder} holds no model: no config.yaml (a run), config.json (a model) or "
            "adapter_config.json (an adapter)"
        )
    _no_base(name, base)
    return GivenModel(name=name, config=replace(settings, name_or_path=str(folder), revision=None))


def base_of_run(given: GivenModel, run: ModelConfig) -> GivenModel:
    """Return the model that a run began with, loaded as the trained one is."""
    name, revision = run.name_or_path, run.revision
    if given.adapter is not None:
        name = given.config.name_or_path
    return GivenModel(name=name, config=replace(given.config, name_or_path=name, revision=revision))


def _base_of(folder: Path, settings: ModelConfig, base: str | None) -> ModelConfig:
    """Return the settings of an adapter's base: the one given, or the one that its folder names."""
    file, revision = folder / "adapter_config.json", settings.revision
    if base is None:
        try:
            described = json.loads(file.read_text("utf-8"))
            base, revision = described["base_model_name_or_path"], described.get("revision")
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise ModelError(
                f"cannot read {file}: {error!r}; name its base with --model"
            ) from error
    if not isinstance(base, str) or not base:
        raise ModelError(f"{file} names no base; name it with --model")
    try:
        demo_model.check_known(base)
    except ModelError as error:
        text = str(error).removeprefix("model.name_or_path: ")
        raise ModelError(
            f"{folder} is an adapter whose base is not found: {text}; name it with --model"
        ) from error
    return replace(settings, name_or_path=base, revision=revision)


def _no_base(name: str, base: str | None) -> None:
    if base is not None:
        raise ModelError(f"--model {base}: {name} is no adapter, and needs no base; leave it out")
