"""What a GPU day has found, as tables, a plot and configurations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.gpu import tiles
from benchmarks.gpu.correctness import BACKENDS, DTYPES
from benchmarks.gpu.step import PHASES
from benchmarks.speed import MODES

KIND = "gpu-day"
"""Of the record: tells it from those of `python -m benchmarks`."""
NAME = "gpu-day"
BACKEND_TIMES = {"ours, chunked": "chunked_ms", "ours, fused": "fused_ms"}


def is_wrong(cell: dict[str, Any]) -> bool:
    """True for a cell that failed, or whose errors are over the budget."""
    return cell["error"] is not None or any(row.get("over_budget") for row in cell["rows"])


def line(row: dict[str, Any]) -> str:
    """What a row says, for the terminal."""
    if "over_budget" in row:
        wrong = "; ".join(row["over_budget"])
        errors = f"loss {row['loss']:.1e}, dH {row['hidden_gradient']:.1e}"
        return f"OVER BUDGET: {wrong}" if wrong else f"{errors}, dW {row['weight_gradient']:.1e}"
    if "of_roofline" in row:
        return (
            f"{1000 * row['seconds']:.1f} ms, {row['units']:.2f} units, {row['of_roofline']:.2f} "
            f"of the bare GEMMs, {row['teraflops']:.0f} TF/s, {row['peak_mib']:,.0f} MiB"
        )
    if "phase" in row:
        return f"{row['phase']} {row['seconds']:.2f} s, {row['peak_mib']:,.0f} MiB"
    if "teraflops" in row:
        what = f"{row['product']} " if "product" in row else ""
        return what + f"{1000 * row['seconds']:.1f} ms, {row['teraflops']:.0f} TF/s"
    return ""


def render(found: dict[str, Any]) -> str:
    """Markdown of the record."""
    rows = [row for cell in found["cells"] for row in cell["rows"]]
    parts = [
        _checks(found["cells"]),
        *_contests([row for row in rows if "of_roofline" in row]),
        *_products([row for row in rows if "product" in row]),
        *_tiles([row for row in rows if "kernel" in row]),
        *_step([row for row in rows if "phase" in row]),
        _wrong(found),
        _source(found),
    ]
    return "\n\n".join(part for part in parts if part)


def _table(head: list[str], lines: list[list[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _checks(cells: list[dict[str, Any]]) -> str:
    cells = [cell for cell in cells if cell["stage"] == "a"]
    lines = []
    for backend in BACKENDS:
        for dtype in DTYPES:
            name = f"{backend}, {dtype}, "
            own = [cell for cell in cells if cell["cell"].startswith(name)]
            if not own:
                continue
            rows = [row for cell in own for row in cell["rows"]]
            good = sum(not is_wrong(cell) for cell in own)
            worst = [
                f"{max(row[key] for row in rows):.0e}" if rows else "–"
                for key in ("loss", "hidden_gradient", "weight_gradient")
            ]
            lines.append([backend, dtype, f"{good} of {len(own)}", *worst])
    head = ["backend", "dtype", "within budget", "worst loss", "dH", "dW"]
    return "Errors against float64 on the device:\n\n" + _table(head, lines) if lines else ""


def _contests(rows: list[dict[str, Any]]) -> list[str]:
    found = []
    for key in dict.fromkeys((r["tokens"], r["dim"], r["vocab_size"]) for r in rows):
        at = [r for r in rows if (r["tokens"], r["dim"], r["vocab_size"]) == key]
        lines = []
        for mode in MODES:
            own = sorted((r for r in at if r["mode"] == mode), key=lambda r: r["seconds"])
            for row in own:
                errors = row["errors"] or {}
                lines.append([
                    row["contender"], mode, f"{1000 * row['seconds']:.1f}",
                    f"{1000 * row['forecast_seconds']:.1f}" if row["forecast_seconds"] else "–",
                    f"{row['units']:.2f} ({row['units_p20']:.2f}–{row['units_p80']:.2f})",
                    f"{row['of_roofline']:.2f}", f"{row['teraflops']:.0f}",
                    f"{row['peak_mib']:,.0f}",
                    " / ".join(f"{error:.0e}" for error in errors.values()) or "–",
                ])  # fmt: skip
        head = ["", "head", "ms", "forecast", "units", "of the bare GEMMs", "TF/s", "peak MiB",
                "error: loss / dH / dW"]  # fmt: skip
        title = f"N {key[0]:,}, D {key[1]:,}, V {key[2]:,}; each call between two bare GEMMs:"
        found.append(f"{title}\n\n{_table(head, lines)}")
    return found


def _products(rows: list[dict[str, Any]]) -> list[str]:
    if not rows:
        return []
    lines = [
        [f"N {r['tokens']:,}, D {r['dim']:,}, V {r['vocab_size']:,}", r["product"],
         f"{1000 * r['seconds']:.1f}", f"{r['teraflops']:.0f}"]
        for r in rows
    ]  # fmt: skip
    return ["Bare products:\n\n" + _table(["", "product", "ms", "TF/s"], lines)]


def _tiles(rows: list[dict[str, Any]]) -> list[str]:
    if not rows:
        return []
    lines = [
        [r["kernel"], "one" if r["shared"] else "two", " ".join(map(str, r["config"])),
         f"{1000 * r['seconds']:.1f}", f"{r['teraflops']:.0f}",
         f"{1000 * r['forecast_seconds']:.1f}" if r["forecast_seconds"] else "–"]
        for r in sorted(rows, key=lambda r: (r["kernel"], r["shared"], r["seconds"]))
    ]  # fmt: skip
    head = ["kernel", "heads", "configuration", "ms", "TF/s", "forecast ms"]
    return ["Tile configurations of `fused`, fastest first:\n\n" + _table(head, lines)]


def _step(rows: list[dict[str, Any]]) -> list[str]:
    if not rows:
        return []
    by_phase = {row["phase"]: row for row in rows}
    lines = [
        [phase, f"{row['seconds']:.2f}", f"{row['peak_mib']:,.0f}", f"{row['planned_mib']:,.0f}",
         f"{row['planned_mib'] / row['peak_mib'] - 1:+.0%}"]
        for phase in PHASES if (row := by_phase.get(phase))
    ]  # fmt: skip
    first = rows[0]
    title = f"One step, {first['tokens']:,} tokens, {first['response_tokens']:,} of them responses:"
    head = ["phase", "seconds", "peak MiB", "planned", "plan − measured"]
    return [f"{title}\n\n{_table(head, lines)}"]


def _wrong(found: dict[str, Any]) -> str:
    lines = []
    for cell in filter(is_wrong, found["cells"]):
        over = [wrong for row in cell["rows"] for wrong in row.get("over_budget", [])]
        lines.append(f"* {cell['cell']}: {cell['error'] or '; '.join(over)}".replace("\n", " "))
    lines += [f"* {name}: cut, no time was left" for name in found["cut"]]
    return "Wrong, failed or cut:\n\n" + "\n".join(lines) if lines else "No cell failed."


def _source(found: dict[str, Any]) -> str:
    environment = found["environment"]
    versions = ", ".join(f"{k} {v}" for k, v in environment["versions"].items() if v)
    seconds = " + ".join(f"{value:.0f}" for value in found["seconds"].values())
    said = [
        f"`{environment['command'].strip()}` on {record.describe(environment)}, "
        f"source {environment['source']}.",
        f"{versions}.",
        f"Seconds of the stages' cells: {seconds}.",
    ]
    if found["missing"]:
        lacking = ", ".join(found["missing"])
        said.append(f"Not installed: {lacking}; skipped for that: {len(found['skipped'])} cells.")
    if environment["rehearsal"]:
        said.append("A REHEARSAL on a CPU: no number here says anything about a GPU.")
    return " ".join(said)


def write(found: dict[str, Any], out: Path) -> list[Path]:
    """Write record, table, configurations and plot; returns their paths."""
    names = (f"{NAME}.json", f"{NAME}.md", "configs.txt", "measured.json")
    paths = [out / name for name in names]
    rows = [row for cell in found["cells"] for row in cell["rows"]]
    texts = (
        json.dumps(found, indent=1, ensure_ascii=False) + "\n",
        render(found) + "\n",
        tiles.winners([row for row in rows if "kernel" in row], found["environment"]["target"]),
        json.dumps(measured(found), indent=1) + "\n",
    )
    for path, text in zip(paths, texts, strict=True):
        path.write_text(text, "utf-8")
    return paths + draw(found, out, NAME)


def measured(found: dict[str, Any]) -> dict[str, Any]:
    """Both backends' milliseconds side by side, as `opsdc_kernels.auto` reads them."""
    environment = found["environment"]
    rows = [r for cell in found["cells"] for r in cell["rows"] if "of_roofline" in r]
    times: dict[tuple[Any, ...], dict[str, float]] = {}
    for row in rows:
        if row["contender"] in BACKEND_TIMES:
            key = row["tokens"], row["dim"], row["vocab_size"], row["mode"]
            name = BACKEND_TIMES[row["contender"]]
            times.setdefault(key, {})[name] = round(1000 * row["seconds"], 3)
    dtype = "float32" if environment["rehearsal"] else "bfloat16"
    names = ("tokens", "dim", "vocab_size", "mode")
    return {
        "device": environment["device"],
        "commit": environment["commit"],
        "rows": [
            {"target": environment["target"], "dtype": dtype,
             **dict(zip(names, key, strict=True)), **both}
            for key, both in times.items() if len(both) == len(BACKEND_TIMES)
        ],
    }  # fmt: skip


