"""The sentence for a mistake in the settings: key, value, rule, and what was probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from opsdc.config.fields import fields_of, rule_of, section_in
from opsdc.errors import ConfigError

# What people coming from other trainers type, and where it lives here.
_FOREIGN = {
    "learning_rate": "optim.lr",
    "max_steps": "train.steps",
    "num_train_epochs": "train.steps",
    "per_device_train_batch_size": "rollout.prompts_per_step and train.max_tokens_per_micro_batch",
    "gradient_accumulation_steps": "train.max_tokens_per_micro_batch",
    "gradient_checkpointing": "model.gradient_checkpointing",
    "max_grad_norm": "optim.grad_clip",
    "lr_scheduler_type": "optim.schedule",
    "warmup_steps": "optim.warmup_steps",
    "weight_decay": "optim.weight_decay",
    "bf16": "model.dtype: bfloat16",
    "fp16": "model.dtype: float16",
    "logging_steps": "log.every",
    "report_to": "log.report_to",
    "save_steps": "train.save_every",
    "save_total_limit": "train.keep",
    "resume_from_checkpoint": "train.resume",
    "eval_steps": "eval.every",
    "max_prompt_length": "prompt.max_tokens",
    "max_completion_length": "rollout.max_new_tokens",
    "temperature": "rollout.temperature (the loss is always at temperature 1)",
    "top_p": "rollout.top_p",
    "num_generations": "rollout.samples_per_prompt",
    "use_vllm": "rollout.engine",
    "vllm_mode": "rollout.engine",
    "teacher_sync_steps": "teacher.refresh_steps",
    "teacher_update_rate": "teacher.mode and teacher.ema_decay",
    "beta": "loss.divergence (reverse_kl, forward_kl or jsd) and loss.beta",
    "loss_temperature": "nothing: the loss is always at temperature 1",
    "chat_template_kwargs": "prompt.enable_thinking",
    "privileged_context": "prompt.instruction",
    "model_name_or_path": "model.name_or_path",
    "dataset_name": "data.source",
}
# Settings that earlier versions had, and what does their work now.
_GONE = dict.fromkeys(
    (
        *("guard.window", "guard.length", "guard.min_length", "guard.truncation", "guard.kl"),
        *("guard.max_truncation_rise", "guard.repetition", "guard.max_repetition", "guard.max_kl"),
        *("guard.entropy", "guard.min_entropy", "guard.max_entropy", "guard.accuracy"),
    ),
    "guard.action, for all signs together; their limits are fixed",
)


def first_mistake(error: ValidationError, section: Any, config: Any) -> str:
    """Say the first thing wrong with a section of `config`, both of them classes."""
    first = error.errors(include_url=False)[0]
    kind, place, value = first["type"], first["loc"], first["input"]
    problem = first.get("ctx", {}).get("error")
    if isinstance(problem, ConfigError):
        return str(problem)
    fields = fields_of(config)
    path = [name for name, field in fields.items() if section_in(field) is section]
    if kind in ("unexpected_keyword_argument", "invalid_key"):
        key = value if kind == "invalid_key" else place[-1]
        return _unknown_key([*path, *map(str, place[:-1])], str(key), fields)
    # The place of an item in a list is a number: the list's key says enough.
    name = ".".join([*path, *(part for part in place if isinstance(part, str))])
    if kind == "dataclass_type":
        return f"{name or 'the file'} must be a section of keys, got {value!r}"
    if value is None:
        return f"{name} must be set, got null"
    is_range = kind.startswith(("greater_than", "less_than"))
    rule = problem or (rule_of(fields[name]) if is_range else first["msg"])
    return f"{name} must be {str(rule).removeprefix('Input should be ')}, got {value!r}"


def _unknown_key(path: list[str], key: str, fields: dict[str, FieldInfo]) -> str:
    above = ".".join(path)
    name = f"{above}.{key}" if above else key
    known = [last for section, _, last in (n.rpartition(".") for n in fields) if section == above]
    hint = meant(name, fields)
    here = (
        "" if hint.startswith(("; it is gone", "; here")) else f" (known here: {', '.join(known)})"
    )
    return f"unknown key '{name}'{hint}{here}"


def meant(name: str, known: Iterable[str]) -> str:
    """Return the clause that says what an unknown dotted name is here, or was probably meant to be.

    It is empty where nothing comes near.
    """
    section, dot, key = name.rpartition(".")
    if name in _GONE:
        return f"; it is gone, use {_GONE[name]}"
    if key in _FOREIGN:
        return f"; here it is {_FOREIGN[key]}"
    parts = {known_name: known_name.rpartition(".") for known_name in known}
    close = [known_name for known_name, part in parts.items() if part[2] == key]
    if not close:
        beside = [part[2] for part in parts.values() if part[0] == section]
        close = [f"{section}{dot}{k}" for k in difflib.get_close_matches(key, beside, 1)]
    return f"; did you mean {' or '.join(close)}?" if close else ""
