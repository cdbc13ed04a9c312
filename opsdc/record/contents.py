"""The contents that the settings of a run stand for: base weights, problems, rendered prompts.

Settings are names. A folder can be filled anew, a file edited, a chat template print the date: so a
checkpoint records digests of what its run was made of, and a run that goes on compares them.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from opsdc.config.settings import OPSDCConfig
from opsdc.data.prompted import ProblemSets
from opsdc.data.prompts import load_instruction
from opsdc.models.adapters import architecture, unwrap
from opsdc.models.other import OtherModel
from opsdc.ranks.talk import Ranks
from opsdc.record import checkpoint

_NAMES = ("_name_or_path", "_commit_hash", "architectures", "dtype", "transformers_version")
"""Entries of a model's config that say where it is from or how it is held, not what it computes."""


def read_contents(
    model: Any,
    other: OtherModel | None,
    tokenizer: Any,
    sets: ProblemSets,
    config: OPSDCConfig,
    ranks: Ranks,
) -> dict[str, Any]:
    """Describe what a run is made of, as plain JSON; the first rank reads for all.

    `model` is as it was given, before an adapter of the run's own or another rank's part; `other`
    is the one that teaches, if any.
    """

    def read() -> dict[str, Any]:
        against = config.teacher.against
        return {
            "model": _read_model(model),
            "teacher": None if other is None else _read_model(other.module),
            "instruction": load_instruction(config.prompt.instruction),
            "against": None if against is None else load_instruction(against, "teacher.against"),
            "chat_template": hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest(),
            "problems": {name: set_.problems_sha256 for name, set_ in sets._asdict().items()},
            "prompts": {name: set_.prompts_sha256 for name, set_ in sets._asdict().items()},
        }

    return ranks.on_first_rank(read)


def changes(old: Any, new: Any, prefix: str = "", *, but: tuple[str, ...] = ()) -> list[str]:
    """List the entries of two nested mappings that differ, except those named in `but`."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        # Versions of transformers differ in the entries that a model's config has.
        of_versions = prefix in ("model.config.", "teacher.config.")
        keys = [k for k in old if k in new] if of_versions else {**old, **new}
        return [
            line
            for key in keys
            if prefix + key not in but
            for line in changes(old.get(key), new.get(key), f"{prefix}{key}.", but=but)
        ]
    return [] if old == new else [f"{prefix.rstrip('.')}: {_short(old)} → {_short(new)}"]


def dated(config: OPSDCConfig, ranks: Ranks) -> OPSDCConfig:
    """Return the settings with the date that the run's prompts show: the day on which it began.

    A run that goes on takes it from its newest checkpoint, or from the one that is named.
    """
    if config.prompt.date is not None:
        return config
    root, wanted = Path(config.output_dir) / "checkpoints", config.train.resume
    folders = checkpoint.listing(root) if wanted == "auto" else [Path(wanted)]
    dates = [datetime.date.today().isoformat()]
    for folder in folders:
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
            dates.insert(-1, checkpoint.read_state(folder)["config"]["prompt"]["date"])
    return replace(config, prompt=replace(config.prompt, date=ranks.from_first(dates[0])))


def _read_model(model: Any) -> dict[str, Any]:
    """Describe a model by what it computes."""
    base = unwrap(model)
    return {
        "architecture": architecture(model),
        "config": _without_names(json.loads(base.config.to_json_string(use_diff=False))),
        "eos_token_id": getattr(base.generation_config, "eos_token_id", None),
        "weights": _digest_of_weights(model),
    }


def _digest_of_weights(model: Any) -> str:
    """Hash all parameters by name, but for those of an adapter, which every run makes anew."""
    wrapped = hasattr(model, "peft_config")
    fixed = [(n, p) for n, p in model.named_parameters() if not (wrapped and p.requires_grad)]

    def digest(named: tuple[str, torch.Tensor]) -> bytes:
        name, parameter = named
        # As float32, so that the dtype in which a folder is loaded makes no difference of its own.
        values = parameter.detach().float().cpu().contiguous().view(-1).view(torch.uint8)
        total = hashlib.sha256(f"{name} {list(parameter.shape)}\n".encode())
        total.update(values.numpy().data)
        return total.digest()

    # Hashing lets go of Python's lock.
    with ThreadPoolExecutor() as pool:
        return hashlib.sha256(b"".join(pool.map(digest, fixed))).hexdigest()


def _without_names(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {k: _without_names(v) for k, v in tree.items() if k not in _NAMES}
    return tree


def _short(value: Any) -> str:
    """Write a value for a message; of a digest its first digits will do."""
    text = repr(value)
    if isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef"):
        return f"sha256 {value[:12]}"
    return text if len(text) <= 100 else f"{text[:100]}…"
