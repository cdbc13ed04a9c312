"""Settings files: recipes inside the package and YAML files, read as plain data."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import yaml

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


def read_file(source: str | Path) -> dict[str, Any]:
    """Read a recipe by name, or a YAML file; raises ConfigError that names it."""
    path = Path(source)
    if str(source) in recipe_names():
        text = (resources.files("opsdc") / "recipes" / f"{source}.yaml").read_text("utf-8")
    elif path.is_file():
        try:
            text = path.read_text("utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(f"{source} is not UTF-8 text: {error}") from error
    else:
        raise ConfigError(
            f"no configuration '{source}': give a YAML file or one of the recipes "
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
