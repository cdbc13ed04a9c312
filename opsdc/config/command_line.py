"""The command line's parser: a flag for each setting, and errors that say what was meant."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from opsdc.config.describe import flags, section_title
from opsdc.config.mistakes import meant
from opsdc.config.settings import OPSDCConfig
from opsdc.config.yaml_file import recipe_names
from opsdc.errors import ConfigError

ANY = "[--SECTION.KEY VALUE ...]"
"""Settings in a usage line: there are some fifty of them, too many to list."""


class Parser(argparse.ArgumentParser):
    """A parser that takes flags by their whole name only, and whose errors are one line."""

    def __init__(self, **options: Any) -> None:
        self.short = {"model.name_or_path": "--model"}
        """Settings that have a second, shorter flag."""
        super().__init__(
            allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options
        )

    def error(self, message: str) -> NoReturn:
        """Say what is wrong in one line, and leave with status 2."""
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")

    def flag_names(self) -> list[str]:
        """List the flags that this parser knows, without their dashes."""
        return [name.lstrip("-") for action in self._actions for name in action.option_strings]

    def add_config(self, default: str = "smollm2-cpu") -> None:
        """Add --config, which names a recipe or a YAML file."""
        self.add_argument(
            "--config",
            default=default,
            metavar="FILE",
            help=f"a YAML file or a recipe: {', '.join(recipe_names())} (default: {default})",
        )

    def add_settings(self, only: tuple[str, ...] = ("",)) -> None:
        """Add a flag for each setting whose dotted name starts with one of `only`, by section."""
        groups: dict[str, Any] = {}
        for name, (metavar, _, text) in flags().items():
            if not name.startswith(only):
                continue
            section = name.rpartition(".")[0]
            if section not in groups:
                title = section_title(section)
                groups[section] = self.add_argument_group(section or "settings", title)
            groups[section].add_argument(
                *([self.short[name]] if name in self.short else []),
                f"--{name}",
                dest=f"set:{name}",
                metavar=metavar,
                default=argparse.SUPPRESS,
                help=text.replace("%", "%%"),
            )


def add_command(
    commands: Any, name: str, text: str, usage: str, run: Any, epilog: str = ""
) -> Parser:
    """Add a command whose `run` takes the parsed arguments and returns the exit status."""
    parser = commands.add_parser(
        name,
        usage=f"opsdc {name} {usage}",
        help=text,
        description=text[0].upper() + text[1:] + ".",
        epilog=epilog,
    )
    parser.set_defaults(run=run)
    return parser


def refuse_command(name: str, known: Iterable[str]) -> NoReturn:
    """Raise ConfigError for a command that there is not, with the one that was meant."""
    hint = meant(name, known) or f" (there are {', '.join(known)})"
    raise ConfigError(f"unknown command '{name}'{hint}")


def refuse_argument(name: str, parser: Parser) -> NoReturn:
    """Raise ConfigError for an argument that a command does not know, with the one that was meant.

    `--learning-rate` is looked for as the setting `learning_rate`.
    """
    if not name.startswith("-"):
        raise ConfigError(f"unexpected argument '{name}' (see {parser.prog} --help)")
    flag = name.partition("=")[0].lstrip("-")
    known = parser.flag_names()
    hint = meant(flag, known) or meant(flag.replace("-", "_"), known)
    # Each name of a flag in the hint gets its dashes.
    hint = re.sub(r"[\w.-]+", lambda m: f"--{m[0]}" if m[0] in known else m[0], hint)
    raise ConfigError(f"unknown flag --{flag}{hint or f' (see {parser.prog} --help)'}")


def given_settings(arguments: argparse.Namespace) -> dict[str, str]:
    """Return the settings given as flags, by dotted name."""
    return {
        name.removeprefix("set:"): value
        for name, value in vars(arguments).items()
        if name.startswith("set:")
    }


def load_config(arguments: argparse.Namespace) -> OPSDCConfig:
    """Read the file or recipe of `--config`, with the flags over it."""
    return OPSDCConfig.load(arguments.config, given_settings(arguments))


def as_typed(
    message: str, arguments: argparse.Namespace, parser: Parser, argv: Sequence[str]
) -> str:
    """Return an error about a setting with the flag that gave its value, not the file below it."""
    file = str(getattr(arguments, "config", arguments.command))
    for name in given_settings(arguments):
        pattern = rf"^(?:{re.escape(file)}: )?{re.escape(name)}\b"
        short = parser.short.get(name, "")
        typed = short if any(a.partition("=")[0] == short for a in argv) else f"--{name}"
        if re.match(pattern, message):
            return re.sub(pattern, typed, message, count=1)
    return message
