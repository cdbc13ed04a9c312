"""Answers to held-out problems: sampled, scored, kept as JSON lines."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from opsdc.config.settings import OPSDCConfig
from opsdc.data.prompted import Prompted
from opsdc.errors import DataError
from opsdc.eval.scorers import score
from opsdc.models.load import decode
from opsdc.record.lines import read_lines, write_text
from opsdc.rollout.base import Request, Sampler, SamplingParams

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
    answers = []
    answered = tqdm(pairs, desc=f"eval {label} scoring", leave=False, delay=2)
    for (item, i), rollout in zip(answered, rollouts, strict=True):
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
