"""The page of a run, report.html: one file to send around, which asks the network for nothing."""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from opsdc.config.settings import OPSDCConfig
from opsdc.errors import ConfigError, DataError
from opsdc.eval.arms import summary_of_run
from opsdc.eval.cost import Rates, cost_rows, duration, seconds_by_phase
from opsdc.eval.curves import Series, draw
from opsdc.eval.figures import ARMS, FEWEST, TOO_FEW, p_value, percent, points
from opsdc.eval.shown import SCALE, looks, problems
from opsdc.record.lines import read_lines

_HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Characters that turn the direction of text around, or that no page may hold."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Run:
    """All that the page reads from a run's folder."""

    folder: Path
    config: OPSDCConfig
    rows: list[dict[str, Any]]
    summary: dict[str, Any]
    """The contents of summary.json; of a run that has not ended, what can be said so far."""
    ended: bool


def write_page(folder: Path, file: Path | None = None, rates: Rates | None = None) -> Path:
    """Write the page of a run and return its file, by default `folder`/report.html.

    Raises ConfigError where the folder is not a run's or the file cannot be written, DataError
    where a run that has not ended has answered nothing yet.
    """
    run = _read(folder)
    page = _template().render(**_contents(run, rates or Rates()))
    file = file or folder / "report.html"
    try:
        file.write_bytes(page.encode("utf-8", "replace"))
    except OSError as error:
        raise ConfigError(f"cannot write the page {file}: {error}") from error
    return file


def _read(folder: Path) -> _Run:
    if not (folder / "config.yaml").is_file():
        raise ConfigError(f"{folder} is not the folder of a run: it has no config.yaml")
    config, path = OPSDCConfig.load(folder / "config.yaml"), folder / "summary.json"
    if path.is_file():
        summary = json.loads(path.read_text("utf-8"))
    elif any((folder / "eval").glob("*.jsonl")):
        summary = summary_of_run(folder, config)
    else:
        raise DataError(
            f"{folder} has no evaluations yet: the run has not come to its first answers"
        )
    rows = read_lines(folder / "metrics.jsonl")
    return _Run(folder=folder, config=config, rows=rows, summary=summary, ended=path.is_file())


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        # Models write markup too.
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["plain"] = plain
    return environment.get_template("report.html.j2")


def plain(text: object) -> str:
    """Return a text with its control characters spelled out, so that none acts on the page."""
    return _HIDDEN.sub(lambda m: f"⟨U+{ord(m[0]):04X}⟩", str(text).replace("\r\n", "\n"))


def _contents(run: _Run, rates: Rates) -> dict[str, Any]:
    """Return the values of the template's names."""
    summary, config = run.summary, run.config
    seconds = summary.get("seconds")
    phases, whole = seconds_by_phase(run.rows, seconds)
    files = (run.folder / "eval").glob("*.jsonl")
    evaluated = sum(row["tokens"] for path in files for row in read_lines(path))
    versions = summary.get("versions", {})
    return {
        "name": run.folder.resolve().name,
        "date": config.prompt.date,
        "done": _done(run),
        "found": _found(summary),
        "instruction": config.prompt.instruction,
        "ended": run.ended,
        "tiles": _tiles(summary),
        "tables": _tables(summary),
        "answered": summary.get("base", {}).get("answers"),
        "charts": _charts(run),
        "validated_apart": bool(config.data.gate_size),
        "steps": _steps_table(summary),
        "problems": problems(run.folder),
        "looks": looks(run.folder, {row["step"]: row["loss_nats"] for row in run.rows}),
        "legend": SCALE,
        "cost": cost_rows(run.rows, config, seconds=seconds, evaluated=evaluated, rates=rates),
        "phases": [
            (name, duration(spent), round(100 * spent / max(whole, 1e-9), 1))
            for name, spent in phases
        ],
        "changed": _changed(config),
        "settings": (run.folder / "config.yaml").read_text("utf-8"),
        "versions": {name: value for name, value in versions.items() if value is not None},
        "model": {k: v for k, v in summary.get("model", {}).items() if v is not None},
    }


