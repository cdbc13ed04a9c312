"""Sampling by all ranks: each its share of the requests, all get the answers to all of them.

Noise is keyed by request, so that the number of ranks does not change what is sampled.
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
    """A sampler on every rank, which only sees its share.

    Args:
        computes_with: the model, where the sampler computes with it: gathered while it samples.
    """

    def __init__(self, sampler: Sampler, ranks: Ranks, computes_with: Any = None) -> None:
        self._sampler, self._ranks, self._model = sampler, ranks, computes_with

    def push(self, model: torch.nn.Module, version: int) -> dict[str, float]:
        """As `Sampler.push`, with the worst of all ranks to record."""
        found = self._ranks.gather(self._sampler.push(model, version))
        return {key: max(each[key] for each in found) for key in found[0]}

    def close(self) -> None:
        self._sampler.close()

    def generate(
        self, requests: Sequence[Request], params: SamplingParams, *, label: str
    ) -> list[Rollout]:
        ranks = self._ranks
        # Prompts of like length share a batch, so every rank gets some of each length.
        order = sorted(range(len(requests)), key=lambda i: (-len(requests[i].prompt_ids), i))
        mine = order[ranks.rank :: ranks.size]

        def sample() -> list[dict[str, Any]]:
            if not mine:
                return []
            found = self._sampler.generate([requests[i] for i in mine], params, label=label)
            return [dataclasses.asdict(rollout) for rollout in found]

        with contextlib.ExitStack() as gathered:
            if self._model is not None:
                gathered.enter_context(shard.gathered(self._model))
            shares = ranks.on_each_rank(sample)
        rollouts: dict[int, Rollout] = {}
        for rank, share in enumerate(shares):
            for i, fields in zip(order[rank :: ranks.size], share, strict=True):
                rollouts[i] = Rollout(**fields)
        return [rollouts[i] for i in range(len(requests))]
