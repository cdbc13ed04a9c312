"""The result of a run as a table for the terminal, with answers before and after."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opsdc.config.settings import OPSDCConfig
from opsdc.eval.answers import read_answers
from opsdc.eval.arms import write_summary
from opsdc.eval.best import candidates
from opsdc.eval.card import write_card
from opsdc.eval.figures import ARMS, FEWEST, TOO_FEW, p_value, percent, points
from opsdc.eval.page import write_page
from opsdc.eval.plots import plot_run

_SAMPLES = 3
"""Number of answers that are shown before and after."""

_SHOWN_CHARACTERS = 400
"""Length at which a shown answer is cut."""


def finish_run(folder: Path, config: OPSDCConfig, facts: dict[str, Any]) -> dict[str, Any]:
    """Write a finished run's summary.json, plot.png, report.html and its model's card.

    Returns the summary. What cannot be drawn or written is a line on stderr: the run is complete
    without it.
    """
    base = folder / "eval" / ("gate-base.jsonl" if config.data.gate_size else "base.jsonl")
    if base.is_file():
        facts = facts | {"evaluated": candidates(folder / "eval", read_answers(base), config)}
    summary = write_summary(folder, config, facts)
    try:
        plot_run(folder)
    except Exception as error:  # Fonts, backends and versions fail in many different ways.
        print(f"{folder} is not drawn: {error}; later: opsdc plot {folder}", file=sys.stderr)
    try:
        write_card(folder, config, summary)
    except Exception as error:  # The base's own card may be anything.
        print(f"{folder}/model has no card: {error}", file=sys.stderr)
    try:
        write_page(folder)
    except Exception as error:  # It reads all that a run leaves, and other people's files too.
        again = f"later: opsdc report {folder}"
        print(f"{folder} has no report.html: {error}; {again}", file=sys.stderr)
    return summary


def print_report(folder: Path) -> None:
    """Print the tables and sample answers of `folder`/summary.json, as far as they exist."""
    summary = json.loads((folder / "summary.json").read_text("utf-8"))
    if "trained" in summary:
        print(f"\n{summary['base']['answers']} held-out answers per row")
        print(_arms_table(summary))
        if "greedy" in summary:
            print("\nthe same problems, answered greedily")
            print(_arms_table(summary["greedy"]))
        print("\nby the length of the base model's answers")
        print(_bins_table(summary["by_length"]))
        for measure, rows in summary.get("by_difficulty", {}).items():
            print(f"\nby the base's {measure.replace('_', ' ')} in other answers than these")
            print(_bins_table(rows))
        if "evaluated" in summary:
            print("\nevaluated steps")
            print(_steps_table(summary))
        print("\n" + _samples(folder))
        print(_verdict(summary))
    names = ("summary.json", "metrics.jsonl", "plot.png", "report.html")
    print(f"record: {folder}/ ({', '.join(n for n in names if (folder / n).is_file())})")


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """Lay out columns of text, the first `left` aligned to the left and the others to the right."""
    lines = [head, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    shown = [
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    return "\n".join([shown[0], "─" * len(shown[0]), *shown[1:]])


def _arms_table(summary: dict[str, Any]) -> str:
    head = (
        "",
        "token reduction",
        "mean tokens",
        "p10 / p50 / p90",
        "truncated",
        "accuracy",
        "no answer found",
    )
    rows = []
    for key, name in ARMS.items():
        arm = summary[key]
        rows.append((
            name,
            percent(summary["compared_with_base"].get(key, {}).get("token_reduction")),
            f"{arm['tokens_mean']:.1f}",
            f"{arm['tokens_p10']:.0f} / {arm['tokens_p50']:.0f} / {arm['tokens_p90']:.0f}",
            percent(arm["truncated"]),
            percent(arm["accuracy"]),
            percent(arm["no_answer_found"]),
        ))  # fmt: skip
    return table(head, rows)


def _bins_table(bins: Sequence[dict[str, Any]]) -> str:
    head = ("", "problems", "tokens base → trained", "reduction", "accuracy base → trained")
    rows = [
        (
            row["bin"],
            str(row["problems"]),
            f"{row['base_tokens']:.1f} → {row['trained_tokens']:.1f}",
            percent(row["token_reduction"]),
            f"{percent(row.get('base_accuracy'))} → {percent(row.get('trained_accuracy'))}",
        )
        for row in bins
    ]
    return table(head, rows)


def _steps_table(summary: dict[str, Any]) -> str:
    head = ("step", "mean tokens", "accuracy", "difference from base", "Pareto", "kept")
    rows = [
        (
            str(row["step"]),
            f"{row['tokens']:.1f}",
            percent(row["accuracy"]),
            TOO_FEW if row["problems"] < FEWEST else points(*row["accuracy_difference_ci95"]),
            "yes" if row["pareto"] else "",
            "yes" if row["step"] == summary["kept_step"] else "",
        )
        for row in summary["evaluated"]
    ]
    return table(head, rows)


def _samples(folder: Path) -> str:
    """Show the first trained answers below the base's to the same problems."""
    before = {(a.problem_id, a.sample): a for a in read_answers(folder / "eval" / "base.jsonl")}
    shown = []
    for after in read_answers(folder / "eval" / "trained.jsonl")[:_SAMPLES]:
        base = before[after.problem_id, after.sample]
        for title, text in (
            (f"problem (answer: {after.gold})", after.question),
            (f"before, {base.tokens} tokens", base.text),
            (f"after, {after.tokens} tokens", after.text),
        ):
            shown += [f"── {title}", shortened(text)]
        shown.append("")
    return "\n".join(shown)


def shortened(text: str) -> str:
    """Return the beginning of a text that is to be shown."""
    return (text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + " […]").strip()


def _verdict(summary: dict[str, Any]) -> str:
    """Say in a few lines what training changed, with intervals."""
    base, told = summary["compared_with_base"]["trained"], summary["trained_compared_with_told"]
    few = base["problems"] < FEWEST
    low, high = map(percent, base["token_reduction_ci95"])
    interval = TOO_FEW if few else f"95 % interval {low} … {high}"
    lines = [f"token reduction {percent(base['token_reduction'])} ({interval})"]
    for name, compared in (("base", base), ("base told to be concise", told)):
        lines += accuracy_lines(name, compared)
    if "seconds" in summary:
        lines.append(f"{summary['steps']} steps in {summary['seconds']:.0f} s")
    return "\n".join(lines)


def accuracy_lines(name: str, compared: dict[str, Any]) -> list[str]:
    """Say how accuracy differs from that of `name`, with what was kept, lost and gained."""
    if "accuracy_difference" not in compared:
        return []
    few, p = compared["problems"] < FEWEST, compared["mcnemar_p"]
    interval = TOO_FEW
    if not few:
        interval = (
            f"95 % interval {points(*compared['accuracy_difference_ci95'])}; smallest "
            "difference this sample shows with 80 % power: "
            f"{100 * compared['accuracy_detectable']:.1f}"
        )
    return [
        f"accuracy against {name}: {100 * compared['accuracy_difference']:+.1f} points "
        f"({interval})",
        f"  {compared['kept']} right in both, {compared['lost']} lost, "
        f"{compared['gained']} gained, {compared['still_wrong']} wrong in both"
        + ("" if few or p is None else f", p {p_value(p)}"),
    ]
