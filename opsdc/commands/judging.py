"""Commands that look at a run or a model: eval, inspect, plot, report."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from opsdc.config.command_line import ANY, add_command, given_settings, load_config
from opsdc.config.settings import OPSDCConfig
from opsdc.errors import ConfigError

_EVAL_EPILOG = """\
  opsdc eval runs/demo                                   base, prompt-only and trained, anew
  opsdc eval runs/demo --trained runs/demo/checkpoints/step-000008/model
"""
_INSPECT_EPILOG = """\
  opsdc inspect --config runs/demo/config.yaml --problem 3 --model runs/demo/model
  opsdc inspect --batch runs/demo/sick-step-000007.json  a step that was not finite, again
  opsdc inspect --text 'What is \\boxed{2+2}?' --color | less -R
"""
_REPORT_EPILOG = """\
  opsdc report runs/demo                                 runs/demo/report.html
  opsdc report runs/demo --output demo.html --cost_per_hour 2.5 --currency EUR --watts 700

The page is one file that loads nothing from elsewhere. It shows texts of the problems and answers.
"""


def add_eval(commands: Any) -> None:
    parser = add_command(
        commands,
        "eval",
        "compare base, prompt-only and trained on held-out problems",
        f"RUN [--trained FOLDER] {ANY}",
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


def add_inspect(commands: Any) -> None:
    parser = add_command(
        commands,
        "inspect",
        "show both prompts, the scored tokens and the divergence per token of one problem",
        f"[--config FILE] [--problem N | --text TEXT] [--model FOLDER] {ANY}",
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


def add_plot(commands: Any) -> None:
    text = "draw a run: divergence, length, entropy, accuracy, dial, trade-off"
    parser = add_command(commands, "plot", text, "RUN [RUN ...] [--output PNG]", _plot)
    parser.add_argument("folders", metavar="RUN", type=Path, nargs="+", help="several: overlaid")
    parser.add_argument("--output", type=Path, metavar="PNG", help="default: in the first folder")


def _plot(arguments: argparse.Namespace) -> int:
    """Draw a run, or several over one another, and print the name of the picture."""
    from opsdc.eval.plots import plot_run, plot_runs

    runs = arguments.folders
    print(plot_runs(runs, arguments.output) if runs[1:] else plot_run(runs[0], arguments.output))
    return 0


def add_report(commands: Any) -> None:
    parser = add_command(
        commands,
        "report",
        "write a run as a page to send around: numbers, curves, answers, cost",
        "RUN [--output HTML] [--cost_per_hour PRICE] [--currency NAME] [--watts WATTS]",
        _report,
        _REPORT_EPILOG,
    )
    parser.add_argument("folder", metavar="RUN", type=Path, help="folder of a run (config.yaml)")
    parser.add_argument("--output", type=Path, metavar="HTML", help="default: RUN/report.html")
    parser.add_argument(
        "--cost_per_hour", type=float, metavar="PRICE", help="what an hour of the machine costs"
    )
    parser.add_argument(
        "--currency", default="USD", metavar="NAME", help="of that price (default: USD)"
    )
    parser.add_argument(
        "--watts", type=float, metavar="WATTS", help="power that the whole machine draws"
    )


def _report(arguments: argparse.Namespace) -> int:
    """Write the page of a run, and print the name of its file."""
    from opsdc.eval.cost import Rates
    from opsdc.eval.page import write_page

    rates = Rates(
        cost_per_hour=arguments.cost_per_hour, currency=arguments.currency, watts=arguments.watts
    )
    print(write_page(arguments.folder, arguments.output, rates))
    return 0
