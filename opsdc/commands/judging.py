"""Commands that look at a run or a model: eval, inspect, plot, report."""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from opsdc.config.command_line import ANY, add_command, given_settings, load_config
from opsdc.config.places import here
from opsdc.config.settings import OPSDCConfig
from opsdc.config.yaml_file import read_file, with_settings
from opsdc.errors import ConfigError

_EVAL_EPILOG = """\
A model is the folder of a run, a transformers folder, a Hub name or the folder of a PEFT adapter.
RUN alone answers anew as base, prompt-only and trained. One other model answers plain and told to
be concise, two models plain, all on the same problems; the tables pair them by problem.

  opsdc eval runs/demo                                   base, prompt-only and trained, anew
  opsdc eval runs/demo --trained runs/demo/checkpoints/step-000008/model
  opsdc eval Qwen/Qwen3-1.7B --data my.jsonl --instruction 'Be brief.' --eval.samples 4
  opsdc eval Qwen/Qwen3-1.7B runs/short --data my.jsonl --rollout.engine vllm
  opsdc eval my-model --suite reasoning --suite_dir data --eval.problems 100
"""
_INSPECT_EPILOG = """\
  opsdc inspect runs/demo --problem 3                    the trained model of a run
  opsdc inspect --config runs/demo/config.yaml           the model that it began with
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
        "compare base, prompt-only and trained of a run, or any one or two models, on problems",
        f"RUN|MODEL [MODEL_B] [--data FILE | --suite NAME] [--output_dir DIR] {ANY}",
        _eval,
        _EVAL_EPILOG,
    )
    parser.add_argument("model", metavar="MODEL", help="a run, a folder, a Hub name or an adapter")
    parser.add_argument("model_b", metavar="MODEL_B", nargs="?", help="another, to compare with")
    parser.add_argument(
        "--trained", type=Path, metavar="FOLDER", help="the trained model (default: RUN/model)"
    )
    parser.add_argument("--suite", metavar="NAME", help="a suite of problem sets: reasoning")
    parser.add_argument(
        "--suite_dir", type=Path, metavar="DIR",
        help="its sets as files, such as math500.jsonl (default: $OPSDC_DATA, else the Hub)",
    )  # fmt: skip
    parser.short = parser.short | {
        "data.source": "--data",
        "prompt.instruction": "--instruction",
    }
    # The engine is the only part of rollout that an evaluation has.
    engine = ("engine", "memory_share", "timeout_s", "server_address", "weights_dir")
    parser.add_settings(
        only=(
            *("output_dir", "seed", "model.", "data.", "prompt.", "eval."),
            *(f"rollout.{name}" for name in engine),
        )
    )


def _eval(arguments: argparse.Namespace) -> int:
    """Evaluate a run, or any one or two models, and print the report."""
    folder, given = here(arguments.model), given_settings(arguments)
    is_run = (folder / "config.yaml").is_file()
    alone = is_run and arguments.model_b is None
    if arguments.trained is not None and not alone:
        raise ConfigError("--trained belongs to the folder of a run alone: give that, or leave it")
    if arguments.suite is None and arguments.suite_dir is not None:
        raise ConfigError("--suite_dir belongs to --suite NAME: give both, or leave it")
    if arguments.suite is not None and "data.source" in given:
        raise ConfigError("--data and --suite both name problems: give one of them")
    if alone and arguments.suite is None:
        return _eval_run(folder, arguments.trained, given)
    if arguments.suite is None and "data.source" not in given:
        why = "two models" if arguments.model_b else "a folder or name without a run's config.yaml"
        raise ConfigError(f"{why}: say which problems, by --data FILE or --suite NAME")
    return _eval_models(arguments, given, is_run=alone)


def _eval_run(folder: Path, trained: Path | None, given: dict[str, str]) -> int:
    """Answer a run's held-out problems anew as base, told and trained."""
    # The engine of training need not be here, and is not needed for a few answers.
    overrides = {"output_dir": str(folder / "reeval"), "rollout.engine": "hf", **given}
    config = OPSDCConfig.load(folder / "config.yaml", overrides)
    from opsdc.eval import report
    from opsdc.eval.arms import evaluate_arms

    evaluate_arms(config, trained or folder / "model")
    report.print_report(Path(config.output_dir))
    return 0


