"""The step that is kept: the shortest answers that are not shown to be less often right."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opsdc.config.settings import OPSDCConfig
from opsdc.errors import ConfigError
from opsdc.eval.answers import Answer, read_answers
from opsdc.eval.arms import Arms, evaluated_steps
from opsdc.eval.compare import compare
from opsdc.ranks.files import load_weights, save_weights
from opsdc.ranks.talk import Ranks
from opsdc.record.lines import write_json, writing

_STEP = "opsdc_step.json"
"""File beside the kept weights that says which step they are of."""


_ENOUGH = 0.9
"""Steps that save this share of what the shortest saves count as equally short: more right answers
are worth it, and problems drawn anew would change as much."""


class BestStep:
    """Weights of the best evaluated step so far, under `best/`, for `train.keep_best`.

    Raises ConfigError where there are no problems with answers to choose by.
    """

    def __init__(self, arms: Arms, model: Any, config: OPSDCConfig, ranks: Ranks) -> None:
        self._arms, self._model, self._config, self._ranks = arms, model, config, ranks
        self._folder = Path(config.output_dir) / "best"
        if config.train.keep_best and not arms.can_validate:
            raise ConfigError(
                "train.keep_best true chooses by answers to problems that are not trained on, and "
                "there are none with an answer: set data.gate_size, or data.eval_size, and see "
                "that data.answer_column names the column of the answer"
            )

    def consider(self, step: int) -> None:
        """Keep the weights there are, if `step` was evaluated and is the best so far."""
        if not self._config.train.keep_best or not self._arms.was_validated(step):
            return
        if self._choose(step) == step:
            with writing(self._folder):
                save_weights(self._model, self._folder, self._ranks)
            self._ranks.on_first_rank(lambda: write_json(self._folder / _STEP, {"step": step}))

    def restore(self, last_step: int) -> int:
        """Evaluate the last step, put the best step's weights into the model, return that step."""
        if not self._config.train.keep_best:
            return last_step
        self._arms.validate(last_step)
        self.consider(last_step)
        step = self._choose(last_step)
        if step == last_step:
            return step
        if self._ranks.on_first_rank(self._stored) != step:
            # A guard rolled the run back to before the step whose weights are there.
            print(f"the weights of step {step}, the best, are gone: keeping the last", flush=True)
            return last_step
        load_weights(self._model, self._folder)
        self._arms.sampler.push(self._model, step)
        print(f"keeping step {step} of {last_step}, see evaluated in summary.json", flush=True)
        return step

    def _stored(self) -> int | None:
        path = self._folder / _STEP
        return json.loads(path.read_text("utf-8"))["step"] if path.is_file() else None

    def _choose(self, last_step: int) -> int:
        def choose() -> int:
            rows = candidates(self._arms.folder, self._arms.validation(0), self._config, last_step)
            return next(row["step"] for row in rows if row["kept"])

        return self._ranks.on_first_rank(choose)


def candidates(
    folder: Path, base: Sequence[Answer], config: OPSDCConfig, last_step: int | None = None
) -> list[dict[str, Any]]:
    """Return a row for each evaluated step: its answers against the base's, and the choice.

    A step is eligible where the lower end of the paired 95 % interval of its accuracy is not below
    −`train.best_margin`. Of the eligible steps that save nearly as many tokens as the one that
    saves the most, to `_ENOUGH`, the most accurate is kept; where none is eligible, the one with
    the highest lower end. `pareto` marks steps that none beats in both measures.
    """
    rows: list[dict[str, Any]] = []
    for step, path in evaluated_steps(folder).items():
        if last_step is not None and step > last_step:
            continue
        changed = read_answers(path)
        against = compare(base, changed, seed=config.seed)
        if "accuracy_difference_ci95" not in against:
            return []
        low = against["accuracy_difference_ci95"][0]
        rows.append({
            "step": step,
            "problems": against["problems"],
            "tokens": sum(a.tokens for a in changed) / len(changed),
            "accuracy": sum(bool(a.correct) for a in changed) / len(changed),
            "accuracy_difference_ci95": against["accuracy_difference_ci95"],
            "eligible": low >= -config.train.best_margin,
        })  # fmt: skip
    if not rows:
        return []
    eligible = [row for row in rows if row["eligible"]]
    if eligible:
        plain = sum(a.tokens for a in base) / len(base)
        most = max(plain - row["tokens"] for row in eligible)
        least = most - (1 - _ENOUGH) * abs(most)
        short = [row for row in eligible if plain - row["tokens"] >= least]
        kept = max(short, key=lambda row: (row["accuracy"], -row["tokens"]))
    else:
        kept = max(rows, key=lambda row: row["accuracy_difference_ci95"][0])
    for row in rows:
        row["kept"] = row is kept
        row["pareto"] = not any(
            other["tokens"] <= row["tokens"]
            and other["accuracy"] >= row["accuracy"]
            and (other["tokens"], other["accuracy"]) != (row["tokens"], row["accuracy"])
            for other in rows
        )
    return rows
