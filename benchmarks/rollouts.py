"""Answers of the demo's model to the demo's problems: what every whole update is measured on."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from opsdc.config.settings import OPSDCConfig
from opsdc.data.prompted import prompted_sets
from opsdc.data.prompts import Messages, load_instruction
from opsdc.method.batch import Pair, token_batch
from opsdc.models.head import TokenBatch
from opsdc.models.load import load_model, load_tokenizer
from opsdc.rollout.base import Request, SamplingParams
from opsdc.rollout.hf import HFSampler

PROBLEMS, RESPONSE = 8, 64
ASKED = 20
"""Problems asked, of which those answered at full length are taken."""


@dataclass(frozen=True, slots=True)
class Rollouts:
    """Of one length, so that a mean over tokens and a mean over responses are the same loss, and no
    way of padding responses costs anyone anything."""

    messages: list[Messages]
    instruction: str
    pairs: list[Pair]

    def batch(self, side: str) -> TokenBatch:
        """All of them behind the `side`'s prompts, "student" or "teacher"."""
        return token_batch(
            [(getattr(pair, f"{side}_prompt_ids"), pair.response_ids) for pair in self.pairs],
            packed=False,
            pad_id=0,
            device=torch.device("cpu"),
        )


def sample() -> Rollouts:
    """The same on every call; takes about half a minute on two CPU cores."""
    config = OPSDCConfig.load("smollm2-cpu")
    tokenizer = load_tokenizer(config.model)
    problems, _ = prompted_sets(config, tokenizer)
    asked = problems.batch(1, ASKED)
    sampler = HFSampler(load_model(config.model), tokenizer, seed=0)
    answers = sampler.generate(
        [
            Request(key=f"benchmark-{i}", prompt_ids=item.prompts.student_ids)
            for i, item in enumerate(asked)
        ],
        SamplingParams(max_new_tokens=RESPONSE),
        label="answers",
    )
    full = [
        (item, answer)
        for item, answer in zip(asked, answers, strict=True)
        if len(answer.response_ids) == RESPONSE
    ][:PROBLEMS]
    assert len(full) == PROBLEMS, f"{len(full)} of {ASKED} answers have {RESPONSE} tokens"
    return Rollouts(
        messages=[item.problem.messages for item, _ in full],
        instruction=load_instruction(config.prompt.instruction),
        pairs=[
            Pair(
                student_prompt_ids=item.prompts.student_ids,
                teacher_prompt_ids=item.prompts.teacher_ids,
                response_ids=answer.response_ids,
            )
            for item, answer in full
        ],
    )
