"""The result of a run as a table for the terminal, with answers before and after."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from opsdc.config import OPSDCConfig
from opsdc.eval.answers import read_answers
from opsdc.eval.arms import write_summary
from opsdc.eval.plots import plot_run

_ARMS = {"base": "base", "prompt_only": "base, told to be concise", "trained": "trained"}
_SAMPLES = 3
_SHOWN_CHARACTERS = 400


def finish_run(folder: Path, config: OPSDCConfig, facts: dict[str, Any]) -> dict[str, Any]:
    """Write a finished run's summary.json and plot.png; return the summary."""
    summary = write_summary(folder, config, facts)
    plot_run(folder)
    return summary


def print_report(folder: Path) -> None:
    """Print `folder`/summary.json and three sample answers; what is missing is left out."""
    summary = json.loads((folder / "summary.json").read_text("utf-8"))
    console = Console(highlight=False, width=None if Console().is_terminal else 100)
    if "trained" in summary:
        console.print(_arms(summary))
        console.print(_difficulty(summary["by_difficulty"]))
        _samples(folder, console)
        console.print(_verdict(summary), markup=False)
    console.print(f"record: {folder}/ (summary.json, metrics.jsonl, plot.png)", markup=False)


def _arms(summary: dict[str, Any]) -> Table:
    table = Table(title=f"{summary['base']['answers']} held-out answers per row")
    for name in ("", "mean tokens", "p10 / p50 / p90", "truncated", "accuracy", "no answer found"):
        table.add_column(name, justify="left" if not name else "right")
    for key, name in _ARMS.items():
        row = summary[key]
        table.add_row(
            name,
            f"{row['tokens_mean']:.1f}",
            f"{row['tokens_p10']:.0f} / {row['tokens_p50']:.0f} / {row['tokens_p90']:.0f}",
            _percent(row["truncated"]),
            _percent(row["accuracy"]),
            _percent(row["no_answer_found"]),
        )
    return table


def _difficulty(found: dict[str, list[dict[str, Any]]]) -> Table:
    table = Table(title="by difficulty for the base model")
    for name in ("", "problems", "tokens base → trained", "reduction", "accuracy base → trained"):
        table.add_column(name, justify="left" if not name else "right")
    for rows in found.values():
        for row in rows:
            table.add_row(
                row["bin"],
                str(row["problems"]),
                f"{row['base_tokens']:.1f} → {row['trained_tokens']:.1f}",
                _percent(row["token_reduction"]),
                f"{_percent(row.get('base_accuracy'))} → {_percent(row.get('trained_accuracy'))}",
            )
    return table


def _samples(folder: Path, console: Console) -> None:
    before = {(a.problem_id, a.sample): a for a in read_answers(folder / "eval" / "base.jsonl")}
    for after in read_answers(folder / "eval" / "trained.jsonl")[:_SAMPLES]:
        base = before[after.problem_id, after.sample]
        for title, text in (
            (f"problem (answer: {after.gold})", after.question),
            (f"before, {base.tokens} tokens", base.text),
            (f"after, {after.tokens} tokens", after.text),
        ):
            short = text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + " […]"
            console.print(f"── {title}", markup=False, style="bold")
            console.print(short.strip(), markup=False)
        console.print()


def _verdict(summary: dict[str, Any]) -> str:
    found = summary["compared_with_base"]["trained"]
    low, high = found["token_reduction_ci95"]
    lines = [
        f"token reduction {_percent(found['token_reduction'])} "
        f"(95 % interval {_percent(low)} … {_percent(high)})"
    ]
    if "accuracy_difference" in found:
        low, high = found["accuracy_difference_ci95"]
        lines.append(
            f"accuracy difference {100 * found['accuracy_difference']:+.1f} points "
            f"(95 % interval {100 * low:+.1f} … {100 * high:+.1f}; smallest difference this sample "
            f"shows with 80 % power: {100 * found['accuracy_detectable']:.1f})"
        )
    if "seconds" in summary:
        lines.append(f"{summary['steps']} steps in {summary['seconds']:.0f} s")
    return "\n".join(lines)


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"
