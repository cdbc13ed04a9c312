"""The contract of samplers, and how a step asks them, checks their answers and records them.

A response is the ids that were sampled, never text.
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import PreTrainedTokenizerBase

from opsdc.config.settings import OPSDCConfig, RolloutConfig
from opsdc.data.prompted import Prompted
from opsdc.errors import RolloutError
from opsdc.method.batch import Pair
from opsdc.models.load import decode
from opsdc.record.guard import repeated_share
from opsdc.record.lines import peak_mib


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


def sample_step(
    sampler: Sampler, batch: Sequence[Prompted], settings: RolloutConfig, step: int
) -> list[Rollout]:
    """Sample `samples_per_prompt` responses to each problem of a step, by the student's prompt.

    Raises RolloutError unless they are answers to these problems by the weights before `step`.
    """
    requests = [
        Request(key=f"train/{step}/{p.problem.id}/{i}", prompt_ids=p.prompts.student_ids)
        for p in batch
        for i in range(settings.samples_per_prompt)
    ]
    params = SamplingParams(
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        batch_size=settings.batch_size,
    )
    rollouts = sampler.generate(requests, params, label=f"step {step} rollouts")
    check_batch(requests, rollouts, step=step, max_staleness=settings.max_staleness)
    if keys := [r.key for r in rollouts if not r.is_finite]:
        more = f" and {len(keys) - 1} more" if keys[1:] else ""
        print(f"sampled from logits that are not finite: '{keys[0]}'{more}", file=sys.stderr)
    return rollouts


def as_pairs(
    batch: Sequence[Prompted], rollouts: Sequence[Rollout], config: OPSDCConfig
) -> list[Pair]:
    """Put each response behind the student's and behind the teacher's prompt."""
    repeated = [p for p in batch for _ in range(config.rollout.samples_per_prompt)]
    return [
        Pair(
            student_prompt_ids=p.prompts.student_ids,
            teacher_prompt_ids=p.prompts.teacher_ids,
            response_ids=r.response_ids[: config.train.max_train_tokens],
        )
        for p, r in zip(repeated, rollouts, strict=True)
    ]


def measures(rollouts: Sequence[Rollout], trained_tokens: int | None) -> dict[str, Any]:
    """Return the record's values about a step's responses.

    trained_tokens: `train.max_train_tokens`, behind which responses are not trained on.
    """
    lengths = [len(r.response_ids) for r in rollouts if r.response_ids]
    cut = 0 if trained_tokens is None else sum(max(n - trained_tokens, 0) for n in lengths)
    count = len(rollouts)
    return {
        "response_tokens_mean": sum(lengths) / len(lengths) if lengths else None,
        "response_tokens_max": max(lengths, default=0),
        "truncated_share": sum(not r.finished for r in rollouts) / count,
        "cut_share": cut / max(sum(lengths), 1),
        "empty_share": 1 - len(lengths) / count,
        "repeated_share": sum(repeated_share(r.response_ids) for r in rollouts) / count,
    }


def perf_row(
    rollouts: Sequence[Rollout], seconds: dict[str, float], pushed: dict[str, float]
) -> dict[str, float]:
    """Return the record's values about a step's speed; no others may differ between equal runs."""
    tokens = sum(len(r.response_ids) for r in rollouts)
    return {
        **{f"perf/seconds_{name}": round(value, 3) for name, value in seconds.items()},
        "perf/tokens_per_second": round(tokens / max(seconds["rollout"], 1e-9), 1),
        **{f"perf/{name}": value for name, value in pushed.items()},
        "perf/peak_mib": round(peak_mib(), 1),
    }


def response_row(step: int, rollout: Rollout, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return one line of rollouts.jsonl."""
    return {
        "step": step,
        "key": rollout.key,
        "prompt_ids": list(rollout.prompt_ids),
        "response_ids": list(rollout.response_ids),
        "finished": rollout.finished,
        "weights_version": rollout.weights_version,
        "text": decode(tokenizer, rollout.response_ids),
    }


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
