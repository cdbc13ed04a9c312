"""The command `opsdc`: its parser, and what it does with mistakes, signals and closed pipes."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import select
import sys
from collections.abc import Sequence

from opsdc.commands import judging, preparing, sharing, training
from opsdc.config import command_line
from opsdc.config.command_line import Parser
from opsdc.errors import OPSDCError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command, and return its exit status (2 for a mistake of the user's)."""
    if not sys.stderr.isatty():
        # In a log a bar is a line every so often; read when tqdm is loaded, which is later.
        os.environ.setdefault("TQDM_MININTERVAL", "30")
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        status = _run(argv)
        # What is left in the buffer is part of the command: a reader may be gone by now.
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        watch = select.poll()
        watch.register(1, 0)
        if not watch.poll(0):
            raise
        # The reader has seen enough (`opsdc plan | head`); Python would complain again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130


def _run(argv: list[str]) -> int:
    """Parse the arguments and run their command."""
    parser, commands = _parser()
    command = argv[0] if argv and not argv[0].startswith("-") else ""
    its_parser, arguments = commands.get(command, parser), argparse.Namespace(command=command)
    try:
        if command and command not in commands:
            command_line.refuse_command(command, commands)
        if argv in ([], ["train"], ["compress"]):
            # Too much would begin unasked.
            its_parser.print_help()
            return 2
        if argv == ["--version"]:
            print(f"opsdc {importlib.metadata.version('opsdc')}")
            return 0
        arguments, unknown = parser.parse_known_args(argv)
        if unknown:
            command_line.refuse_argument(unknown[0], its_parser)
        return arguments.run(arguments)
    except OPSDCError as error:
        text = command_line.as_typed(str(error), arguments, its_parser, argv)
        print(f"{its_parser.prog}: {text}", file=sys.stderr)
        return 2


def _parser() -> tuple[Parser, dict[str, Parser]]:
    """Build the parser, and that of each command by its name; each below adds its own part."""
    parser = Parser(
        prog="opsdc",
        description="On-policy self-distillation: teach a reasoning model to be concise with its "
        "own concise self as the teacher.",
    )
    parser.add_argument("--version", action="store_true", help="print the version, and end")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for add in (
        *(training.add_compress, training.add_train, judging.add_eval, training.add_serve),
        *(judging.add_inspect, preparing.add_plan, judging.add_plot, judging.add_report),
        *(sharing.add_export, sharing.add_push, preparing.add_recipes, preparing.add_init),
    ):
        add(commands)
    return parser, commands.choices
