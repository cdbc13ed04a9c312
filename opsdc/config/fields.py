"""A setting's field: how people write its value, which values it takes, how it is described."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import types
from collections.abc import Callable, Mapping
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import ValidationInfo
from pydantic.fields import FieldInfo
from pydantic_core import core_schema

from opsdc.config.yaml_file import parse_yaml


@dataclasses.dataclass(frozen=True)
class MustBe:
    """A range that Field has no word for: its rule, as "must be" goes on, and its test."""

    rule: str
    holds: Callable[[Any], Any]

    def _check(self, value: Any) -> Any:
        if value is not None and not self.holds(value):
            raise ValueError(self.rule)
        return value

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        return core_schema.no_info_after_validator_function(self._check, handler(source))


@dataclasses.dataclass(frozen=True)
class UsedWith:
    """The values of another setting with which this one has an effect."""

    key: str
    values: tuple[str, ...]


def _members(field: FieldInfo) -> tuple[Any, ...]:
    hint = field.annotation
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def section_in(field: FieldInfo) -> Any:
    """The section that a field holds; None where it is a setting."""
    return next((m for m in _members(field) if dataclasses.is_dataclass(m)), None)


def fields_of(cls: Any, prefix: str = "") -> dict[str, FieldInfo]:
    """{dotted name: field} of the settings of a section, then of the sections inside it."""
    fields = {}
    for key, field in sorted(cls.__pydantic_fields__.items(), key=lambda f: bool(section_in(f[1]))):
        fields[prefix + key] = field
        if section := section_in(field):
            fields |= fields_of(section, f"{prefix}{key}.")
    return fields


def names_of(field: FieldInfo) -> list[tuple[str, str]]:
    """What each kind of value of a setting is called, on the command line and in an error."""
    return [_names(kind) for kind in _members(field) if kind is not type(None)]


def _names(kind: Any) -> tuple[str, str]:
    if get_origin(kind) is Literal:
        return "|".join(get_args(kind)), "one of " + ", ".join(get_args(kind))
    if get_origin(kind) is tuple:
        return "LIST", f"a list of {_names(get_args(kind)[0])[1].removeprefix('a ')}s"
    return {
        bool: ("BOOL", "true or false"),
        int: ("N", "a whole number"),
        float: ("X", "a number"),
        str: ("TEXT", "text"),
        dict: ("MAP", "a mapping such as '{size: 500}'"),
    }[get_origin(kind) or kind]


def convert(cls: Any, raw: Any, info: ValidationInfo) -> Any:
    """Convert a value as YAML, a flag or Python gives it, before pydantic checks its range."""
    field = cls.__pydantic_fields__[info.field_name]
    if section_in(field):
        return raw
    if type(None) in _members(field) and (raw is None or str(raw) in ("none", "null")):
        return None
    kinds = list(_members(field))
    if isinstance(raw, str) and "," in raw:
        # Where a text will do as well as a list, commas make it a list.
        kinds.sort(key=lambda kind: get_origin(kind) is not tuple)
    for kind in kinds:
        with contextlib.suppress(TypeError, ValueError, LookupError, OverflowError):
            return _read(raw, kind)
    raise ValueError(" or ".join(name for _, name in names_of(field)))


def _read(raw: Any, kind: Any) -> Any:
    """Read a value of one kind; an error, whatever it is, says that it is none."""
    origin, arguments = get_origin(kind) or kind, get_args(kind)
    is_text, is_bool = isinstance(raw, str), isinstance(raw, bool)
    if origin is Literal:
        # YAML reads a bare on or off as a boolean.
        return arguments[arguments.index(("off", "on")[raw] if is_bool else raw)]
    if origin is bool and (is_text or is_bool):
        return {"true": True, "false": False}[str(raw).lower()]
    if origin is str and is_text:
        return raw
    if origin is str and type(raw) is datetime.date:
        # YAML reads a bare 2026-01-31 as a day.
        return raw.isoformat()
    if origin is float and not is_bool:
        return float(raw)
    if origin is int and not is_bool:
        # 8192, "8192", 1e9 and "1e9" are all how people write whole numbers.
        with contextlib.suppress(ValueError):
            if isinstance(raw, (int, str)):
                return int(raw)
        if float(raw).is_integer():
            return int(float(raw))
    if origin is tuple and is_text:
        raw = [
            part.strip()
            for part in raw.removeprefix("[").removesuffix("]").split(",")
            if part.strip()
        ]
    if origin is tuple and isinstance(raw, (list, tuple)):
        return tuple(_read(part, arguments[0]) for part in raw)
    tree = parse_yaml(raw) if is_text else raw
    if origin is dict and isinstance(tree, Mapping) and all(isinstance(key, str) for key in tree):
        return dict(tree)
    raise TypeError


def rule_of(field: FieldInfo) -> str:
    """The range of a setting, as "must be" goes on; empty where every value will do."""
    for mark in field.metadata:
        if isinstance(mark, MustBe):
            return mark.rule
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    limits = {b: getattr(mark, b) for mark in field.metadata for b in words if hasattr(mark, b)}
    if len(limits) == 2:
        (low, least), (high, most) = sorted(limits.items())
        return f"in {'[' if low == 'ge' else '('}{least:g}, {most:g}{']' if high == 'le' else ')'}"
    return "".join(f"{words[bound]} {limit:g}" for bound, limit in limits.items())
