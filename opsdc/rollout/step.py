"""A step's responses: sampled by the student, put behind both prompts, measured for the record."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from opsdc.config.settings import OPSDCConfig, RolloutConfig
from opsdc.data.prompted import Prompted, PromptedSet
from opsdc.method.batch import Pair
from opsdc.method.measures import UpdateResult
from opsdc.models.load import decode, pieces
from opsdc.record.guard import repeated_share
from opsdc.record.lines import peak_mib
from opsdc.rollout.base import Request, Rollout, Sampler, SamplingParams, check_batch

_LOOKED_AT, _LONGEST_LOOK = 4, 1000
"""Responses of a step, and tokens of each, whose divergence is recorded token by token."""

PLAIN_PROBLEMS = 64
"""Problems whose plain response lengths are sampled before training with `teacher.target`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRollouts:
    """The responses of one step, each with its problem."""

    items: Sequence[Prompted]
    """The problem of each response."""
    rollouts: Sequence[Rollout]
    right: Sequence[bool] | None = None
    """Verdict on each response, where `data.train_on` asks for one: right, and ended by itself."""

    @property
    def is_finite(self) -> bool:
        """Return False where a response was sampled from logits that are no numbers."""
        return all(r.is_finite for r in self.rollouts)

    def lengths(self) -> list[tuple[str, int]]:
        """Return each response's problem and its length in tokens."""
        return [
            (item.problem.id, len(r.response_ids))
            for item, r in zip(self.items, self.rollouts, strict=True)
        ]

    def pairs(self, config: OPSDCConfig, dial: float) -> list[Pair]:
        """Put each response that is learned from behind the student's and the teacher's prompt.

        dial: The teacher's for this step; 0 for wrong responses with `data.train_on` dial.
        """
        return [
            Pair(
                student_prompt_ids=self.items[i].prompts.student_ids,
                teacher_prompt_ids=self.items[i].prompts.teacher_ids,
                against_prompt_ids=self.items[i].prompts.against_ids,
                response_ids=self.rollouts[i].response_ids[: config.train.max_train_tokens],
                dial=dial if self.right is None or self.right[i] else 0.0,
            )
            for i in self._learned_from(config)
        ]

    def _learned_from(self, config: OPSDCConfig) -> list[int]:
        """Return the places of the responses that the step learns from."""
        if self.right is None or config.data.train_on == "dial":
            return list(range(len(self.rollouts)))
        return [i for i, is_right in enumerate(self.right) if is_right]

    def measures(self, config: OPSDCConfig) -> dict[str, Any]:
        """Return the record's values about the responses."""
        lengths = [n for _, n in self.lengths() if n]
        limit, count = config.train.max_train_tokens, len(self.rollouts)
        cut = 0 if limit is None else sum(max(n - limit, 0) for n in lengths)
        repeated = sum(repeated_share(r.response_ids) for r in self.rollouts)
        right = {} if self.right is None else {"right_share": sum(self.right) / count}
        return {
            "response_tokens_mean": sum(lengths) / len(lengths) if lengths else None,
            "response_tokens_max": max(lengths, default=0),
            "truncated_share": sum(not r.finished for r in self.rollouts) / count,
            "cut_share": cut / max(sum(lengths), 1),
            "empty_share": 1 - len(lengths) / count,
            "repeated_share": repeated / count,
            **right,
        }

    def perf(self, seconds: dict[str, float], pushed: dict[str, float]) -> dict[str, float]:
        """Return the record's values about speed; no others may differ between equal runs."""
        tokens = sum(n for _, n in self.lengths())
        return {
            **{f"perf/seconds_{name}": round(value, 3) for name, value in seconds.items()},
            "perf/tokens_per_second": round(tokens / max(seconds["rollout"], 1e-9), 1),
            **{f"perf/{name}": value for name, value in pushed.items()},
            "perf/peak_mib": round(peak_mib(), 1),
        }

    def rows(self, step: int, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
        """Return the lines of rollouts.jsonl."""
        verdicts: list[dict[str, bool]] = [{} for _ in self.rollouts]
        if self.right is not None:
            verdicts = [{"right": right} for right in self.right]
        return [
            {
                "step": step,
                "key": r.key,
                "prompt_ids": list(r.prompt_ids),
                "response_ids": list(r.response_ids),
                "finished": r.finished,
                "weights_version": r.weights_version,
                "text": decode(tokenizer, r.response_ids),
                **verdict,
            }
            for r, verdict in zip(self.rollouts, verdicts, strict=True)
        ]

    def divergence_rows(
        self, step: int, tokenizer: PreTrainedTokenizerBase, config: OPSDCConfig, of: UpdateResult
    ) -> list[dict[str, Any]]:
        """Return the lines of divergence.jsonl: the first responses of the first and the last step.

        Each has its tokens as text, with the nats that the update `of` the step found at them.
        """
        if step not in (1, config.train.steps):
            return []
        scored = [i for i in self._learned_from(config) if self.rollouts[i].response_ids]
        rows = []
        for place, i in enumerate(scored[:_LOOKED_AT]):
            nats = of.divergence[torch.nonzero(of.owner == place).flatten()][:_LONGEST_LOOK]
            texts = pieces(tokenizer, self.rollouts[i].response_ids[: len(nats)])
            # JSON has no NaN.
            shown = [round(v, 4) if math.isfinite(v) else None for v in nats.tolist()]
            question = self.items[i].problem.messages[-1]["content"]
            tokens = [list(pair) for pair in zip(texts, shown, strict=True)]
            row = {"step": step, "key": self.rollouts[i].key, "question": question}
            rows.append({**row, "tokens": tokens})
        return rows


def sample_step(
    sampler: Sampler, batch: Sequence[Prompted], settings: RolloutConfig, step: int
) -> StepRollouts:
    """Sample `samples_per_prompt` responses to each problem of a step, by the student's prompt.

    Raises RolloutError unless they are answers to these problems by the weights before `step`.
    """
    items, requests = _requests(batch, settings, f"train/{step}")
    rollouts = sampler.generate(requests, _params(settings), label=f"step {step} rollouts")
    check_batch(requests, rollouts, step=step, max_staleness=settings.max_staleness)
    if keys := [r.key for r in rollouts if not r.is_finite]:
        more = f" and {len(keys) - 1} more" if keys[1:] else ""
        print(f"sampled from logits that are not finite: '{keys[0]}'{more}", file=sys.stderr)
    return StepRollouts(items=items, rollouts=rollouts)


def sample_lengths(
    sampler: Sampler, problems: PromptedSet, settings: RolloutConfig
) -> tuple[dict[str, float], dict[str, float]]:
    """Sample the first steps' problems, plain and told; mean tokens by problem, of both.

    Called before training, the first are the lengths that `teacher.target` is a share of.
    """
    size = settings.prompts_per_step
    batch: dict[str, Prompted] = {}
    for step in range(1, -(-min(PLAIN_PROBLEMS, len(problems)) // size) + 1):
        batch |= {item.problem.id: item for item in problems.batch(step, size)}

    def lengths(key: str, *, told: bool) -> dict[str, float]:
        items, requests = _requests(list(batch.values()), settings, key, told=told)
        rollouts = sampler.generate(requests, _params(settings), label=f"{key} lengths")
        found: dict[str, list[int]] = {}
        for item, rollout in zip(items, rollouts, strict=True):
            found.setdefault(item.problem.id, []).append(len(rollout.response_ids))
        return {problem: sum(n) / len(n) for problem, n in found.items()}

    return lengths("plain", told=False), lengths("told", told=True)


def _requests(
    batch: Sequence[Prompted], settings: RolloutConfig, key: str, *, told: bool = False
) -> tuple[list[Prompted], list[Request]]:
    """Return the problem and the request of each response, `samples_per_prompt` a problem."""
    asked = [(item, i) for item in batch for i in range(settings.samples_per_prompt)]
    requests = [
        Request(
            key=f"{key}/{item.problem.id}/{i}",
            prompt_ids=item.prompts.teacher_ids if told else item.prompts.student_ids,
        )
        for item, i in asked
    ]
    return [item for item, _ in asked], requests


def _params(settings: RolloutConfig) -> SamplingParams:
    return SamplingParams(
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        batch_size=settings.batch_size,
    )
