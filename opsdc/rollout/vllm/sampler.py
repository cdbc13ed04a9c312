"""The sampler over a vLLM engine, wherever that runs: random streams, versions, and their proof.

A probe proves a push: the engine scores a fixed sequence with its new weights, the trainer scores
it with its own, and the two must agree. Every batch is proven too: the engine scores the probe with
the weights that sampled the batch, and names the push that they came by.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

import torch

from opsdc.errors import RolloutError, WeightSyncError
from opsdc.ranks import stop
from opsdc.rollout.base import AGREEMENT, Request, Rollout, SamplingParams, difference, stream_seed
from opsdc.rollout.vllm.messages import Batch, SampleCall
from opsdc.rollout.weights import Weights, sequence_logprobs

_REPEAT = {torch.float32: 1e-5, torch.bfloat16: 0.1, torch.float16: 0.02}
"""An engine may differ by this |Δ log p| from its own earlier score of the probe, because sums may
run in another order."""


class Engine(Protocol):
    """The contract of an engine: `VLLMEngine` here, or a client of one in another process."""

    @property
    def description(self) -> str:
        """The engine's version and place, for the log."""

    def load(self, weights: Weights, weights_id: str, probe: Sequence[int]) -> list[float]:
        """Replace all weights and return the probe's log-probabilities under the new ones."""

    def sample(self, call: SampleCall) -> Batch:
        """Sample one response per prompt, then score the probe with the same weights."""

    def close(self) -> None:
        """Free processes and memory."""


class VLLMSampler:
    """A sampler that pushes weights to an engine and checks that each batch was sampled by them."""

    def __init__(
        self,
        engine: Engine,
        *,
        seed: int,
        eos_ids: Sequence[int],
        probe_ids: Sequence[int],
        dtype: torch.dtype,
        run: str,
    ) -> None:
        self._engine = engine
        self._seed = seed
        self._eos_ids = list(eos_ids)
        self._probe_ids = list(probe_ids)
        self._dtype = dtype
        # Runs that push to one server count the same versions, so a push is named by its run too.
        self._run = run
        self._weights_id: str | None = None
        self._version = -1
        self._probe: list[float] = []

    def push(self, model: torch.nn.Module, version: int) -> dict[str, float]:
        """Give the engine the model's weights and check by the probe that it has them.

        Raises WeightSyncError; nothing can then be sampled until a push works.
        """
        began = time.perf_counter()
        self._weights_id = None
        weights_id = f"{self._run}-{version}"
        # A stop waits here, because the updated model belongs to a step that is not recorded yet.
        with stop.held_back():
            probe = self._engine.load(Weights(model, self._dtype), weights_id, self._probe_ids)
        expected = sequence_logprobs(model, self._probe_ids, self._dtype)
        mean, largest = difference(probe, expected)
        limits = AGREEMENT[self._dtype]
        if not (mean <= limits[0] and largest <= limits[1]):
            raise WeightSyncError(
                f"after the push of weights version {version} vLLM and the trainer differ by "
                f"{mean:.1e} nats on average and {largest:.1e} at most on a probe of "
                f"{len(expected)} tokens (allowed: {limits[0]:.0e} and {limits[1]:.0e}): vLLM does "
                "not compute with these weights, or not this model"
            )
        self._weights_id, self._version, self._probe = weights_id, version, probe
        return {
            "seconds_push": round(time.perf_counter() - began, 3),
            "probe_mean_difference": mean,
            "probe_max_difference": largest,
        }

    def generate(
        self, requests: Sequence[Request], params: SamplingParams, *, label: str
    ) -> list[Rollout]:
        """Sample one response per request by the weights of the last push.

        Raises WeightSyncError where the engine has other weights, RolloutError for a short batch.
        """
        if self._weights_id is None:
            raise WeightSyncError("the sampler has no proven weights: push before generating")
        if not requests:
            return []
        batch = self._engine.sample(
            SampleCall(
                prompts=[r.prompt_ids for r in requests],
                seeds=[stream_seed(self._seed, r.key) for r in requests],
                params=params,
                eos_ids=self._eos_ids,
                probe=self._probe_ids,
            )
        )
        if batch.weights_id != self._weights_id:
            raise WeightSyncError(
                f"{label}: sampled by weights '{batch.weights_id}', not by version "
                f"{self._version} of this run"
            )
        _, largest = difference(batch.probe, self._probe)
        if not largest <= _REPEAT[self._dtype]:
            raise WeightSyncError(
                f"{label}: the probe's log-probabilities are {largest:.1e} away from those right "
                f"after the push of version {self._version}: the engine's weights have changed"
            )
        if len(batch.rows) != len(requests):
            raise RolloutError(f"{label}: {len(batch.rows)} answers to {len(requests)} requests")
        return [
            Rollout(
                key=request.key,
                prompt_ids=request.prompt_ids,
                response_ids=row.ids,
                finished=row.finished,
                weights_version=self._version,
                logprobs=row.logprobs,
            )
            for request, row in zip(requests, batch.rows, strict=True)
        ]

    def close(self) -> None:
        """Close the engine."""
        self._engine.close()
