"""Answers of the base, prompt-only and trained model to the same held-out problems, compared.

All arms use one token cap, one seed and the same noise per problem (see `rollout.hf`), so
differences between arms are paired. Intervals are paired percentile bootstraps over problems.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from opsdc.config import OPSDCConfig
from opsdc.data.prompted import Prompted, prompted_sets
from opsdc.errors import DataError
from opsdc.eval.scorers import score
from opsdc.models.load import decode, load_model, load_tokenizer, load_trained
from opsdc.progress import Progress
from opsdc.record.lines import read_lines, write_json, write_text
from opsdc.record.versions import versions
from opsdc.rollout.base import Request, Sampler, SamplingParams
from opsdc.rollout.hf import HFSampler

_RESAMPLES = 10_000
_QUANTILES = (0.1, 0.5, 0.9)


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """One sampled answer to one held-out problem."""

    problem_id: str
    sample: int
    question: str
    gold: str | None
    text: str
    tokens: int
    """of the response, the end-of-sequence token included"""
    truncated: bool
    correct: bool | None
    """None where the problem has no answer to compare with"""
    extracted: str | None
    """what the scorer found in the text; None: nothing, which is not the same as wrong"""


def answer(
    sampler: Sampler,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Prompted],
    config: OPSDCConfig,
    *,
    arm: str,
    label: str,
) -> list[Answer]:
    """Sample `eval.samples` answers per problem; arm "teacher" puts the instruction in front."""
    settings = config.eval
    pairs = [(p, i) for p in problems for i in range(settings.samples)]
    requests = [
        Request(
            key=f"eval/{p.problem.id}/{i}",
            prompt_ids=p.prompts.teacher_ids if arm == "teacher" else p.prompts.student_ids,
        )
        for p, i in pairs
    ]
    params = SamplingParams(
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        top_k=settings.top_k,
        batch_size=settings.batch_size,
    )
    rollouts = sampler.generate(requests, params, label=f"eval {label}")
    progress = Progress(f"eval {label} scoring", total=len(pairs), unit="answer")
    answers = []
    for (item, i), rollout in zip(pairs, rollouts, strict=True):
        text = decode(tokenizer, rollout.response_ids)
        gold = item.problem.answer
        found = score(text, item.problem, settings.scorer) if gold is not None else None
        answers.append(
            Answer(
                problem_id=item.problem.id,
                sample=i,
                question=item.problem.messages[-1]["content"],
                gold=gold,
                text=text,
                tokens=len(rollout.response_ids),
                truncated=not rollout.finished,
                correct=None if found is None else found.correct,
                extracted=None if found is None else found.extracted,
            )
        )
        progress.advance()
    progress.close()
    return answers


def write_answers(path: Path, answers: Sequence[Answer]) -> None:
    """One JSON line per answer."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = (json.dumps(dataclasses.asdict(a), ensure_ascii=False) + "\n" for a in answers)
    write_text(path, "".join(rows))


def read_answers(path: Path) -> list[Answer]:
    """What `write_answers` wrote; raises DataError where there is nothing."""
    rows = read_lines(path)
    if not rows:
        raise DataError(f"no answers in {path}")
    return [Answer(**row) for row in rows]


def headline(answers: Sequence[Answer]) -> dict[str, float | None]:
    """Mean tokens, truncated share, accuracy and failed extractions of one arm."""
    tokens = np.array([a.tokens for a in answers], dtype=float)
    graded = [a for a in answers if a.correct is not None]
    return {
        "tokens_mean": round(float(tokens.mean()), 2),
        **{f"tokens_p{round(100 * q)}": float(np.quantile(tokens, q)) for q in _QUANTILES},
        "truncated": float(np.mean([a.truncated for a in answers])),
        "accuracy": float(np.mean([a.correct for a in graded])) if graded else None,
        "no_answer_found": (
            float(np.mean([a.extracted is None for a in graded])) if graded else None
        ),
        "answers": len(answers),
    }


