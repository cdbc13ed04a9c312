"""Tables and plots of docs/effect.md and README.md from the record of `benchmarks.effect`.

    python -m benchmarks.effect_tables              prints the tables
    python -m benchmarks.effect_tables --write      into both and docs/plots/

The pages' text is written by hand; what stands between `<!-- effect: NAME -->` and
`<!-- end: NAME -->` is written here, and a test fails where the two disagree.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks import record
from benchmarks.effect import ARMS, DEMO, RECORD, SCHEDULES, TARGETS

DOCS = Path(__file__).parent.parent / "docs"
PAGES = (DOCS / "effect.md", DOCS.parent / "README.md")
PLOTS = DOCS / "plots"
PICTURE, PARETO, STAIRCASE = (PLOTS / f"{n}.png" for n in ("demo", "effect-pareto", "effect-steps"))


def tables(found: dict[str, Any]) -> dict[str, str]:
    """Return each table's Markdown by the name of its place in the page."""
    arms = found["arms"]
    return {
        "demo": _by_seed(arms[DEMO]) if DEMO in arms else "Not measured yet.",
        "arms": _arms(arms, ARMS),
        "targets": _targets(arms),
        "schedules": _arms(arms, ("frozen", *SCHEDULES)),
        "difficulty": _difficulty(arms),
        "source": _source(found),
    }


