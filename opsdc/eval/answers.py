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
"""Quantiles of the answers' lengths that a headline holds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """One sampled answer to one held-out problem."""

    problem_id: str
    """The problem's own identifier."""
    sample: int
    """Number of the answer among those to its problem, from 0."""
    question: str
    """The last message of the problem, without any instruction."""
    gold: str | None
    """The right answer; None where the problem has none."""
    text: str
    """The response as text."""
    tokens: int
    """Number of tokens of the response, the end-of-sequence token included."""
    truncated: bool
    """True where the token limit cut the response."""
    correct: bool | None
    """The scorer's verdict; None where the problem has no answer to compare with."""
    extracted: str | None
    """The answer that the scorer read in the text; None where it read none, which is another thing
    than a wrong one."""


def answer(
    sampler: Sampler,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Prompted],
    config: OPSDCConfig,
    *,
    arm: str,
    label: str,
) -> list[Answer]:
    """Sample and score `eval.samples` answers to each problem.

    Args:
        config: Its `eval` section holds the limits of sampling and the scorer.
        arm: "student" for the plain prompt, "teacher" for the one with the instruction.
        label: Name of these answers in progress bars.

    Raises:
        RolloutError: The sampler gave no answer.
        ConfigError, DataError: The scorer cannot be used, see `scorers.score`.
    """
    settings = config.eval
    asked = [(p, i) for p in problems for i in range(settings.samples)]
    requests = [
        Request(
            key=f"eval/{p.problem.id}/{i}",
            prompt_ids=p.prompts.teacher_ids if arm == "teacher" else p.prompts.student_ids,
        )
        for p, i in asked
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
    progress = tqdm(asked, desc=f"eval {label} scoring", leave=False, delay=2)
    for (item, i), rollout in zip(progress, rollouts, strict=True):
        text = decode(tokenizer, rollout.response_ids)
        gold = item.problem.answer
        verdict = score(text, item.problem, settings.scorer) if gold is not None else None
        answers.append(
            Answer(
                problem_id=item.problem.id,
                sample=i,
                question=item.problem.messages[-1]["content"],
                gold=gold,
                text=text,
                tokens=len(rollout.response_ids),
                truncated=not rollout.finished,
                correct=None if verdict is None else verdict.correct,
                extracted=None if verdict is None else verdict.extracted,
            )
        )
    return answers


def write_answers(path: Path, answers: Sequence[Answer]) -> None:
    """Write answers as JSON lines; raises CheckpointError where that fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = (json.dumps(dataclasses.asdict(a), ensure_ascii=False) + "\n" for a in answers)
    write_text(path, "".join(rows))


def read_answers(path: Path) -> list[Answer]:
    """Read a file of `write_answers`; raises DataError where it holds none."""
    rows = read_lines(path)
    if not rows:
        raise DataError(f"no answers in {path}")
    return [Answer(**row) for row in rows]


def headline(answers: Sequence[Answer]) -> dict[str, float | None]:
    """Summarise one arm: lengths in tokens, and shares of truncated, right and unread answers.

    Accuracy and `no_answer_found` are None where no problem has an answer to compare with.
    """
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
    """Format the headline of some answers for the log."""
    line = headline(answers)
    accuracy = "no gold answers" if line["accuracy"] is None else f"accuracy {line['accuracy']:.3f}"
    return f"{line['tokens_mean']:.1f} tokens, truncated {line['truncated']:.3f}, {accuracy}"
