"""The settings in words: flags and their help, the page, notes on those without effect."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping
from operator import attrgetter
from typing import Any

import yaml
from pydantic.fields import FieldInfo

from opsdc.config.fields import UsedWith, fields_of, names_of, rule_of, section_in
from opsdc.config.settings import GuardConfig, OPSDCConfig

_HEAD = """\
# Settings

Made by `python -m opsdc.config > docs/SETTINGS.md`; a test keeps it true.

* A recipe or a YAML file has these sections: `opsdc train --config qwen3-8b` or `--config my.yaml`.
* Flags win over it: `--optim.lr 2e-6 --rollout.engine vllm`.
* In Python: `OPSDCConfig.load("qwen3-8b", {"optim.lr": 2e-6})`, or every section by hand:
  `OPSDCConfig(optim=OptimConfig(lr=2e-6))`.
* As a flag a list is `a,b`, a mapping is `"{size: 500}"`; `none` unsets. `--model` is short for
  `--model.name_or_path`.
* Unknown keys, keys given twice and values out of range are errors that say what will do.
"""


def flags() -> dict[str, tuple[str, Any, str]]:
    """{dotted name: (stand-in for the value, default, help)} of every setting, in order."""
    rows = {}
    for name, field in _settings().items():
        default = _default(field)
        limits = "; ".join(text for text in (_typed(default), rule_of(field)) if text)
        rows[name] = (names_of(field)[-1][0], default, f"{_meaning(field)} (default: {limits})")
    return rows


def section_title(name: str) -> str:
    """The sentence that introduces a section, by its dotted name."""
    section = section_in(fields_of(OPSDCConfig)[name]) if name else OPSDCConfig
    return (section.__doc__ or "").partition("\n")[0]


def page() -> str:
    """The page of settings: a table per section."""
    lines, above = _HEAD.splitlines(), None
    for name, field in _settings().items():
        section = name.rpartition(".")[0]
        if section != above:
            lines += ["", f"## {section or 'Top level'}", "", section_title(section), ""]
            lines += ["| key | type | range | default | meaning |", "|---|---|---|---|---|"]
            above = section
        kind = " or ".join(text for _, text in names_of(field))
        default = _typed(_default(field))
        lines.append(f"| `{name}` | {kind} | {rule_of(field)} | {default} | {_meaning(field)} |")
    return "\n".join([*lines, ""])


def commented(tree: Mapping[str, Any]) -> str:
    """A tree of settings as YAML, with the meaning of each key above it."""
    fields, lines = fields_of(OPSDCConfig), []

    def write(section: Mapping[str, Any], prefix: str, indent: str) -> None:
        for key, value in section.items():
            name = f"{prefix}{key}"
            if section_in(fields[name]) and isinstance(value, Mapping):
                lines.extend(["", f"{indent}# {section_title(name)}", f"{indent}{key}:"])
                write(value, f"{name}.", f"{indent}  ")
                continue
            meaning = textwrap.wrap(_meaning(fields[name]), 96 - len(indent))
            lines.extend(f"{indent}# {line}" for line in meaning)
            text = yaml.safe_dump({key: value}, sort_keys=False, allow_unicode=True, width=90)
            lines.extend(indent + line for line in text.splitlines())

    write(tree, "", "")
    return "\n".join([*lines, ""])


def ignored_settings(config: OPSDCConfig) -> list[str]:
    """Settings that differ from their default and have no effect in this configuration."""
    c, notes = config, []
    for name, field in _settings().items():
        for mark in (mark for mark in field.metadata if isinstance(mark, UsedWith)):
            value, user = attrgetter(name)(c), attrgetter(mark.key)(c)
            if user not in mark.values and value != _default(field):
                notes.append(f"{name} has no effect with {mark.key} {user}")
    held_out = c.data.eval_size if c.eval.problems is None else c.eval.problems
    if not (c.eval.every and held_out):
        unless = "has no effect without eval.every and eval.problems"
        if c.guard.target_compression is not None:
            notes.append(f"guard.target_compression {unless}")
        if c.guard.max_accuracy_drop != GuardConfig().max_accuracy_drop:
            notes.append(f"guard.max_accuracy_drop {unless}")
    if c.loss.exact_value_every and not c.loss.leaves_columns_out:
        notes.append("loss.exact_value_every has no effect without loss.skip_tolerance")
    if c.teacher.target is not None and c.optim.schedule != "constant":
        notes.append(
            f"teacher.target steers nothing once optim.schedule {c.optim.schedule} has taken the "
            "rate to zero: it ends where it happens to be; constant holds it"
        )
    if c.loss.token_share == 1 and c.loss.token_criterion != "divergence":
        notes.append("loss.token_criterion has no effect with loss.token_share 1")
    every, steps = c.teacher.refresh_steps, c.train.steps
    if c.teacher.mode == "refresh" and every >= steps:
        below = f"({every}) is not below train.steps ({steps})"
        notes.append(f"teacher.refresh_steps {below}: the teacher stays frozen")
    return notes


def _settings() -> dict[str, FieldInfo]:
    return {name: f for name, f in fields_of(OPSDCConfig).items() if not section_in(f)}


def _default(field: FieldInfo) -> Any:
    return field.get_default(call_default_factory=True, validated_data={})


def _typed(value: Any) -> str:
    """A value as one would type it."""
    return value if isinstance(value, str) else "unset" if value is None else json.dumps(value)


def _meaning(field: FieldInfo) -> str:
    texts = (field.description or "").split()
    for mark in (mark for mark in field.metadata if isinstance(mark, UsedWith)):
        values = " or ".join(", ".join(mark.values).rsplit(", ", 1))
        texts.append(f"Only with {mark.key} {values}.")
    return " ".join(texts)
