"""Commands that make a run: train, compress, serve."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
from pathlib import Path
from typing import Any

from opsdc.config.command_line import ANY, Parser, add_command, given_settings, load_config
from opsdc.config.describe import commented
from opsdc.config.settings import OPSDCConfig

_TRAIN_EPILOG = """\
Settings come from a recipe or a YAML file whose sections are the groups above; flags win over it.
A list is written a,b.

  opsdc train --config smollm2-cpu                       the demo model on two CPU cores
  opsdc train --config qwen3-8b --output_dir runs/8b     the paper's hyper-parameters
  opsdc train --config qwen3-8b --dry-run                does it fit, and does every part work
  opsdc train --config my.yaml --optim.lr 2e-6 --train.steps 50
  opsdc train --config my.yaml                           again: goes on from the newest checkpoint

A run leaves in output_dir: config.yaml, metrics.jsonl, rollouts.jsonl, divergence.jsonl,
checkpoints/, model/, eval/*.jsonl, summary.json, plot.png and report.html.
"""
_COMPRESS_EPILOG = """\
Answers a few problems to see how long answers are, plans what fits this machine, prints the
settings and writes them to config.yaml, then trains and evaluates. Every setting can be given.

  opsdc compress embedded:smollm2                        the demo's model and problems
  opsdc compress my-model --data my.jsonl --target 0.4 --output runs/short
  opsdc compress Qwen/Qwen3-1.7B --data 'data/*.csv' --train.steps 50 --rollout.engine vllm
"""
_SERVE_EPILOG = """\
Start it with the run's own configuration, then the run with the same two settings and
--rollout.engine vllm_server. The run pushes its weights through the folder, which both must see.

  opsdc serve --config my.yaml --rollout.server_address 127.0.0.1:8123 --rollout.weights_dir /tmp/w
  OPSDC_SERVER_KEY=... opsdc serve --config my.yaml --rollout.server_address 10.0.0.7:8123 ...

Off loopback a key is needed, on both sides in the environment variable OPSDC_SERVER_KEY. It is sent
as it is: use a network that you trust, or a tunnel.
"""


def add_train(commands: Any) -> None:
    parser = add_command(
        commands,
        "train",
        "train a model, or go on with a run",
        f"[--config FILE] {ANY}",
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
    _add_loudness(parser)
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
    return _train_with(config, quiet=arguments.quiet)


def _add_loudness(parser: Parser) -> None:
    """Add -v, a short name of log.verbose, and -q."""
    parser.add_argument(
        "-v", dest="set:log.verbose", action="store_const", const="true",
        default=argparse.SUPPRESS, help="list the checks before step 1",
    )  # fmt: skip
    parser.add_argument(
        "-q", dest="quiet", action="store_true", help="print the report and warnings only"
    )


def _train_with(config: OPSDCConfig, *, quiet: bool) -> int:
    """Train by these settings, and print the report."""
    if quiet:
        # Read when tqdm is loaded, which is later.
        os.environ["TQDM_DISABLE"] = "1"
    from opsdc.ranks import stop

    # Signals are handled before large imports: a stop asked for then ends with status 0.
    with stop.on_signal():
        from opsdc.eval import report
        from opsdc.ranks import talk
        from opsdc.train import OPSDCTrainer

        with talk.join(config.distributed).only_first_rank_prints():
            with contextlib.redirect_stdout(io.StringIO() if quiet else sys.stdout):
                try:
                    trainer = OPSDCTrainer(None, config)
                except stop.Stopped as signal:
                    print(f"stopped by {signal} before the run began", flush=True)
                    return 0
                summary = trainer.train()
            if quiet and "stopped" in summary:
                print(f"stopped by {summary['stopped']} after step {summary['steps']}", flush=True)
            if "stopped" not in summary and trainer.ranks.first:
                report.print_report(Path(config.output_dir))
            trainer.sampler.close()
            talk.leave()
    return 0


def add_compress(commands: Any) -> None:
    parser = add_command(
        commands,
        "compress",
        "make a model shorter: choose the settings, train, evaluate",
        f"MODEL [--data FILE] [--target 0.5] [--output DIR] {ANY}",
        _compress,
        _COMPRESS_EPILOG,
    )
    parser.add_argument("set:model.name_or_path", metavar="MODEL", help="a folder or a Hub name")
    parser.add_argument("--print-config", action="store_true", help="print the settings, and end")
    _add_loudness(parser)
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
    return _train_with(OPSDCConfig.load(file), quiet=arguments.quiet)


def add_serve(commands: Any) -> None:
    parser = add_command(
        commands,
        "serve",
        "sample for a run on another machine or GPU, with vLLM",
        f"[--config FILE] --rollout.server_address HOST:PORT --rollout.weights_dir DIR {ANY}",
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
