"""The card of a trained model: what it was made from and how, and what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData, try_to_load_from_cache

from opsdc.config.places import here
from opsdc.config.settings import OPSDCConfig
from opsdc.data.prompts import load_instruction
from opsdc.data.sources import is_on_hub
from opsdc.eval.figures import FEWEST, TOO_FEW, percent, points
from opsdc.models import demo_model

_TAGS = ["opsdc", "concise-reasoning", "self-distillation"]
_USE = """\
```python
from transformers import pipeline

ask = pipeline("text-generation", model="PATH OR NAME OF THIS MODEL")
ask([{"role": "user", "content": "What is 7 times 8?"}], max_new_tokens=256)
```"""


_ANSWERS_DECIDE = {
    "all": "There is no reward, and reference answers have no part in the loss.",
    "correct": "Only right answers were learned from, as reference answers tell.",
    "dial": "Wrong answers, as reference answers tell, pull back to the plain model.",
}
"""What `data.train_on` makes of reference answers."""


def write_card(folder: Path, config: OPSDCConfig, summary: dict[str, Any]) -> Path:
    """Write README.md into the `model` folder of a finished run, and return it.

    Its head has base, licence, tags and figures as the Hub reads them. The licence is that of the
    base, where the base's own card is on this machine; else it is left out. Folders of this machine
    are named by their last part: where they lie is nobody's business.
    """
    base, licence, is_known = _base(config)
    is_adapter = (folder / "model" / "adapter_config.json").is_file()
    name = f"{base.rpartition('/')[2]}-concise"
    results = _results(config, summary)
    head = ModelCardData(
        base_model=base if is_known else None,
        license=licence,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="text-generation",
        tags=[*_TAGS],
        datasets=[str(config.data.source)] if is_on_hub(config.data.source) else None,
        model_name=name if results else None,
        eval_results=results or None,
        ignore_metadata_errors=True,
    )
    body = "\n\n".join(_body(name, base, config, summary))
    card = ModelCard(f"---\n{head.to_yaml()}\n---\n\n{body}\n")
    card.save(folder / "model" / "README.md")
    return folder / "model" / "README.md"


def _base(config: OPSDCConfig) -> tuple[str, str | None, bool]:
    """Return the base's name, its licence if that can be read here, and whether the Hub has it."""
    name = config.model.name_or_path
    if name == demo_model.NAME:
        return demo_model.HUB_NAME, demo_model.LICENCE, True
    folder = here(name)
    is_known = not folder.is_dir()
    file = try_to_load_from_cache(name, "README.md") if is_known else folder / "README.md"
    licence = None
    if isinstance(file, (str, Path)) and Path(file).is_file():
        licence = ModelCard.load(file, ignore_metadata_errors=True).data.get("license")
    name = name if is_known else folder.resolve().name
    return name, licence if isinstance(licence, str) else None, is_known


def _source(config: OPSDCConfig) -> str:
    """Return the name of the problems' source: of files without the folders that they are in."""
    source = config.data.source
    names = [source] if isinstance(source, str) else source
    return ", ".join(n if is_on_hub(n) else n.rpartition("/")[2] for n in names)


def _results(config: OPSDCConfig, summary: dict[str, Any]) -> list[EvalResult]:
    """Return the measured figures in the Hub's form, none where nothing was evaluated."""
    trained = summary.get("trained")
    if trained is None:
        return []
    figures = {"accuracy": trained["accuracy"], "mean tokens of an answer": trained["tokens_mean"]}
    source = _source(config)
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=source if is_on_hub(config.data.source) else "held-out problems",
            dataset_name=f"{source}, held-out problems",
            metric_type=metric,
            metric_value=round(value, 4),
        )
        for metric, value in figures.items()
        if value is not None
    ]


def _body(name: str, base: str, config: OPSDCConfig, summary: dict[str, Any]) -> list[str]:
    """Return the paragraphs of the card."""
    steps = f"{summary['steps']} steps" + (
        f", of which step {summary['kept_step']} was kept" if summary.get("kept_step") else ""
    )
    teacher = config.teacher.model or "the same model"
    if here(teacher).is_dir():
        teacher = here(teacher).resolve().name
    paragraphs = [
        f"# {name}",
        f"{base}, taught to answer as if it had been told to be concise, by on-policy "
        "self-distillation (OPSDC, [arXiv 2603.05433](https://arxiv.org/abs/2603.05433)): the "
        f"model answers a problem, {teacher}, given the instruction below, scores those very "
        "tokens, and the reverse KL between the two is what is trained on. "
        + _ANSWERS_DECIDE[config.data.train_on],
        "The instruction, which is *not* needed any more:",
        "> " + " ".join(load_instruction(config.prompt.instruction).split()),
    ]
    if "trained" in summary:
        paragraphs += ["## What was measured", *_measured(summary)]
    rows = [
        ("problems", f"`{_source(config)}`"),
        ("trained", f"{steps}, {config.rollout.prompts_per_step} problems each"),
        ("longest response", f"{config.rollout.max_new_tokens} tokens"),
        ("learning rate", f"{config.optim.lr:g}, {config.optim.schedule}"),
        ("teacher", f"{config.teacher.mode}, dial {config.teacher.dial:g}"),
        ("versions", ", ".join(f"{k} {v}" for k, v in summary["versions"].items() if v)),
    ]
    table = "\n".join(f"| {key} | {value} |" for key, value in rows)
    paragraphs += ["## How it was made", f"| | |\n|---|---|\n{table}"]
    if config.model.lora is None:
        paragraphs += ["## Use", _USE]
    paragraphs += [
        "## Limits",
        "The figures hold for held-out problems of the same kind as the ones that were trained on. "
        "Whether other problems are answered as well was not measured unless it is said above. "
        f"What {base} gets wrong, says without being asked, or may not be used for, this model "
        "inherits.",
    ]
    return paragraphs


def _measured(summary: dict[str, Any]) -> list[str]:
    """Return the table of the three arms, and a sentence with intervals."""
    arms = (("base", "base"), ("base, told", "prompt_only"), ("this model", "trained"))

    rows = "\n".join(
        f"| {title} | {summary[key]['tokens_mean']:.1f} | {percent(summary[key]['accuracy'])} | "
        f"{percent(summary[key]['truncated'])} |"
        for title, key in arms
    )
    compared = summary["compared_with_base"]["trained"]
    few = compared["problems"] < FEWEST
    low, high = map(percent, compared["token_reduction_ci95"])
    interval = TOO_FEW if few else f"95 % interval {low} … {high}, paired over problems"
    text = (
        f"{compared['problems']} held-out problems, the same for all three. Tokens saved against "
        f"the base: {percent(compared['token_reduction'])} ({interval})."
    )
    if "accuracy_difference" in compared:
        interval = TOO_FEW if few else points(*compared["accuracy_difference_ci95"])
        text += (
            f" Right answers: {100 * compared['accuracy_difference']:+.1f} points ({interval}); "
            f"{compared['kept']} right in both, {compared['lost']} lost, {compared['gained']} "
            "gained."
        )
    return [f"| | mean tokens | right | cut off |\n|---|---|---|---|\n{rows}", text]
