"""Commands for before a run: plan, recipes, init."""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path
from typing import Any

from opsdc.config.command_line import ANY, add_command, load_config
from opsdc.config.describe import commented
from opsdc.config.places import here
from opsdc.config.settings import OPSDCConfig
from opsdc.config.yaml_file import read_file, recipe_names, recipe_summary
from opsdc.errors import ConfigError

_PLAN_EPILOG = """\
Needs no weights and no GPU. Status 0: it fits; 1: it does not.

  opsdc plan --model Qwen/Qwen3-8B --gpu-memory 80GB     the paper's settings
  opsdc plan --model my-model/config.json --gpu-memory 141GB --gpus 8 --model.lora.r 64
"""


def add_plan(commands: Any) -> None:
    parser = add_command(
        commands,
        "plan",
        "say before a run whether it fits, with which micro-batch, and where the bytes go",
        f"[--model NAME|FOLDER|config.json] [--gpu-memory 80GB] [--gpus N] {ANY}",
        _plan,
        _PLAN_EPILOG,
    )
    parser.add_config("qwen3-8b")
    parser.add_argument(
        "--gpu-memory", metavar="BYTES", help="of one GPU, as 80GB or 76GiB (default: this CPU's)"
    )
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="data-parallel ranks")
    parser.add_argument(
        "--gemm-tflops",
        type=float,
        default=600.0,
        metavar="X",
        help="rate of a large 16-bit GEMM, for the loss's time (default: 600, assumed)",
    )
    parser.add_settings()


def _plan(arguments: argparse.Namespace) -> int:
    """Print the plan of memory and time; the status is 1 where the run does not fit."""
    config = load_config(arguments)
    if arguments.gpus < 1 or arguments.gemm_tflops <= 0:
        raise ConfigError("--gpus must be at least 1 and --gemm-tflops above 0")
    from opsdc.planner.report import parse_bytes, report

    plan, text = report(
        config,
        memory_bytes=None if arguments.gpu_memory is None else parse_bytes(arguments.gpu_memory),
        gpus=arguments.gpus,
        tflops=arguments.gemm_tflops,
    )
    print(text)
    return 0 if plan.fits else 1


def add_recipes(commands: Any) -> None:
    add_command(commands, "recipes", "list the recipes, for --config NAME", "", _recipes)


def _recipes(arguments: argparse.Namespace) -> int:
    """Print the name of each recipe with the first sentence of its comment."""
    for name in recipe_names():
        print(name, *textwrap.wrap(recipe_summary(name), 88), sep="\n    ")
    return 0


def add_init(commands: Any) -> None:
    text = "write a file of settings to start from, each key with its meaning"
    parser = add_command(commands, "init", text, "[--from RECIPE] [FILE]", _init)
    parser.add_argument("file", metavar="FILE", nargs="?", type=Path, default=Path("opsdc.yaml"))
    parser.add_argument(
        "--from", dest="recipe", default="smollm2-cpu", metavar="RECIPE",
        help=f"one of {', '.join(recipe_names())}, or a YAML file (default: smollm2-cpu)",
    )  # fmt: skip


def _init(arguments: argparse.Namespace) -> int:
    """Write a recipe's settings with their meanings, and say how to go on."""
    file = here(arguments.file)
    if file.exists():
        raise ConfigError(f"{file} is there already: name another FILE")
    tree = read_file(arguments.recipe)
    OPSDCConfig.from_dict(tree, origin=arguments.recipe)
    try:
        file.write_text(commented(tree | {"output_dir": f"runs/{file.stem}"}), "utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {file}: {error}") from error
    print(f"{file}: set data.source and model.name_or_path, then opsdc train --config {file}")
    return 0
