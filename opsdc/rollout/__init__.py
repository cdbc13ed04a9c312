"""What every sampler takes and gives. A response is the ids that were sampled, never text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How to sample; nothing is taken from the model folder's generation config."""

    max_new_tokens: int
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 is off."""
    batch_size: int = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One response to sample."""

    key: str
    """Names the random stream: equal (seed, key) draw equal noise in any batch or process."""
    prompt_ids: Sequence[int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollout:
    """One sampled response."""

    key: str
    prompt_ids: Sequence[int]
    response_ids: Sequence[int]
    """As sampled, the end-of-sequence token included where the model emitted one."""
    finished: bool
    """Ended by an end-of-sequence token, not by the cap."""
    weights_version: int
    """Updates that the sampler's weights had seen."""


class Sampler(Protocol):
    """Generates with the newest weights it was given."""

    def generate(
        self, requests: Sequence[Request], params: SamplingParams, *, label: str
    ) -> list[Rollout]:
        """Sample one response per request, in the order of the requests."""

    def push(self, model: torch.nn.Module, version: int) -> None:
        """Take over the model's weights; every later rollout carries this version."""
