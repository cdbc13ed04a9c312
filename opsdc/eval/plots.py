"""The picture of a run from its record: divergence, length, entropy, accuracy, dial, trade-off."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opsdc.config.settings import OPSDCConfig
from opsdc.errors import ConfigError, DataError
from opsdc.eval.answers import headline, read_answers
from opsdc.record.lines import read_lines


def no_picture() -> str | None:
    """Say in a line why runs are not drawn here; None where they are."""
    if importlib.util.find_spec("matplotlib") is not None:
        return None
    return 'plot.png: not drawn, matplotlib is not installed: pip install "opsdc[plot]"'


def plot_run(run: Path, file: Path | None = None) -> Path:
    """Draw `run`/metrics.jsonl and `run`/eval as a PNG, with the teacher's refreshes marked.

    Returns the picture: `file`, by default `run`/plot.png. Raises DataError where the folder holds
    no record, ConfigError where matplotlib is missing.
    """
    rows, figure = _steps(run), _figure(7)
    from matplotlib.ticker import MaxNLocator

    steps = [row["step"] for row in rows]
    axes = figure.subplots(2, 3)
    (divergence, length, dial), (entropy, accuracy, trade) = axes

    def series(key: str) -> list[float]:
        return [float("nan") if row.get(key) is None else row[key] for row in rows]

    # Measures of training, one point a step.
    divergence.plot(steps, series("loss_nats"), "o-", ms=3, label="loss")
    divergence.plot(steps, series("kl_p90"), "-", lw=1, alpha=0.7, label="90th percentile")
    divergence.plot(steps, series("kl_p50"), "-", lw=1, alpha=0.7, label="median")
    divergence.set(title="KL(student‖teacher) per token", ylabel="nats", yscale="log")
    length.plot(steps, series("response_tokens_mean"), "o-", ms=3, label="training rollouts (mean)")
    length.set(title="Response length", ylabel="tokens")
    entropy.plot(steps, series("student_entropy"), "o-", ms=3, label="student")
    entropy.plot(steps, series("teacher_entropy"), "-", lw=1, label="teacher")
    entropy.set(title="Entropy per token", ylabel="nats", ylim=(0, None))
    if any("right_share" in row for row in rows):
        accuracy.plot(steps, series("right_share"), ".:", lw=0.8, label="training rollouts right")
    _draw_held_out(run, steps[-1], length, accuracy)
    length.set_ylim(bottom=0)
    _draw_trade_off(run, trade)
    dial.set_visible(any("dial" in row for row in rows))
    dial.plot(steps, series("dial"), "o-", ms=3, label="dial (weight of the instruction)")
    dial.plot(steps, series("relative_length"), "s--", ms=3, label="length ÷ plain length")
    dial.set(title="Dial", ylim=(0, None))
    target = _target(run)
    if target is not None:
        dial.axhline(1 - target, color="gray", ls=":", label=f"length asked for: {1 - target:.2f}")

    refreshes = _refreshes(rows)
    for axis in (divergence, length, dial, entropy, accuracy):
        for i, step in enumerate(refreshes):
            label = "teacher refresh" if i == 0 else None
            axis.axvline(step + 0.5, color="tab:red", lw=0.8, alpha=0.5, label=label)
        axis.set_xlabel("step")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axis in axes.flat:
        axis.grid(alpha=0.25)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    return _save(figure, file or run / "plot.png")


def plot_runs(runs: Sequence[Path], file: Path | None = None) -> Path:
    """Draw several runs over one another: loss, length and held-out accuracy over the steps.

    Returns the picture: `file`, by default overlay.png in the first run's folder. Raises as
    `plot_run`.
    """
    records, figure = {run: _steps(run) for run in runs}, _figure(4)
    loss, length, accuracy = figure.subplots(1, 3)
    loss.set(title="KL(student‖teacher) per token", ylabel="nats", yscale="log")
    length.set(title="Length: held-out (dots), training (line)", ylabel="tokens")
    accuracy.set(title="Held-out accuracy", ylabel="share", ylim=(-0.02, 1.02))
    for run, rows in records.items():
        steps = [row["step"] for row in rows]
        lost = [float("nan") if row["loss_nats"] is None else row["loss_nats"] for row in rows]
        (line,) = loss.plot(steps, lost, "-", label=str(run))
        colour = line.get_color()
        sampled = [row["response_tokens_mean"] or float("nan") for row in rows]
        length.plot(steps, sampled, "-", lw=1, alpha=0.6, color=colour)
        evaluated = _evaluations(run, steps[-1])
        at = [step for step, _ in evaluated]
        length.plot(at, [h["tokens_mean"] for _, h in evaluated], "o--", color=colour)
        shares = [float("nan") if h["accuracy"] is None else h["accuracy"] for _, h in evaluated]
        accuracy.plot(at, shares, "o--", color=colour)
    length.set_ylim(bottom=0)
    loss.legend(fontsize=8)
    for axis in (loss, length, accuracy):
        axis.set_xlabel("step")
        axis.grid(alpha=0.25)
    return _save(figure, file or runs[0] / "overlay.png")


def _steps(run: Path) -> list[dict[str, Any]]:
    rows = read_lines(run / "metrics.jsonl")
    if not rows:
        raise DataError(f"no steps in {run / 'metrics.jsonl'}: is {run} the folder of a run?")
    return rows


def _figure(height: float) -> Any:
    """Return an empty figure of its own, which leaves a notebook's backend and figures alone."""
    if missing := no_picture():
        raise ConfigError(missing)
    from matplotlib.figure import Figure

    return Figure(figsize=(16, height), layout="constrained")