def _arms(arms: dict[str, Any], names: Iterable[str]) -> str:
    lines = [
        "| | seeds | tokens | right | against the base | kept, lost, gained | against told | "
        "entropy | half after |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    base = arms["told"]["base"]
    lines.append(f"| base | | {base['tokens_mean']:.1f} | {base['accuracy']:.1%} | | | | | |")
    lines.append(_arm("base, told", arms["told"]))
    lines += [_arm(name, arms[name]) for name in names if name in arms]
    missing = [name for name in names if name not in arms]
    if missing:
        lines += ["", f"Not measured yet: {', '.join(missing)}."]
    return "\n".join(lines)


def _by_seed(demo: dict[str, Any]) -> str:
    lines = [
        "| seed | base | told | trained | saved | against the base | against told | kept, lost, "
        "gained | entropy |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for seed, row, cell in zip(demo["seeds"], demo["by_seed"], demo["cells"], strict=True):
        against = row["against_base"]
        cells = [
            *(f"{row[n]['tokens_mean']:.1f}, {row[n]['accuracy']:.1%}"
              for n in ("base", "told", "trained")),
            f"{against['token_reduction']:.0%}",
            _points(against),
            _points(row["against_told"]),
            f"{against['kept']}, {against['lost']}, {against['gained']}",
            f"{cell['steps'][0]['entropy']:.2f} → {_last([cell['steps']], 'entropy'):.2f}",
        ]  # fmt: skip
        lines.append(f"| {seed} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _arm(name: str, arm: dict[str, Any]) -> str:
    trained, against = arm["trained"], arm["against_base"]
    cells = [
        str(len(arm["seeds"])) if "seeds" in arm else "",
        f"{trained['tokens_mean']:.1f}",
        f"{trained['accuracy']:.1%}",
        _points(against),
        f"{against['kept']}, {against['lost']}, {against['gained']}",
    ]
    if "cells" in arm:
        steps = [cell["steps"] for cell in arm["cells"]]
        cells += [
            _points(arm["against_told"]),
            f"{fmean(s[0]['entropy'] for s in steps):.2f} → {_last(steps, 'entropy'):.2f}",
            _half(arm),
        ]
    else:
        cells += [""] * 3
    return f"| {name} | " + " | ".join(cells) + " |"


def _points(against: dict[str, Any]) -> str:
    low, high = against["accuracy_difference_ci95"]
    return f"{100 * against['accuracy_difference']:+.1f} ({100 * low:+.1f} … {100 * high:+.1f})"


def _last(runs: Sequence[Sequence[dict[str, Any]]], measure: str) -> float:
    """Average a measure over the last quarter of the runs' steps."""
    return fmean(fmean(s[measure] for s in steps[-max(1, len(steps) // 4) :]) for steps in runs)


def _half(arm: dict[str, Any]) -> str:
    """Say after how many steps rollouts were half as long, seed by seed."""
    steps = [s for s in arm["steps_to_half"] if s is not None]
    if not steps:
        return "never"
    seeds = "" if len(steps) == len(arm["cells"]) else f" ({len(steps)} of {len(arm['cells'])})"
    return f"{fmean(steps):.1f} steps{seeds}"


def _targets(arms: dict[str, Any]) -> str:
    lines = [
        "| target | last quarter of training | held out | right | against the base | dial |",
        "|---|---|---|---|---|---|",
    ]
    measured = {name: setting for name, setting in TARGETS.items() if name in arms}
    if not measured:
        return "Not measured yet."
    for name, setting in measured.items():
        arm = arms[name]
        steps = [cell["steps"] for cell in arm["cells"]]
        lines.append(
            f"| {setting['teacher.target']:.0%} | {1 - _last(steps, 'relative_length'):.0%} | "
            f"{arm['against_base']['token_reduction']:.0%} | {arm['trained']['accuracy']:.1%} | "
            f"{_points(arm['against_base'])} | {_last(steps, 'dial'):.2f} |"
        )
    return "\n".join(lines)


def _difficulty(arms: dict[str, Any]) -> str:
    if DEMO not in arms:
        return "Not measured yet."
    found = arms[DEMO]["by_difficulty"]
    lines = ["| | problems | tokens | saved | right |", "|---|---|---|---|---|"]
    for rows in found.values():
        lines += [
            f"| {row['bin']} | {row['problems']} | {row['base_tokens']:.1f} → "
            f"{row['trained_tokens']:.1f} | {row['token_reduction']:.0%} | "
            f"{row['base_accuracy']:.0%} → {row['trained_accuracy']:.0%} |"
            for row in rows
        ]
    return "\n".join(lines)


def _source(found: dict[str, Any]) -> str:
    environment = found["environment"]
    return (
        f"`{environment['command']}`, {found['steps']} steps (the demo: its own), on "
        f"{record.describe(environment)}."
    )


def _credit(found: dict[str, Any]) -> str:
    return record.describe(found["environment"])


def draw(found: dict[str, Any]) -> None:
    """Write the plots: the demo's steps, length against accuracy by arm, length by teacher."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    arms = found["arms"]
    figure, sides = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    measures = (("tokens_mean", 1, "tokens of an answer"), ("accuracy", 100, "right, %"))
    for plot, (measure, scale, label) in zip(sides, measures, strict=True):
        for seed, cell in zip(arms[DEMO]["seeds"], arms[DEMO]["cells"], strict=True):
            steps = {int(step): row[measure] * scale for step, row in cell["evaluated"].items()}
            (line,) = plot.plot([*steps], [*steps.values()], "o-", label=f"seed {seed}")
            if (kept := cell["kept"]) in steps:
                plot.plot(kept, steps[kept], "o", ms=10, mfc="none", color=line.get_color())
        plot.set(xlabel="step (circle: kept)", ylabel=label, ylim=0)
        plot.grid(alpha=0.3)
    sides[0].legend()
    figure.suptitle(
        "make demo: problems for decisions while training, answered greedily\n" + _credit(found),
        fontsize=8,
    )
    figure.savefig(PICTURE, dpi=110)

    figure, plot = pyplot.subplots(figsize=(8, 5.2), layout="constrained")
    told = arms["told"]
    points = {"base": told["base"], "base, told": told["trained"]}
    points |= {name: arms[name]["trained"] for name in (*ARMS, *TARGETS) if name in arms}
    for name, row in points.items():
        plot.plot(
            row["tokens_mean"], 100 * row["accuracy"], "s" if name.startswith("base") else "o"
        )
        plot.annotate(
            name, (row["tokens_mean"], 100 * row["accuracy"]), xytext=(5, 3),
            textcoords="offset points", fontsize=8,
        )  # fmt: skip
    plot.set(xlabel="tokens of a held-out answer", ylabel="right, %")
    plot.grid(alpha=0.3)
    figure.suptitle(_credit(found), fontsize=7)
    figure.savefig(PARETO, dpi=110)

    figure, plot = pyplot.subplots(figsize=(8, 4.2), layout="constrained")
    for name in ("frozen", "refresh 4", "live", "forward KL"):
        if name not in arms:
            continue
        runs = [[s["tokens"] for s in cell["steps"]] for cell in arms[name]["cells"]]
        line = [fmean(values) for values in zip(*runs, strict=True)]
        plot.plot(range(1, len(line) + 1), line, "o-", label=name)
    for step in range(4, found["steps"], 4):
        plot.axvline(step + 0.5, color="0.8", linestyle="--", zorder=0)
    plot.set(xlabel="step (dashed: refreshes of “refresh 4”)", ylabel="tokens of a rollout", ylim=0)
    plot.legend()
    plot.grid(alpha=0.3)
    figure.suptitle(_credit(found), fontsize=7)
    figure.savefig(STAIRCASE, dpi=110)
    pyplot.close("all")


def filled(page: str, found: dict[str, Any]) -> str:
    """Return the page with the tables in those places that it has."""
    for name, table in tables(found).items():
        place = re.compile(rf"(<!-- effect: {name} -->\n).*?(<!-- end: {name} -->)", re.DOTALL)
        page = place.sub(lambda m, t=table: f"{m[1]}{t}\n{m[2]}", page)
    return page


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="change the pages and plots")
    found = record.load(RECORD)
    if not parser.parse_args().write:
        for name, table in tables(found).items():
            print(f"== {name}\n\n{table}\n")
        return
    for page in PAGES:
        page.write_text(filled(page.read_text("utf-8"), found), "utf-8")
    draw(found)
    print(*("written:", *PAGES, PICTURE, PARETO, STAIRCASE), sep="\n")


if __name__ == "__main__":
    main()