def one_line(answers: Sequence[Answer]) -> str:
    """For the log: tokens, truncated, accuracy."""
    h = headline(answers)
    accuracy = "no gold answers" if h["accuracy"] is None else f"accuracy {h['accuracy']:.3f}"
    return f"{h['tokens_mean']:.1f} tokens, truncated {h['truncated']:.3f}, {accuracy}"


def compare(base: Sequence[Answer], other: Sequence[Answer], *, seed: int = 0) -> dict[str, Any]:
    """`other` against `base` on the same problems: differences with 95 % paired intervals.

    token_reduction is 1 − mean tokens of other / of base. `accuracy_detectable` is the smallest
    true difference in accuracy that a sample with this spread shows with 80 % power at 5 %.
    """
    b, o = _by_problem(base), _by_problem(other)
    if list(b) != list(o):
        raise DataError("the two sets of answers are not to the same problems")
    tokens = np.array([[b[i]["tokens"], o[i]["tokens"]] for i in b])
    truncated = np.array([[b[i]["truncated"], o[i]["truncated"]] for i in b])
    graded = [i for i in b if b[i]["accuracy"] is not None]
    accuracy = np.array([[b[i]["accuracy"], o[i]["accuracy"]] for i in graded])
    draws = np.random.default_rng(seed).integers(0, len(tokens), (_RESAMPLES, len(tokens)))

    def interval(values: np.ndarray) -> list[float]:
        return [round(float(v), 4) for v in np.quantile(values, (0.025, 0.975))]

    resampled = tokens[draws].mean(1)
    found: dict[str, Any] = {
        "problems": len(tokens),
        "token_reduction": round(1 - float(tokens[:, 1].mean() / tokens[:, 0].mean()), 4),
        "token_reduction_ci95": interval(1 - resampled[:, 1] / resampled[:, 0]),
        "truncated_difference": round(float((truncated[:, 1] - truncated[:, 0]).mean()), 4),
    }
    if len(graded) > 1:
        difference = accuracy[:, 1] - accuracy[:, 0]
        again = np.random.default_rng(seed).integers(0, len(graded), (_RESAMPLES, len(graded)))
        spread = float(difference.std(ddof=1)) / math.sqrt(len(graded))
        found |= {
            "accuracy_difference": round(float(difference.mean()), 4),
            "accuracy_difference_ci95": interval(difference[again].mean(1)),
            # 1.96 + 0.84 standard errors: two-sided 5 %, power 80 %.
            "accuracy_detectable": round(2.8 * spread, 4),
        }
    return found


def by_difficulty(
    base: Sequence[Answer], trained: Sequence[Answer], *, bins: int = 3
) -> dict[str, list[dict[str, Any]]]:
    """Compression and accuracy by how hard a problem is for the base model.

    Two scales: the base model's own pass rate on the problem, and the length of its answers in
    equally filled bins. The method's claim is that easy problems compress most. With one sample per
    problem the pass rate is 0 or 1, so that chance moves problems between its bins: accuracy falls
    in the upper one and rises in the lower even if nothing changed; set `eval.samples` to 4 or
    more to read it.
    """
    b, t = _by_problem(base), _by_problem(trained)

    def row(name: str, ids: Sequence[str]) -> dict[str, Any]:
        tokens = [float(np.mean([side[i]["tokens"] for i in ids])) for side in (b, t)]
        graded = [i for i in ids if b[i]["accuracy"] is not None]
        return {
            "bin": name,
            "problems": len(ids),
            "base_tokens": round(tokens[0], 1),
            "trained_tokens": round(tokens[1], 1),
            "token_reduction": round(1 - tokens[1] / tokens[0], 4),
            **{
                f"{name}_accuracy": float(np.mean([side[i]["accuracy"] for i in graded]))
                for name, side in (("base", b), ("trained", t))
                if graded
            },
        }

    found: dict[str, list[dict[str, Any]]] = {"pass_rate": [], "length": []}
    rates = sorted({b[i]["accuracy"] for i in b if b[i]["accuracy"] is not None}, reverse=True)
    edges = rates if len(rates) <= bins else [1.0, 0.5, 0.0]
    remaining = [i for i in b if b[i]["accuracy"] is not None]
    for low in edges:
        ids = [i for i in remaining if b[i]["accuracy"] >= low]
        remaining = [i for i in remaining if b[i]["accuracy"] < low]
        if ids:
            rates_here = [b[i]["accuracy"] for i in ids]
            found["pass_rate"].append(row(f"base pass rate {_range(rates_here, '.2f')}", ids))
    ranked = sorted(b, key=lambda i: (b[i]["tokens"], i))
    for part in np.array_split(np.array(ranked, dtype=object), min(bins, len(ranked))):
        ids = list(part)
        lengths_here = [b[i]["tokens"] for i in ids]
        found["length"].append(row(f"base length {_range(lengths_here, '.0f')}", ids))
    return found


