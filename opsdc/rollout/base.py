"""The contract of samplers, and how a step asks them, checks their answers and records them.

A response is the ids that were sampled, never text.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from opsdc.errors import RolloutError


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """Settings of sampling; nothing is taken from the model folder's generation config."""

    max_new_tokens: int
    temperature: float = 1.0
    """Logits are divided by it; 0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """Only this many tokens may be sampled; 0 is all."""
    batch_size: int = 32
    """The hf engine samples this many responses at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """A request for one response."""

    key: str
    """The random stream's name: equal (seed, key) draw equal noise in any batch or process."""
    prompt_ids: Sequence[int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollout:
    """One sampled response."""

    key: str
    prompt_ids: Sequence[int]
    response_ids: Sequence[int]
    """The ids as sampled, with the end-of-sequence token where the model emitted one."""
    finished: bool
    """True where an end-of-sequence token ended it, not the limit of tokens."""
    weights_version: int
    """The number of updates that the sampler's weights had seen."""
    logprobs: Sequence[float] | None = None
    """The tokens' log-probabilities at temperature 1, without top-p and top-k, as the engine
    computed them. The trainer's own forward must reproduce them. None: not recorded."""

    @property
    def is_finite(self) -> bool:
        """False where the engine's logits were NaN or infinite, so the sample means nothing."""
        return all(map(math.isfinite, self.logprobs or ()))


AGREEMENT = {
    torch.float32: (3e-5, 3e-4),
    torch.bfloat16: (0.2, 4.0),
    torch.float16: (0.05, 1.0),
}
"""Trainer and sampler may differ by these (mean, largest) |Δ log p| on the same tokens.

Measured on a 135M model in float32, rounding alone takes 7e-6 and 5e-5; every weight moved by 1e-6,
the smallest step of a usual learning rate, 1e-4 and 7e-4. In 16 bits rounding hides one update, so
that these limits tell wrong weights there, but not old ones.
"""


def difference(a: Sequence[float], b: Sequence[float]) -> tuple[float, float]:
    """Return mean and largest |a − b|, both infinite for sequences of different lengths."""
    if len(a) != len(b):
        return float("inf"), float("inf")
    gaps = (torch.tensor(a, dtype=torch.float64) - torch.tensor(b, dtype=torch.float64)).abs()
    return float(gaps.mean()), float(gaps.max())


class Sampler(Protocol):
    """The contract of a sampler, which generates with the newest weights it was given.

    sampler.push(model, 0)
    for step in 1, 2, ...:
        rollouts = sampler.generate(...)      # each carries weights_version step - 1
        update(model, rollouts)
        sampler.push(model, step)             # WeightSyncError: no sampling until one works
    """

    def generate(
        self, requests: Sequence[Request], params: SamplingParams, *, label: str
    ) -> list[Rollout]:
        """Sample one response per request, in the order of the requests."""

    def push(self, model: torch.nn.Module, version: int) -> dict[str, float]:
        """Take over the model's weights; every later rollout carries this version.

        Returns the transfer's values for the record; raises WeightSyncError.
        """

    def close(self) -> None:
        """Free processes and memory; the sampler cannot be used afterwards."""


def stream_seed(seed: int, key: str) -> int:
    """Return the 63-bit seed of one response's random stream."""
    digest = hashlib.blake2b(f"{seed}/{key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def check_batch(
    requests: Sequence[Request], rollouts: Sequence[Rollout], *, step: int, max_staleness: int
) -> None:
    """Raise RolloutError unless these are the answers to `requests` by the weights before `step`.

    Step k is sampled by weights that have seen k − 1 updates, or up to `max_staleness` fewer.
    """
    if [r.key for r in requests] != [r.key for r in rollouts]:
        raise RolloutError(f"step {step}: the sampler answered other requests than it was given")
    for request, rollout in zip(requests, rollouts, strict=True):
        if list(request.prompt_ids) != list(rollout.prompt_ids):
            raise RolloutError(f"step {step}: '{request.key}' was sampled from another prompt")
        lag = step - 1 - rollout.weights_version
        if not 0 <= lag <= max_staleness:
            raise RolloutError(
                f"step {step} got a response from weights version {rollout.weights_version}, "
                f"{lag} updates old; rollout.max_staleness is {max_staleness}"
            )
