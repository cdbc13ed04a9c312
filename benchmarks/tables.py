"""Tables and plots of the docs from the committed records.

    python -m benchmarks.tables              prints them
    python -m benchmarks.tables --write      into README.md, docs/benchmarks.md and docs/plots/

docs/benchmarks.md holds a pair of comments per record, `<!-- benchmarks: NAME -->` and
`<!-- end: NAME -->`, and README.md one for the digest of the full record. What stands between them
is written here, and a test fails where the two disagree.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from benchmarks import plots, record
from benchmarks.clock import PHASES as CLOCKED
from benchmarks.gpu import report
from benchmarks.rollouts import PROBLEMS, RESPONSE
from benchmarks.scaling import (
    Point,
    bytes_per_token,
    forecast_error,
    largest_tokens,
    token_line,
)
from benchmarks.speed import MODES

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGE = ROOT / "docs" / "benchmarks.md"
PLOTS = ROOT / "docs" / "plots"
OURS = "ours, chunked"
DIGEST = "cpu-full"
"""Record that README shows a digest of."""
DIGEST_ROWS = (OURS, "naive", "Liger, chunked", "TRL, chunked", "unsloth")
"""Contenders of the digest; each at its best: compiled, where the record has it."""
DIGEST_ERRORS = (("float32", "training"), ("float32", "near"), ("bfloat16", "near"))
"""Inputs whose errors the digest shows."""


def render(found: dict[str, Any]) -> str:
    """Markdown of one record."""
    if is_gpu_day(found):
        return report.render(found)
    return "\n\n".join(
        [
            _speed(found),
            *_planned(found),
            *_phases(found),
            *_columns(found),
            _accuracy(found),
            *_states(found),
            *_steps(found),
            _scaling(found),
            _source(found),
        ]
    )


def is_gpu_day(found: dict[str, Any]) -> bool:
    """True for a record of `benchmarks.gpu_day`."""
    return found.get("kind") == report.KIND


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
    minutes = sum(found["seconds"].values()) / 60
    lines.append(f"The whole run took {minutes:.0f} minutes.")
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
        row = by_mode.get((name, MODES[0]))
        cells.insert(1, "–" if row is None else f"{row['units'] / ours:.2f}")
        cells += [
            f"{peaks[name, train]['peak_mib']:.0f}" if (name, train) in peaks else "–"
            for train in (True, False)
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _planned(found: dict[str, Any]) -> list[str]:
    """`opsdc_kernels.plan` beside what was measured."""
    memory = [
        f"{row['contender']}, {'trainable' if row['trainable'] else 'frozen'} head "
        f"{row['predicted_mib']:.0f} MiB (measured {row['peak_mib']:.0f})"
        for row in found["memory"]
        if row["predicted_mib"] is not None
    ]
    units = [
        f"{row['mode']} {row['planned']} GEMM units (counted {row['counted']:.2f})"
        for row in found.get("planned", [])
    ]
    return [f"Planned: {'; '.join(memory + units)}."] if memory + units else []


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
    naive = bytes_per_token(points, "naive")
    sizes = [p.tokens for p in token_line(points, OURS)]
    base = token_line(points, OURS)[-1]
    lines = [
        f"Peak MiB as tokens grow (D {base.dim}, V {base.vocab_size}); bytes per token between the "
        "last two sizes, returned gradients left out; tokens that fit into 24 GiB by that line, "
        "and how far the last size was from its forecast (the planner's for ours, for others the "
        "line through the two sizes before):",
        "",
        "| | " + " | ".join(f"N {n:,}" for n in sizes) + " | bytes per token | of naive's | fit | "
        "forecast |",
        "|---|" + "---|" * (len(sizes) + 4),
    ]
    for name in dict.fromkeys(p.contender for p in points):
        peaks = {p.tokens: p.peak_mib for p in token_line(points, name)}
        cells = [f"{peaks[n]:,.0f}" if n in peaks else "–" for n in sizes]
        slope = bytes_per_token(points, name)
        fits = largest_tokens(points, name, 24.0)
        cells += [f"{slope:,.0f}", f"{slope / naive:.1%}", f"{fits:,.0f}"]
        cells.append(f"{forecast_error(points, name):+.1%}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    wide = [p for p in points if p.axis == "vocab_size"]
    if wide:
        sizes = sorted({p.vocab_size for p in wide})
        lines += [
            "",
            f"Units of the bare GEMM / peak MiB as the vocabulary grows (N {wide[0].tokens}, "
            f"D {wide[0].dim}):",
            "",
            "| | " + " | ".join(f"V {v:,}" for v in sizes) + " |",
            "|---|" + "---|" * len(sizes),
        ]
        for name in dict.fromkeys(p.contender for p in wide):
            own = {p.vocab_size: p for p in wide if p.contender == name}
            cells = [f"{own[v].units:.1f} / {own[v].peak_mib:,.0f}" if v in own else "–"
                     for v in sizes]  # fmt: skip
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _steps(found: dict[str, Any]) -> list[str]:
    if "step" not in found:
        return []
    lines = [
        f"One update of the demo's model on {PROBLEMS} of its own answers of {RESPONSE} tokens "
        "(full fine-tuning): seconds by phase; peak memory of the whole update; errors against "
        "float64 of dH on given hidden states (loss only), and of all parameter gradients (end to "
        "end, the fp32 backbone's rounding included):",
        "",
        "| | " + " | ".join(CLOCKED) + " | whole | loss's share | MiB | loss only | end to end |",
        "|---|" + "---|" * (len(CLOCKED) + 5),
    ]
    for row in found["step"]:
        spent = [row[name] for name in CLOCKED]
        cells = [f"{x:.2f}" for x in (*spent, sum(spent))]
        cells += [f"{row['loss'] / sum(spent):.0%}", f"{row['peak_mib']:,.0f}"]
        cells += [f"{row[name]:.0e}" for name in ("loss_error", "update_error")]
        lines.append(f"| {row['way']} | " + " | ".join(cells) + " |")
    return ["\n".join(lines)]


def _states(found: dict[str, Any]) -> list[str]:
    if "states" not in found:
        return []
    lines = [
        "Relative errors on hidden states of the demo's model; the last line is what a bf16 "
        "backbone adds before any loss:",
        "",
        "| | loss | dH | dW |",
        "|---|---|---|---|",
    ]
    for row in found["states"]:
        errors = (row[name] for name in ("loss", "hidden_gradient", "weight_gradient"))
        lines.append(f"| {row['what']} | " + " | ".join(f"{x:.0e}" for x in errors) + " |")
    return ["\n".join(lines)]


def _phases(found: dict[str, Any]) -> list[str]:
    if "phases" not in found:
        return []
    cells = [f"{row['name']} {row['units']:.2f}" for row in found["phases"]]
    return ["Where our time goes, in units: " + ", ".join(cells) + "."]


def _columns(found: dict[str, Any]) -> list[str]:
    if "columns" not in found:
        return []
    rows = found["columns"]
    ways = list(dict.fromkeys(row["what"] for row in rows))
    lines = [
        "Columns left out (`columns`, `skip_tolerance`), one head: units of the bare GEMM, in "
        "brackets the share of columns kept; largest true error over the tolerance:",
        "",
        "| | " + " | ".join(ways) + " |",
        "|---|" + "---|" * len(ways),
    ]
    for key in dict.fromkeys((row["tokens"], row["dim"], row["entropy"]) for row in rows):
        own = {r["what"]: r for r in rows if (r["tokens"], r["dim"], r["entropy"]) == key}
        cells = [_left_out(own[way]) if way in own else "–" for way in ways]
        lines.append(f"| N {key[0]:,}, D {key[1]:,}, {key[2]:.2f} nats | {' | '.join(cells)} |")
    return ["\n".join(lines)]


def _left_out(row: dict[str, Any]) -> str:
    left = row["left"]
    if left is None or row["what"] == "exact":
        return f"{row['units']:.2f}"
    if left["kept_share"] == 1 or left["hidden_bound"] == 0:
        return f"{row['units']:.2f} (all)"
    worst = max(left["hidden_error"], left["weight_error"]) / float(row["what"].split()[1])
    return f"{row['units']:.2f} ({left['kept_share']:.1%}; {worst:.0e})"


def digest(found: dict[str, Any]) -> str:
    """Five rows of a record: time, memory and errors."""
    shape = found["shape"]
    speed = {r["contender"]: r for r in found["speed"] if r["mode"] == MODES[0]}
    peaks = {row["contender"]: row["peak_mib"] for row in found["memory"] if row["trainable"]}
    errors = {
        (r["contender"], (r["dtype"], r["regime"])): r["hidden_gradient"] for r in found["accuracy"]
    }
    lines = [
        f"N {shape['tokens']:,} tokens, D {shape['dim']}, V {shape['vocab_size']:,}, fp32, "
        "trainable head; time in units of the bare head GEMM; relative error of dH against "
        "float64:",
        "",
        "| | time | × ours | peak MiB | "
        + " | ".join(f"error, {regime}, {dtype}" for dtype, regime in DIGEST_ERRORS)
        + " |",
        "|---|" + "---|" * (3 + len(DIGEST_ERRORS)),
    ]
    for name in DIGEST_ROWS:
        best = f"{name}, compiled" if f"{name}, compiled" in speed else name
        units = speed[best]["units"]
        cells = [f"{units:.2f}", f"{units / speed[OURS]['units']:.2f}", f"{peaks[best]:,.0f}"]
        cells += [f"{errors[name, inputs]:.0e}" for inputs in DIGEST_ERRORS]
        lines.append(f"| {best} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", f"On {record.describe(found['environment'])}."])


def contents(name: str, found: dict[str, Any]) -> list[tuple[Path, str, str]]:
    """(file, name of its place, text) of everything that a record fills."""
    filled = [(PAGE, name, render(found))]
    return [*filled, (README, f"{name}, digest", digest(found))] if name == DIGEST else filled


def between(text: str, name: str) -> str:
    """What a page holds at the place of this name."""
    return _found(text, name)[2].rstrip("\n")


def _found(text: str, name: str) -> re.Match[str]:
    match = _block(name).search(text)
    if match is None:
        raise ValueError(f"no place for {name}: <!-- benchmarks: {name} --> ... end")
    return match


def _block(name: str) -> re.Pattern[str]:
    return re.compile(rf"(<!-- benchmarks: {name} -->\n)(.*?)(<!-- end: {name} -->)", re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="change the pages and docs/plots/")
    write = parser.parse_args().write
    for path in sorted(record.RECORDS.glob("*.json")):
        found = record.load(path)
        for page, name, table in contents(path.stem, found):
            if not write:
                print(f"== {name}\n\n{table}\n")
                continue
            text = page.read_text("utf-8")
            place = _found(text, name)
            text = text[: place.start(2)] + table + "\n" + text[place.end(2) :]
            page.write_text(text, "utf-8")
            print(f"written: {page}")
        draw = report.draw if is_gpu_day(found) else plots.draw
        for plot in draw(found, PLOTS, path.stem) if write else []:
            print(f"written: {plot}")


if __name__ == "__main__":
    main()