def _done(run: _Run) -> str:
    """Say in one sentence what was done."""
    name = run.config.model.name_or_path
    # Where somebody keeps the model is nobody's business whom the page is sent to.
    name = Path(name).name if Path(name).is_absolute() else name
    steps, config = len(run.rows), run.config
    responses = config.rollout.prompts_per_step * config.rollout.samples_per_prompt
    how = "all weights" if config.model.lora is None else "a LoRA adapter"
    return (
        f"{name} was trained for {steps} step{'s' * (steps != 1)} of {responses} responses ({how}) "
        "to answer by itself as it does when it is told to be concise, with its own told self as "
        "the teacher."
    )


def _found(summary: dict[str, Any]) -> str | None:
    """Say in one sentence what came of it; None where nothing was compared."""
    if "trained" not in summary:
        return None
    compared = summary["compared_with_base"]["trained"]
    few, change = compared["problems"] < FEWEST, compared["token_reduction"]
    low, high = map(percent, compared["token_reduction_ci95"])
    interval = TOO_FEW if few else f"95 % interval {low} … {high}"
    more = "fewer" if change >= 0 else "more"
    size = "" if change >= 0 else ", as a reduction"
    text = (
        f"On {compared['problems']} held-out problems it uses {percent(abs(change))} {more} tokens "
        f"({interval}{'' if few else size})"
    )
    if "accuracy_difference" in compared:
        interval = TOO_FEW
        if not few:
            interval = f"95 % interval {points(*compared['accuracy_difference_ci95'])}"
        text += f"; accuracy differs by {100 * compared['accuracy_difference']:+.1f} points"
        text += f" ({interval})"
    return text.replace(" %", "\N{NO-BREAK SPACE}%") + "."


def _tiles(summary: dict[str, Any]) -> list[dict[str, str]]:
    """Return the few numbers that stand large at the top."""
    if "trained" not in summary:
        return []
    base, told, trained = (summary[arm] for arm in ARMS)
    shorter = summary["compared_with_base"]["trained"]
    low, high = map(percent, shorter["token_reduction_ci95"])
    few = shorter["problems"] < FEWEST
    tiles = [
        {
            "name": "tokens per answer",
            "before": f"{base['tokens_mean']:.1f}",
            "after": f"{trained['tokens_mean']:.1f}",
            "note": f"told: {told['tokens_mean']:.1f}",
        },
        {
            "name": "right answers",
            "before": percent(base["accuracy"]),
            "after": percent(trained["accuracy"]),
            "note": f"told: {percent(told['accuracy'])}",
        },
        {
            "name": "token reduction",
            "before": "",
            "after": percent(shorter["token_reduction"]),
            "note": TOO_FEW if few else f"95 % interval {low} … {high}",
        },
    ]
    return [tile for tile in tiles if tile["after"] != "–"]