def _save(figure: Any, file: Path) -> Path:
    try:
        figure.savefig(file, dpi=110)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot write the picture {file}: {error}") from error
    return file


def _draw_held_out(run: Path, last_step: int, length: Any, accuracy: Any) -> None:
    """Draw the held-out answers of the student over the steps, and of the told base as a line."""
    accuracy.set(title="Held-out problems", ylabel="share", ylim=(-0.02, 1.02))
    evaluated = _evaluations(run, last_step)
    if evaluated:
        at = [step for step, _ in evaluated]
        length.plot(at, [h["tokens_mean"] for _, h in evaluated], "s--", label="held-out (mean)")
        accuracy.plot(at, [h["truncated"] for _, h in evaluated], "s--", label="truncated")
        if all(h["accuracy"] is not None for _, h in evaluated):
            accuracy.plot(at, [h["accuracy"] for _, h in evaluated], "o-", label="accuracy")
    prompt_only = run / "eval" / "prompt_only.jsonl"
    if prompt_only.is_file():
        told = headline(read_answers(prompt_only))
        length.axhline(told["tokens_mean"], color="gray", ls=":", label="base, told to be concise")
        if told["accuracy"] is not None:
            accuracy.axhline(told["accuracy"], color="gray", ls=":", label="base, told: accuracy")


def _draw_trade_off(run: Path, axis: Any) -> None:
    """Draw accuracy over length of the evaluated steps, with the Pareto front and the kept step."""
    summary = run / "summary.json"
    rows = json.loads(summary.read_text("utf-8")).get("evaluated") if summary.is_file() else None
    axis.set_visible(bool(rows))
    if not rows:
        return
    axis.set(title="Evaluated steps", xlabel="mean tokens", ylabel="accuracy")
    axis.plot([r["tokens"] for r in rows], [r["accuracy"] for r in rows], "o", ms=4, color="gray")
    front = sorted((r["tokens"], r["accuracy"]) for r in rows if r["pareto"])
    axis.plot([x for x, _ in front], [y for _, y in front], "-", label="Pareto front")
    for row in rows:
        axis.annotate(
            str(row["step"]), (row["tokens"], row["accuracy"]), fontsize=8,
            textcoords="offset points", xytext=(4, 4),
        )  # fmt: skip
        if row["kept"]:
            axis.plot(row["tokens"], row["accuracy"], "*", ms=13, label=f"kept: {row['step']}")


def _target(run: Path) -> float | None:
    """Return the token reduction that the run was to hold, where its config is there."""
    config = run / "config.yaml"
    return OPSDCConfig.load(config).teacher.target if config.is_file() else None


def _refreshes(rows: list[dict[str, Any]]) -> list[int]:
    """List the steps after which the teacher was refreshed."""
    # An ema teacher changes at every step; only a jump over several steps is a refresh.
    before = 0
    steps = []
    for row in rows:
        if row["teacher_version"] - before > 1:
            steps.append(row["step"])
        before = row["teacher_version"]
    return steps


def _evaluations(run: Path, last_step: int) -> list[tuple[int, dict[str, Any]]]:
    """Return (step, headline) of each evaluation as the student, in order of the steps.

    The base stands at step 0 and the trained model at `last_step`.
    """
    headlines = {}
    for path in (run / "eval").glob("*.jsonl"):
        match = re.fullmatch(r"step-(\d+)", path.stem)
        step = {"base": 0, "trained": last_step}.get(path.stem, int(match[1]) if match else None)
        if step is not None:
            headlines[step] = headline(read_answers(path))
    return sorted(headlines.items())
