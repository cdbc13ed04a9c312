"""What one setting asks of another: said as soon as they meet, before anything is loaded.

`settings` calls these with a section, or with all of them, whose own types stand above this file.
"""

from __future__ import annotations

from typing import Any

from opsdc.errors import ConfigError


def check_model(model: Any) -> None:
    """Raise ConfigError for weights in 4 bits of which all would be trained."""
    if model.quantize is not None and model.lora is None:
        _refuse("model.lora", "must be set with model.quantize, whose weights are fixed", None)


def check_rollout(rollout: Any) -> None:
    """Raise ConfigError for a server elsewhere that no weights would reach."""
    if rollout.server_address is not None and rollout.weights_dir is None:
        rule = "must be a folder that the server at rollout.server_address sees as well"
        _refuse("rollout.weights_dir", rule, None)


def check_teacher(teacher: Any) -> None:
    """Raise ConfigError for a dial out of its range, and for another model that is to move."""
    if teacher.target is not None and not 0 <= teacher.dial <= teacher.dial_max:
        rule = f"must be at least teacher.dial ({teacher.dial:g})"
        _refuse("teacher.dial_max", rule, teacher.dial_max)
    if teacher.model is None:
        return
    if teacher.mode != "frozen":
        rule = "must be frozen with teacher.model: no update of the student reaches another model"
        _refuse("teacher.mode", rule, teacher.mode)
    if teacher.gate:
        rule = "must be false with teacher.model, which is never refreshed"
        _refuse("teacher.gate", rule, teacher.gate)
    if teacher.anchor:
        rule = "must be 0 with teacher.model: the start of the student has other hidden states"
        _refuse("teacher.anchor", rule, teacher.anchor)


def check_loss(loss: Any) -> None:
    """Raise ConfigError where columns would be left out that this divergence needs."""
    asked = f"loss.columns {loss.columns}"
    if loss.columns is None:
        asked = "loss.skip_tolerance"
    if loss.columns == "bounded" and loss.skip_tolerance is None:
        _refuse("loss.skip_tolerance", f"must be set with {asked}", loss.skip_tolerance)
    if loss.columns == "exact" and loss.skip_tolerance is not None:
        _refuse("loss.skip_tolerance", f"must be unset with {asked}", loss.skip_tolerance)
    if not loss.leaves_columns_out:
        return
    needed = {"divergence": ("reverse_kl",), "backend": ("auto", "chunked")}
    for key, values in needed.items():
        if getattr(loss, key) not in values:
            rule = f"must be {' or '.join(values)} with {asked}"
            _refuse(f"loss.{key}", rule, getattr(loss, key))


def check_run(config: Any) -> None:
    """Raise ConfigError for sections that do not go together."""
    whole = {"model.quantize": config.model.quantize, "teacher.model": config.teacher.model}
    for name, value in whole.items():
        if value is not None and (strategy := config.distributed.strategy) != "ddp":
            _refuse("distributed.strategy", f"must be ddp with {name}", strategy)
    problems, held_out = config.eval.problems, config.data.eval_size
    if problems is not None and problems > held_out:
        _refuse("eval.problems", f"must be between 0 and data.eval_size ({held_out})", problems)


def _refuse(name: str, rule: str, value: Any) -> None:
    raise ConfigError(f"{name} {rule}, got {value!r}")
