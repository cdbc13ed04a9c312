"""The tables of `opsdc eval` for models that are no run: one set in full, a suite set by set."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from opsdc.eval.answers import read_answers
from opsdc.eval.figures import FEWEST, TOO_FEW, percent, points
from opsdc.eval.report import accuracy_lines, shortened, table

_OTHER_TOKENS = (
    "the tokenizers differ: token counts are not comparable between the models, characters are"
)


def print_comparison(folder: Path) -> None:
    """Print what `side_by_side.evaluate` left in a folder."""
    summary = json.loads((folder / "summary.json").read_text("utf-8"))
    settings = summary["eval"]
    each = "one answer" if settings["samples"] == 1 else f"{settings['samples']} answers"
    print(
        f"\n{each} to each problem, at most {settings['max_new_tokens']} tokens, temperature "
        f"{settings['temperature']:g}"
    )
    if "suite" in summary:
        print(suite_table(summary))
        if summary["skipped"]:
            print(f"left out: {', '.join(summary['skipped'])}; summary.json says why")
    else:
        (results,) = summary["sets"]
        print(set_table(summary, results) + "\n")
        print(_one_problem(folder, summary))
        print("\n".join(_differences(summary, results)))
    if not summary["same_tokens"]:
        print(_OTHER_TOKENS)
    print(f"record: {folder}/ (summary.json; every answer in eval/*.jsonl)")


def set_table(summary: dict[str, Any], results: dict[str, Any]) -> str:
    """Lay out the arms of one set: lengths, cut answers, right answers with their interval."""
    right = "share right" if summary["eval"]["samples"] == 1 else "pass@1"
    # Where tokenizers agree, characters say what tokens say.
    characters = () if summary["same_tokens"] else ("mean characters",)
    head = (
        f"{results['problems']} problems, scorer {results['scorer']}",
        *("mean tokens", "p10 / p50 / p90", *characters, "truncated"),
        *(f"{right} (95 % interval)", "no answer found"),
    )
    rows = []
    for key, arm in results["arms"].items():
        rows.append((
            summary["models"][key]["title"],
            f"{arm['tokens_mean']:.1f}",
            f"{arm['tokens_p10']:.0f} / {arm['tokens_p50']:.0f} / {arm['tokens_p90']:.0f}",
            *(f"{arm['characters_mean']:.0f}" for _ in characters),
            percent(arm["truncated"]),
            _right(arm, results["problems"]),
            percent(arm["no_answer_found"]),
        ))  # fmt: skip
    return table(head, rows)


def suite_table(summary: dict[str, Any]) -> str:
    """Lay out all arms of all sets of a suite, each compared with the set's first arm."""
    first = next(iter(summary["models"].values()))["title"]
    lengths = "token" if summary["same_tokens"] else "character"
    head = (
        *("set", "arm", "problems", f"mean {lengths}s", "truncated", "pass@1 (95 % interval)"),
        *(f"{lengths} reduction", f"pass@1 against {first}"),
    )
    rows = []
    for results in summary["sets"]:
        for key, arm in results["arms"].items():
            compared = results["compared"].get(key, {})
            difference = ""
            if "accuracy_difference" in compared:
                difference = f"{100 * compared['accuracy_difference']:+.1f} points"
                if results["problems"] >= FEWEST:
                    difference += f" ({points(*compared['accuracy_difference_ci95'])})"
            rows.append((
                results["name"],
                summary["models"][key]["title"],
                str(results["problems"]),
                f"{arm[f'{lengths}s_mean']:.1f}",
                percent(arm["truncated"]),
                _right(arm, results["problems"]),
                percent(compared[f"{lengths}_reduction"]) if compared else "",
                difference,
            ))  # fmt: skip
    return table(head, rows, left=2)


def _right(arm: dict[str, Any], problems: int) -> str:
    """Format the share of right answers with its interval, if the problems suffice for one."""
    if "pass_at_1" not in arm:
        return "–"
    low, high = arm["pass_at_1_ci95"]
    interval = "too few" if problems < FEWEST else f"{100 * low:.1f} … {100 * high:.1f}"
    return f"{percent(arm['pass_at_1'])} ({interval})"


def _differences(summary: dict[str, Any], results: dict[str, Any]) -> list[str]:
    """Say how each later arm of a set differs from the first."""
    titles = {key: model["title"] for key, model in summary["models"].items()}
    first, lines = next(iter(titles.values())), []
    # Where the tokenizers differ a share of tokens would say nothing.
    what = "token" if summary["same_tokens"] else "character"
    for key, compared in results["compared"].items():
        low, high = map(percent, compared[f"{what}_reduction_ci95"])
        interval = f"95 % interval {low} … {high}"
        if compared["problems"] < FEWEST:
            interval = TOO_FEW
        lines += [
            f"── {titles[key]}, against {first}",
            f"{what} reduction {percent(compared[f'{what}_reduction'])} ({interval})",
            *accuracy_lines(first, compared),
        ]
    return lines


def _one_problem(folder: Path, summary: dict[str, Any]) -> str:
    """Show every arm's first answer to the first problem."""
    shown: list[str] = []
    for key, model in summary["models"].items():
        a = read_answers(folder / "eval" / f"{key}.jsonl")[0]
        if not shown:
            shown = [f"── problem (answer: {a.gold})", shortened(a.question)]
        verdict = {None: "", True: ", right", False: ", wrong"}[a.correct]
        shown += [f"── {model['title']}, {a.tokens} tokens{verdict}", shortened(a.text)]
    return "\n".join([*shown, ""])
