"""Log-log plots of a record: time with the roofline drawn, and memory, along each axis."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.record import describe
from benchmarks.scaling import Point

AXES = {"tokens": "tokens N", "vocab_size": "vocabulary V", "dim": "hidden size D"}
LETTERS = {"tokens": "N", "dim": "D", "vocab_size": "V"}
ROOFLINE_UNITS = 4


def draw(found: dict[str, Any], folder: Path, name: str) -> list[Path]:
    """Writes one PNG per axis of the scaling runs; returns their paths."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    points = [Point(**row) for row in found["scaling"]]
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for axis, label in AXES.items():
        line = [p for p in points if p.axis == axis]
        if len({getattr(p, axis) for p in line}) < 2:
            continue
        figure, (time, memory) = pyplot.subplots(1, 2, figsize=(10, 4.8), layout="constrained")
        for contender in dict.fromkeys(p.contender for p in line):
            own = sorted(
                (p for p in line if p.contender == contender), key=lambda p: getattr(p, axis)
            )
            sizes = [getattr(p, axis) for p in own]
            width = 2.5 if contender.startswith("ours") else 1.2
            time.plot(sizes, [p.seconds for p in own], "o-", label=contender, linewidth=width)
            memory.plot(sizes, [p.peak_mib for p in own], "o-", label=contender, linewidth=width)
        first = [p for p in line if p.contender == line[0].contender]
        time.plot(
            [getattr(p, axis) for p in first],
            [ROOFLINE_UNITS * p.gemm_seconds for p in first],
            "k--",
            label=f"roofline: {ROOFLINE_UNITS} bare GEMMs",
        )
        for plot, quantity in ((time, "loss and both gradients, s"), (memory, "peak memory, MiB")):
            plot.set(xscale="log", yscale="log", xlabel=label, ylabel=quantity)
            sizes = sorted({getattr(p, axis) for p in line})
            plot.set_xticks(sizes, [f"{size:,}" for size in sizes])
            plot.minorticks_off()
            plot.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
            plot.yaxis.set_major_formatter("{x:g}")
            plot.grid(alpha=0.3)
        lines, labels = time.get_legend_handles_labels()
        figure.legend(lines, labels, loc="outside lower center", ncols=3, fontsize=9)
        fixed = ", ".join(
            f"{name} {getattr(line[0], key)}" for key, name in LETTERS.items() if key != axis
        )
        figure.suptitle(f"{fixed}; {describe(found['environment'])}", fontsize=9)
        path = folder / f"{name}-{axis}.png"
        figure.savefig(path, dpi=110)
        pyplot.close(figure)
        written.append(path)
    return written