def draw(found: dict[str, Any], folder: Path, name: str) -> list[Path]:
    """Write a PNG: milliseconds per contender and shape, with the bare GEMMs as a line. None where
    matplotlib is missing or nothing was measured."""
    rows = [r for cell in found["cells"] for r in cell["rows"] if "of_roofline" in r]
    rows = [r for r in rows if r["mode"] != "forward only"]
    try:
        import matplotlib
    except ImportError:
        return []
    if not rows:
        return []
    matplotlib.use("Agg")
    from matplotlib import pyplot

    shapes = list(dict.fromkeys((r["tokens"], r["dim"], r["vocab_size"]) for r in rows))
    modes = [mode for mode in MODES if any(r["mode"] == mode for r in rows)]
    figure, axes = pyplot.subplots(
        len(shapes), len(modes), figsize=(6 * len(modes), 3.2 * len(shapes)), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for i, shape in enumerate(shapes):
        for j, mode in enumerate(modes):
            own = [r for r in rows if (r["tokens"], r["dim"], r["vocab_size"]) == shape]
            own = sorted((r for r in own if r["mode"] == mode), key=lambda r: -r["seconds"])
            plot = axes[i][j]
            plot.barh([r["contender"] for r in own], [1000 * r["seconds"] for r in own])
            if own:
                best = own[-1]
                floor = 1000 * best["seconds"] / best["of_roofline"]
                plot.axvline(floor, color="k", linestyle="--", label="the bare GEMMs")
                plot.legend(fontsize=8)
            plot.set_title(f"N {shape[0]}, D {shape[1]}, V {shape[2]}; {mode}", fontsize=9)
            plot.set_xlabel("ms")
    figure.suptitle(record.describe(found["environment"]), fontsize=9)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.png"
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return [path]