def _eval_models(arguments: argparse.Namespace, given: dict[str, str], *, is_run: bool) -> int:
    """Answer one model plain and told, or two models plain, and print the tables."""
    import torch

    from opsdc.eval import side_by_side
    from opsdc.eval.tables import print_comparison
    from opsdc.models.given import base_of_run, given_model

    for name in ("eval.greedy", "eval.difficulty_samples", "eval.every"):
        if name in given:
            raise ConfigError(f"{name} belongs to a run alone; --eval.temperature 0 is greedy")
    overrides = {
        "model.dtype": "bfloat16" if torch.cuda.is_available() else "float32",
        "data.eval_size": _ALL,
        "eval.problems": None,
        "rollout.engine": "hf",
        **{key: value for key, value in given.items() if key != "model.name_or_path"},
    }
    file = here(arguments.model) / "config.yaml"
    config = OPSDCConfig.from_dict(
        with_settings(read_file(file) if is_run else {}, overrides), "eval"
    )
    names = [name for name in (arguments.model, arguments.model_b) if name is not None]
    base = given.get("model.name_or_path")
    models = [given_model(name, config.model, base) for name in names]
    if "output_dir" not in given:
        folder = "-vs-".join(model.short_name for model in models)
        config = replace(config, output_dir=f"evals/{folder}")
    side_by_side.check_free(here(config.output_dir))
    arms = side_by_side.arms_of(models)
    if is_run:
        trained = models[0]
        if arguments.trained is not None:
            trained = given_model(str(arguments.trained), trained.config, base)
        arms = side_by_side.arms_of([base_of_run(models[0], OPSDCConfig.load(file).model)], trained)
    questions, facts = _questions(arguments, given, config)
    side_by_side.evaluate(
        arms, questions, config, cap_is_given="eval.max_new_tokens" in given, facts=facts
    )
    print_comparison(Path(config.output_dir))
    return 0


_ALL = 10**9
"""This many problems are all of them."""


def _questions(
    arguments: argparse.Namespace, given: dict[str, str], config: OPSDCConfig
) -> tuple[list[Any], dict[str, Any]]:
    """Read the problems of --data or --suite; return them, and what the record says of them."""
    from opsdc.eval import side_by_side

    if arguments.suite is None:
        everything = "data.eval_size" not in given
        return [side_by_side.read_questions(config, everything=everything)], {}
    folder = arguments.suite_dir or os.environ.get("OPSDC_DATA")
    template = config.data.options.get("prompt_template") if "data.options" in given else None
    questions, skipped = side_by_side.read_suite(
        arguments.suite, config, here(folder) if folder else None, template
    )
    return questions, {"suite": arguments.suite, "skipped": skipped}


def add_inspect(commands: Any) -> None:
    parser = add_command(
        commands,
        "inspect",
        "show both prompts, the scored tokens and the divergence per token of one problem",
        f"[RUN | --config FILE] [--problem N | --text TEXT] [--model FOLDER] {ANY}",
        _inspect,
        _INSPECT_EPILOG,
    )
    parser.add_argument(
        "folder", metavar="RUN", nargs="?", type=Path, help="its config.yaml and its trained model"
    )
    parser.add_config()
    parser.set_defaults(config=None)
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
    run = arguments.folder
    if run is not None and arguments.config is not None:
        raise ConfigError(f"--config {arguments.config}: {run} has its own config.yaml; give one")
    if run is not None and not (run / "config.yaml").is_file():
        raise ConfigError(f"{run} is not the folder of a run: it has no config.yaml")
    arguments.config = arguments.config or (run / "config.yaml" if run else "smollm2-cpu")
    config = load_config(arguments)
    from opsdc.data.prompted import prompted_sets, read_problems
    from opsdc.debug.show import inspect
    from opsdc.models.load import load_model, load_tokenizer, load_trained

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
    its_own = run is not None and "model.name_or_path" not in given_settings(arguments)
    model = load_trained(config.model, run / "model") if its_own else load_model(config.model)
    print(inspect(model, tokenizer, item, config, colour=arguments.color))
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
