"""Sampling by all ranks: each samples its share of the requests, all get all answers.

Noise is keyed by request, so the number of ranks does not change what is sampled.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from opsdc.ranks import shard
from opsdc.ranks.talk import Ranks
from opsdc.rollout.base import Request, Rollout, Sampler, SamplingParams


class RankedSampler:
    """A sampler on every rank, each for its share of the requests.

    Args:
        computes_with: The model, if the sampler computes with it; it is gathered while it samples.
    """

    def __init__(self, sampler: Sampler, ranks: Ranks, computes_with: Any = None) -> None:
        self._sampler, self._ranks, self._model = sampler, ranks, computes_with

    def push(self, model: torch.nn.Module, version: int) -> dict[str, float]:
        """Push on every rank and return the largest of each recorded value."""
        pushed = self._ranks.gather(self._sampler.push(model, version))
        return {key: max(values[key] for values in pushed) for key in pushed[0]}

    def close(self) -> None:
        """Close this rank's sampler."""
        self._sampler.close()

    def generate(
        self, requests: Sequence[Request], params: SamplingParams, *, label: str
    ) -> list[Rollout]:
        """Sample one response per request, on all ranks together; each returns all of them."""
        ranks = self._ranks
        # Prompts of similar length share a batch, so every rank gets some of each length.
        order = sorted(range(len(requests)), key=lambda i: (-len(requests[i].prompt_ids), i))
        share = order[ranks.rank :: ranks.size]

        def sample() -> list[dict[str, Any]]:
            if not share:
                return []
            sampled = self._sampler.generate([requests[i] for i in share], params, label=label)
            return [dataclasses.asdict(rollout) for rollout in sampled]

        with contextlib.ExitStack() as gathered:
            if self._model is not None:
                gathered.enter_context(shard.gathered(self._model))
            answers = ranks.on_each_rank(sample)
        rollouts: dict[int, Rollout] = {}
        for rank, sampled in enumerate(answers):
            for i, fields in zip(order[rank :: ranks.size], sampled, strict=True):
                rollouts[i] = Rollout(**fields)
        return [rollouts[i] for i in range(len(requests))]
