"""README tables and plots from the committed records.

    python -m benchmarks.tables              prints them
    python -m benchmarks.tables --write      into README.md and docs/plots/

README.md holds a pair of comments per record, `<!-- benchmarks: NAME -->` and `<!-- end: NAME -->`;
what stands between them is written here, and a test fails where the two disagree.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from benchmarks import plots, record
from benchmarks.scaling import Point, bytes_per_token, largest_tokens
from benchmarks.speed import MODES

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PLOTS = ROOT / "docs" / "plots"
OURS = "ours, chunked"


def render(found: dict[str, Any]) -> str:
    """Markdown of one record."""
    return "\n\n".join(
        [
            _speed(found),
            _accuracy(found),
            _scaling(found),
            *_steps(found),
            *_phases(found),
            _source(found),
        ]
    )


def _source(found: dict[str, Any]) -> str:
    environment = found["environment"]
    missing = "; ".join(f"{name}: {reason}" for name, reason in found["missing"].items())
    versions = ", ".join(f"{k} {v}" for k, v in environment["versions"].items() if v)
    lines = [
        f"`{environment['command'].strip()}` on {record.describe(environment)}.",
        f"{versions}.",
    ]
    if missing:
        lines.append(f"Not run: {missing}.")
    return " ".join(lines)


def _speed(found: dict[str, Any]) -> str:
    shape = found["shape"]
    by_mode = {(row["contender"], row["mode"]): row for row in found["speed"]}
    peaks = {(row["contender"], row["trainable"]): row for row in found["memory"]}
    ours = by_mode[OURS, MODES[0]]["units"]
    lines = [
        f"fp32, N {shape['tokens']}, D {shape['dim']}, V {shape['vocab_size']}; time in units of "
        "the bare head GEMM (median; 20th–80th percentile), peak memory beside inputs.",
        "",
        "| | trainable head | × ours | frozen head | forward only | peak MiB | frozen |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(row["contender"] for row in found["speed"]):
        cells = []
        for mode in MODES:
            row = by_mode.get((name, mode))
            cells.append(
                "–"
                if row is None
                else f"{row['units']:.2f} ({row['units_p20']:.2f}–{row['units_p80']:.2f})"
            )
        times = by_mode[name, MODES[0]]["units"] / ours
        cells.insert(1, f"{times:.2f}")
        cells += [
            f"{peaks[name, train]['peak_mib']:.0f}" if (name, train) in peaks else "–"
            for train in (True, False)
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    planned = [row for row in found["memory"] if row["predicted_mib"] is not None]
    for row in planned:
        head = "trainable" if row["trainable"] else "frozen"
        lines += [
            "" if row is planned[0] else None,
            f"{row['contender']}, {head} head: planned {row['predicted_mib']:.0f} MiB, measured "
            f"{row['peak_mib']:.0f}.",
        ]
    return "\n".join(line for line in lines if line is not None)


def _accuracy(found: dict[str, Any]) -> str:
    rows = found["accuracy"]
    lines = ["Relative error against float64, loss / dH / dW, one head for both models:", ""]
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        regimes = list(dict.fromkeys(row["regime"] for row in rows))
        lines += [
            f"| {dtype} | " + " | ".join(regimes) + " |",
            "|---|" + "---|" * len(regimes),
        ]
        for name in dict.fromkeys(row["contender"] for row in rows):
            cells = [
                " / ".join(
                    f"{row[key]:.0e}" for key in ("loss", "hidden_gradient", "weight_gradient")
                )
                for row in rows
                if (row["dtype"], row["contender"]) == (dtype, name)
            ]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines[:-1])


def _scaling(found: dict[str, Any]) -> str:
    points = [Point(**row) for row in found["scaling"]]
    shape = next(p for p in points if p.axis == "tokens")
    names = list(dict.fromkeys(p.contender for p in points))
    naive = bytes_per_token(points, "naive")
    lines = [
        f"Memory as tokens grow (D {shape.dim}, V {shape.vocab_size}; returned gradients left out) "
        "and the tokens whose loss fits, by the measured line:",
        "",
        "| | bytes per token | of naive's | tokens in 24 GiB |",
        "|---|---|---|---|",
    ]
    for name in names:
        slope = bytes_per_token(points, name)
        fits = largest_tokens(points, name, 24.0)
        lines.append(f"| {name} | {slope:,.0f} | {slope / naive:.1%} | {fits:,.0f} |")
    return "\n".join(lines)


def _steps(found: dict[str, Any]) -> list[str]:
    if "step" not in found:
        return []
    lines = [
        "One update of the demo model (full fine-tuning, 8 responses of 96 tokens), seconds by "
        "phase; peak memory that loss and backward add:",
        "",
        "| loss | teacher | forward | loss | backward | whole | loss's share | MiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in found["step"]:
        phases = [row[name] for name in ("teacher", "forward", "loss", "backward")]
        cells = [f"{x:.2f}" for x in (*phases, sum(phases))]
        cells += [f"{row['loss'] / sum(phases):.0%}", f"{row['peak_mib']:.0f}"]
        lines.append(f"| {row['contender']} | " + " | ".join(cells) + " |")
    return ["\n".join(lines)]


def _phases(found: dict[str, Any]) -> list[str]:
    if "phases" not in found:
        return []
    cells = [f"{row['name']} {row['units']:.2f}" for row in found["phases"]]
    return ["Where our time goes, in units: " + ", ".join(cells) + "."]


def between(text: str, name: str) -> str:
    """What README holds for a record."""
    return _found(text, name)[2].rstrip("\n")


def _found(text: str, name: str) -> re.Match[str]:
    match = _block(name).search(text)
    if match is None:
        raise ValueError(f"{README} has no place for {name}: <!-- benchmarks: {name} --> ... end")
    return match


def _block(name: str) -> re.Pattern[str]:
    return re.compile(rf"(<!-- benchmarks: {name} -->\n)(.*?)(<!-- end: {name} -->)", re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="change README.md and docs/plots/")
    write = parser.parse_args().write
    text = README.read_text("utf-8")
    for path in sorted(record.RECORDS.glob("*.json")):
        found = record.load(path)
        table = render(found)
        if not write:
            print(f"== {path.stem}\n\n{table}\n")
            continue
        place = _found(text, path.stem)
        text = text[: place.start(2)] + table + "\n" + text[place.end(2) :]
        for plot in plots.draw(found, PLOTS, path.stem):
            print(f"written: {plot}")
    if write:
        README.write_text(text, "utf-8")
        print(f"written: {README}")


if __name__ == "__main__":
    main()