def _range(values: Sequence[float], pattern: str) -> str:
    low, high = format(min(values), pattern), format(max(values), pattern)
    return low if low == high else f"{low}–{high}"


def summary_of_run(output_dir: Path, config: OPSDCConfig) -> dict[str, Any]:
    """base, prompt_only, trained and their comparison, from the answers a run left; {} if none."""
    folder = output_dir / "eval"
    names = ("base", "prompt_only", "trained")
    if not all((folder / f"{name}.jsonl").is_file() for name in names):
        return {}
    arms = {name: read_answers(folder / f"{name}.jsonl") for name in names}
    against_base = {
        name: compare(arms["base"], arms[name], seed=config.seed)
        for name in ("prompt_only", "trained")
    }
    return {
        **{name: headline(found) for name, found in arms.items()},
        "token_reduction": against_base["trained"]["token_reduction"],
        "compared_with_base": against_base,
        "by_difficulty": by_difficulty(arms["base"], arms["trained"]),
        "eval": dataclasses.asdict(config.eval),
    }


def evaluate_arms(config: OPSDCConfig, trained: str | Path) -> dict[str, Any]:
    """All three arms anew into `config.output_dir`; gives (and writes) the summary.

    Args:
        config: a run's; its `model.name_or_path` is the base.
        trained: folder of the trained model, or of an adapter on the base.
    """
    tokenizer = load_tokenizer(config.model)
    _, held_out = prompted_sets(config, tokenizer)
    size = len(held_out) if config.eval.problems is None else config.eval.problems
    problems = [held_out[i] for i in range(min(size, len(held_out)))]
    if not problems:
        raise DataError("no held-out problems: set data.eval_size and eval.problems above 0")
    folder = Path(config.output_dir)

    def run(model: Any, arms: dict[str, str]) -> None:
        sampler = HFSampler(model, tokenizer, seed=config.seed)
        sampler.push(model, 0)
        for name, arm in arms.items():
            answers = answer(sampler, tokenizer, problems, config, arm=arm, label=name)
            write_answers(folder / "eval" / f"{name}.jsonl", answers)
            print(f"eval {name}: {one_line(answers)}", flush=True)

    run(load_model(config.model), {"base": "student", "prompt_only": "teacher"})
    run(load_trained(config.model, trained), {"trained": "student"})
    summary = {
        "trained_folder": str(trained),
        "versions": versions(),
        **summary_of_run(folder, config),
    }
    write_json(folder / "summary.json", summary)
    return summary


def _by_problem(answers: Sequence[Answer]) -> dict[str, dict[str, Any]]:
    grouped: dict[str, list[Answer]] = {}
    for a in answers:
        grouped.setdefault(a.problem_id, []).append(a)
    return {
        i: {
            "tokens": float(np.mean([a.tokens for a in group])),
            "truncated": float(np.mean([a.truncated for a in group])),
            "accuracy": (
                None if group[0].correct is None else float(np.mean([a.correct for a in group]))
            ),
        }
        for i, group in grouped.items()
    }
