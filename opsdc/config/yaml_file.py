"""Settings files: recipes inside the package and YAML files, read as plain data."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from opsdc.config.places import here
from opsdc.errors import ConfigError


class _Loader(yaml.SafeLoader):
    """Safe YAML in which a repeated key is an error instead of a silent overwrite."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            line = key_node.start_mark.line + 1
            if not isinstance(key, str):
                raise ConfigError(f"line {line}: key {key!r} is not text; quote it")
            if key in seen:
                raise ConfigError(f"line {line}: key '{key}' appears twice; keep one")
            seen.add(key)
        return super().construct_mapping(node, deep)


def parse_yaml(text: str) -> Any:
    """Parse YAML into plain data; raises ConfigError that says where it is wrong."""
    try:
        # _Loader is a SafeLoader: it builds plain data only.
        return yaml.load(text, Loader=_Loader)
    except ConfigError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"not YAML: {error}") from error


def recipe_names() -> list[str]:
    """Names of the recipes inside the package."""
    folder = resources.files("opsdc") / "recipes"
    return sorted(
        p.name.removesuffix(".yaml") for p in folder.iterdir() if p.name.endswith(".yaml")
    )


def recipe_summary(name: str) -> str:
    """Return the first sentence of a recipe's comment."""
    text = _recipe(name)
    comment = " ".join(x.lstrip("# ") for x in text.split("\n\n")[0].splitlines() if x[:1] == "#")
    return re.split(r"(?<=\.) ", comment)[0]


def _recipe(name: str) -> str:
    return (resources.files("opsdc") / "recipes" / f"{name}.yaml").read_text("utf-8")


def read_file(source: str | Path) -> dict[str, Any]:
    """Read a recipe by name, or a YAML file; raises ConfigError that names it."""
    path = here(source)
    if str(source) in recipe_names():
        text = _recipe(str(source))
    elif path.is_file():
        try:
            text = path.read_text("utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(f"{source} is not UTF-8 text: {error}") from error
    else:
        near = difflib.get_close_matches(str(source), recipe_names(), 1)
        hint = f"; did you mean {near[0]}?" if near else "."
        raise ConfigError(
            f"no configuration '{source}'{hint} Give a YAML file, or one of the recipes "
            f"{', '.join(recipe_names())}"
        )
    try:
        tree = parse_yaml(text)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error.__cause__
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{source}: expected sections and keys, found {type(tree).__name__}")
    return tree


def with_settings(tree: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tree of sections and keys with settings, given by dotted name, put over it."""
    tree = dict(tree)
    for name, value in settings.items():
        *sections, key = name.split(".")
        node = tree
        for section in sections:
            child = node.get(section)
            node[section] = node = dict(child) if isinstance(child, Mapping) else {}
        node[key] = value
    return tree
