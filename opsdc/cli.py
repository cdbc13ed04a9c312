"""The command `opsdc`: compress, train, eval, serve, inspect, plan, plot, recipes, init."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import select
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from opsdc.config import command_line
from opsdc.config.command_line import Parser, given_settings, load_config
from opsdc.config.describe import commented
from opsdc.config.places import here
from opsdc.config.settings import OPSDCConfig
from opsdc.config.yaml_file import read_file, recipe_names, recipe_summary
from opsdc.errors import ConfigError, OPSDCError

# The examples at the end of each command's help.

_TRAIN_EPILOG = """\
Settings come from a recipe or a YAML file whose sections are the groups above; flags win over it.
A list is written a,b.

  opsdc train --config smollm2-cpu                       the demo model on two CPU cores
  opsdc train --config qwen3-8b --output_dir runs/8b     the paper's hyper-parameters
  opsdc train --config qwen3-8b --dry-run                does it fit, and does every part work
  opsdc train --config my.yaml --optim.lr 2e-6 --train.steps 50
  opsdc train --config my.yaml                           again: goes on from the newest checkpoint

A run leaves in output_dir: config.yaml, metrics.jsonl, rollouts.jsonl, checkpoints/, model/,
eval/*.jsonl, summary.json and plot.png.
"""
_COMPRESS_EPILOG = """\
Answers a few problems to see how long answers are, plans what fits this machine, prints the
settings and writes them to config.yaml, then trains and evaluates. Every setting can be given.

  opsdc compress embedded:smollm2                        the demo's model and problems
  opsdc compress my-model --data my.jsonl --target 0.4 --output runs/short
  opsdc compress Qwen/Qwen3-1.7B --data 'data/*.csv' --train.steps 50 --rollout.engine vllm
"""
_EVAL_EPILOG = """\
  opsdc eval runs/demo                                   base, prompt-only and trained, anew
  opsdc eval runs/demo --trained runs/demo/checkpoints/step-000008/model
"""
_SERVE_EPILOG = """\
Start it with the run's own configuration, then the run with the same two settings and
--rollout.engine vllm_server. The run pushes its weights through the folder, which both must see.

  opsdc serve --config my.yaml --rollout.server_address 127.0.0.1:8123 --rollout.weights_dir /tmp/w
  OPSDC_SERVER_KEY=... opsdc serve --config my.yaml --rollout.server_address 10.0.0.7:8123 ...

Off loopback a key is needed, on both sides in the environment variable OPSDC_SERVER_KEY. It is sent
as it is: use a network that you trust, or a tunnel.
"""
_INSPECT_EPILOG = """\
  opsdc inspect --config runs/demo/config.yaml --problem 3 --model runs/demo/model
  opsdc inspect --batch runs/demo/sick-step-000007.json  a step that was not finite, again
  opsdc inspect --text 'What is \\boxed{2+2}?' --color | less -R
"""
_PLAN_EPILOG = """\
Needs no weights and no GPU. Status 0: it fits; 1: it does not.

  opsdc plan --model Qwen/Qwen3-8B --gpu-memory 80GB     the paper's settings
  opsdc plan --model my-model/config.json --gpu-memory 141GB --gpus 8 --model.lora.r 64
"""

_ANY = "[--SECTION.KEY VALUE ...]"
"""Settings in a usage line: there are some fifty of them, too many to list."""


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
        *(_add_compress, _add_train, _add_eval, _add_serve, _add_inspect, _add_plan, _add_plot),
        *(_add_recipes, _add_init),
    ):
        add(commands)
    return parser, commands.choices


def _add_command(
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


# The commands. What is large is imported when a command runs, so that --help answers at once.


def _add_train(commands: Any) -> None:
    parser = _add_command(
        commands,
        "train",
        "train a model, or go on with a run",
        f"[--config FILE] {_ANY}",
        _train,
        _TRAIN_EPILOG,
    )
    parser.add_config()
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the plan, train one step of a tiny twin, leave nothing behind",
    )
    parser.add_argument("--print-config", action="store_true", help="print the settings, and end")
    parser.add_settings()


def _train(arguments: argparse.Namespace) -> int:
    """Train, or go on with a run; with --dry-run train one step of a tiny twin."""
    config = load_config(arguments)
    if arguments.print_config:
        print(config.to_yaml(), end="")
        return 0
    if arguments.dry_run:
        from opsdc.planner.dry_run import dry_run
        from opsdc.train import OPSDCTrainer

        dry_run(config, OPSDCTrainer)
        return 0
    return _train_with(config)


def _train_with(config: OPSDCConfig) -> int:
    """Train by these settings, and print the report."""
    from opsdc.ranks import stop

    # Signals are handled before large imports: a stop asked for then ends with status 0.
    with stop.on_signal():
        from opsdc.eval import report
        from opsdc.ranks import talk
        from opsdc.train import OPSDCTrainer

        with talk.join(config.distributed).only_first_rank_prints():
            try:
                trainer = OPSDCTrainer(None, config)
            except stop.Stopped as signal:
                print(f"stopped by {signal} before the run began", flush=True)
                return 0
            if "stopped" not in trainer.train() and trainer.ranks.first:
                report.print_report(Path(config.output_dir))
            trainer.sampler.close()
            talk.leave()
    return 0


def _add_compress(commands: Any) -> None:
    parser = _add_command(
        commands,
        "compress",
        "make a model shorter: choose the settings, train, evaluate",
        f"MODEL [--data FILE] [--target 0.5] [--output DIR] {_ANY}",
        _compress,
        _COMPRESS_EPILOG,
    )
    parser.add_argument("set:model.name_or_path", metavar="MODEL", help="a folder or a Hub name")
    parser.add_argument("--print-config", action="store_true", help="print the settings, and end")
    parser.short = {"data.source": "--data", "teacher.target": "--target", "output_dir": "--output"}
    parser.add_settings()


def _compress(arguments: argparse.Namespace) -> int:
    """Choose the settings, write and print them, and train by them."""
    from opsdc.planner.compress import choose
    from opsdc.record.lines import write_text, writing

    tree = choose(given_settings(arguments))
    text = commented(tree)
    print(f"\n{text}", flush=True)
    if arguments.print_config:
        return 0
    file = Path(tree["output_dir"]) / "config.yaml"
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, text)
    print(f"{file}: the settings above; opsdc train --config {file} goes on with this run\n")
    return _train_with(OPSDCConfig.load(file))


def _add_eval(commands: Any) -> None:
    parser = _add_command(
        commands,
        "eval",
        "compare base, prompt-only and trained on held-out problems",
        f"RUN [--trained FOLDER] {_ANY}",
        _eval,
        _EVAL_EPILOG,
    )
    parser.add_argument("folder", metavar="RUN", type=Path, help="folder of a run (config.yaml)")
    parser.add_argument(
        "--trained", type=Path, metavar="FOLDER", help="the trained model (default: RUN/model)"
    )
    parser.add_settings(only=("output_dir", "seed", "model.name_or_path", "eval.", "data."))


def _eval(arguments: argparse.Namespace) -> int:
    """Answer anew as base, told and trained, and print the report."""
    folder = arguments.folder
    if not (folder / "config.yaml").is_file():
        raise ConfigError(f"{folder} is not the folder of a run: it has no config.yaml")
    overrides = given_settings(arguments)
    overrides.setdefault("output_dir", str(folder / "reeval"))
    config = OPSDCConfig.load(folder / "config.yaml", overrides)
    from opsdc.eval import report
    from opsdc.eval.arms import evaluate_arms

    evaluate_arms(config, arguments.trained or folder / "model")
    report.print_report(Path(config.output_dir))
    return 0


def _add_serve(commands: Any) -> None:
    parser = _add_command(
        commands,
        "serve",
        "sample for a run on another machine or GPU, with vLLM",
        f"[--config FILE] --rollout.server_address HOST:PORT --rollout.weights_dir DIR {_ANY}",
        _serve,
        _SERVE_EPILOG,
    )
    parser.add_config()
    parser.add_settings(only=("model.", "prompt.", "rollout.", "eval."))


def _serve(arguments: argparse.Namespace) -> int:
    """Sample for a run elsewhere until told to stop."""
    config = load_config(arguments)
    from opsdc.rollout.vllm.server import serve_run

    serve_run(config)
    return 0


def _add_inspect(commands: Any) -> None:
    parser = _add_command(
        commands,
        "inspect",
        "show both prompts, the scored tokens and the divergence per token of one problem",
        f"[--config FILE] [--problem N | --text TEXT] [--model FOLDER] {_ANY}",
        _inspect,
        _INSPECT_EPILOG,
    )
    parser.add_config()
    parser.add_argument("--problem", type=int, default=0, metavar="N", help="held-out problem N")
    parser.add_argument("--text", help="your own problem instead")
    parser.add_argument(
        "--batch", type=Path, metavar="FILE", help="a step that a run gave up on: sick-step-*.json"
    )
    parser.add_argument(
        "--color",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="colours (default: on a terminal)",
    )
    parser.add_settings(only=("seed", "model.", "data.", "prompt.", "rollout.", "loss."))


def _inspect(arguments: argparse.Namespace) -> int:
    """Show one held-out problem, or a step that a run gave up on."""
    if arguments.batch is not None:
        from opsdc.debug.replay import replay

        print(replay(arguments.batch))
        return 0
    config = load_config(arguments)
    from opsdc.data.prompted import prompted_sets, read_problems
    from opsdc.debug.show import inspect
    from opsdc.models.load import load_model, load_tokenizer

    rows = None
    if arguments.text is not None:
        rows = [{"problem": arguments.text}]
        rollout = replace(config.rollout, prompts_per_step=1)
        data = replace(config.data, gate_size=0)
        config = replace(config, rollout=rollout, data=data)
    problems = read_problems(config, rows, rows)
    tokenizer = load_tokenizer(config.model)
    held_out = prompted_sets(config, tokenizer, problems).held_out
    if not 0 <= arguments.problem < len(held_out):
        raise ConfigError(
            f"--problem must be between 0 and {len(held_out) - 1}, got {arguments.problem}"
        )
    item = held_out[arguments.problem]
    print(inspect(load_model(config.model), tokenizer, item, config, colour=arguments.color))
    return 0


def _add_plan(commands: Any) -> None:
    parser = _add_command(
        commands,
        "plan",
        "say before a run whether it fits, with which micro-batch, and where the bytes go",
        f"[--model NAME|FOLDER|config.json] [--gpu-memory 80GB] [--gpus N] {_ANY}",
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


def _add_plot(commands: Any) -> None:
    text = "draw a run: divergence, length, entropy, accuracy, dial, trade-off"
    parser = _add_command(commands, "plot", text, "RUN [RUN ...] [--output PNG]", _plot)
    parser.add_argument("folders", metavar="RUN", type=Path, nargs="+", help="several: overlaid")
    parser.add_argument("--output", type=Path, metavar="PNG", help="default: in the first folder")


def _plot(arguments: argparse.Namespace) -> int:
    """Draw a run, or several over one another, and print the name of the picture."""
    from opsdc.eval.plots import plot_run, plot_runs

    runs = arguments.folders
    print(plot_runs(runs, arguments.output) if runs[1:] else plot_run(runs[0], arguments.output))
    return 0


def _add_recipes(commands: Any) -> None:
    _add_command(commands, "recipes", "list the recipes, for --config NAME", "", _recipes)


def _recipes(arguments: argparse.Namespace) -> int:
    """Print the name of each recipe with the first sentence of its comment."""
    for name in recipe_names():
        print(name, *textwrap.wrap(recipe_summary(name), 88), sep="\n    ")
    return 0


def _add_init(commands: Any) -> None:
    text = "write a file of settings to start from, each key with its meaning"
    parser = _add_command(commands, "init", text, "[--from RECIPE] [FILE]", _init)
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