def _tables(summary: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the arms and their differences as text: sampled as set, and greedy where it is."""
    if "trained" not in summary:
        return []
    told = ("trained against told", summary["trained_compared_with_told"])
    tables = [{"title": "", "arms": _arms(summary), "differences": _differences(summary, told)}]
    if "greedy" in summary:
        greedy = summary["greedy"]
        title = "The same problems, answered greedily"
        tables.append({"title": title, "arms": _arms(greedy), "differences": _differences(greedy)})
    return tables


def _arms(summary: dict[str, Any]) -> list[list[str]]:
    return [
        [
            name,
            f"{arm['tokens_mean']:.1f}",
            f"{arm['tokens_p10']:.0f} / {arm['tokens_p50']:.0f} / {arm['tokens_p90']:.0f}",
            percent(arm["accuracy"]),
            percent(arm["truncated"]),
            percent(arm["no_answer_found"]),
        ]
        for name, arm in ((name, summary[key]) for key, name in ARMS.items())
    ]


def _differences(
    summary: dict[str, Any], *more: tuple[str, dict[str, Any]]
) -> list[dict[str, Any]]:
    """Return each comparison as text: tokens, accuracy, and which answers turned."""
    against_base = summary["compared_with_base"]
    compared = [
        ("told against base", against_base["prompt_only"]),
        ("trained against base", against_base["trained"]),
        *more,
    ]
    rows = []
    for name, found in compared:
        few, judged = found["problems"] < FEWEST, "accuracy_difference" in found
        low, high = map(percent, found["token_reduction_ci95"])
        row = {
            "name": name,
            "tokens": percent(found["token_reduction"]),
            "tokens_interval": TOO_FEW if few else f"{low} … {high}",
            "accuracy": f"{100 * found['accuracy_difference']:+.1f}" if judged else "–",
            "accuracy_interval": "",
            "turned": ["–"] * 4,
            "p": "–",
            "detectable": "–",
        }
        if judged:
            interval = TOO_FEW if few else points(*found["accuracy_difference_ci95"])
            row["accuracy_interval"] = interval
            row["turned"] = [str(found[k]) for k in ("kept", "lost", "gained", "still_wrong")]
            if not few:
                row["detectable"] = f"{100 * found['accuracy_detectable']:.1f}"
                p = found["mcnemar_p"]
                row["p"] = "–" if p is None else p_value(p).removeprefix("= ")
        rows.append(row)
    return rows


def _charts(run: _Run) -> list[dict[str, Any]]:
    """Draw length, accuracy and divergence over the steps."""
    rows, summary = run.rows, run.summary
    if not rows:
        return []
    kept = summary.get("kept_step")

    def validated(key: str) -> list[tuple[float, float | None]]:
        # Records of earlier versions have these values in the summary alone.
        others = {e["step"]: e.get(key.removesuffix("_mean")) for e in summary.get("evaluated", [])}
        later = [(r["step"], r.get(f"eval/{key}", others.get(r["step"]))) for r in rows]
        return [(0, rows[0].get(f"base/{key}")), *later]

    def trained_on(key: str) -> list[tuple[float, float | None]]:
        return [(row["step"], row.get(key)) for row in rows]

    def held_out(key: str) -> list[Series]:
        if "trained" not in summary:
            return []
        name = "held-out, base told to be concise"
        found = [Series(name=name, look="level", points=[(0, summary["prompt_only"][key])])]
        # Without validation problems of their own the curve itself is about the held-out ones.
        if run.config.data.gate_size:
            ends = [(0, summary["base"][key]), (kept or len(rows), summary["trained"][key])]
            found.append(Series(name="held-out, base and trained", look="apart", points=ends))
        return found

    name = "validation problems" if run.config.data.gate_size else "held-out problems"
    length = [
        Series(name="training responses", look="thin", points=trained_on("response_tokens_mean")),
        Series(name=name, look="main", points=validated("tokens_mean")),
        *held_out("tokens_mean"),
    ]
    right = [
        Series(name="training responses", look="thin", points=trained_on("right_share")),
        Series(name=name, look="main", points=validated("accuracy")),
        *held_out("accuracy"),
    ]
    divergence = [
        Series(name="90th percentile", look="thin", points=trained_on("kl_p90")),
        Series(name="loss", look="main", points=trained_on("loss_nats")),
    ]
    last = max(row["step"] for row in rows)
    charts = [
        draw("Tokens per response", length, last_step=last, kept=kept, show=_few_digits),
        draw(
            "Share of right answers", right, last_step=last, kept=kept, top=1.0,
            show=lambda share: f"{100 * share:.0f} %",
        ),
        draw(
            "Divergence from the teacher, nats per token", divergence, last_step=last, kept=kept,
            show=_few_digits,
        ),
    ]  # fmt: skip
    return [chart for chart in charts if chart is not None]


def _few_digits(value: float) -> str:
    return f"{value:.3g}"


def _steps_table(summary: dict[str, Any]) -> list[list[str]]:
    return [
        [
            str(row["step"]),
            f"{row['tokens']:.1f}",
            percent(row["accuracy"]),
            TOO_FEW
            if row.get("problems", FEWEST) < FEWEST
            else points(*row["accuracy_difference_ci95"]),
            "yes" if row["pareto"] else "",
            "kept" if row["step"] == summary.get("kept_step") else "",
        ]
        for row in summary.get("evaluated", [])
    ]


def _changed(config: OPSDCConfig) -> list[tuple[str, str]]:
    """Return the settings that are not the defaults, by dotted name."""
    here, there = (_flat(dataclasses.asdict(c)) for c in (config, OPSDCConfig()))
    return [(name, str(value)) for name, value in here.items() if there.get(name) != value]


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        whole = isinstance(value, dict) and value
        flat |= _flat(value, f"{prefix}{key}.") if whole else {f"{prefix}{key}": value}
    return flat
