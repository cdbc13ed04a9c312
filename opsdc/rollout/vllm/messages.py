"""Plain values that an engine takes and gives, here or over a socket."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from opsdc.rollout.base import SamplingParams


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineOptions:
    """The options that an engine is built from."""

    folder: str
    """The folder of the model's config.json; weights come by pushes alone."""
    dtype: str
    """The dtype that the engine computes in, by torch's name of it."""
    vocab_size: int
    max_model_len: int
    """The most tokens of a prompt and its response together."""
    max_num_seqs: int
    """The most responses that are sampled at once."""
    memory_share: float
    """The share of the device's memory, or of this machine's on a CPU, that the engine may take."""
    trust_remote_code: bool
    sleeps: bool
    """True where the engine leaves a GPU's memory to the trainer between batches."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleCall:
    """One batch to sample, and the probe to score with the same weights."""

    prompts: Sequence[Sequence[int]]
    seeds: Sequence[int]
    """The seed of each response's random stream, one for each prompt."""
    params: SamplingParams
    eos_ids: Sequence[int]
    probe: Sequence[int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampled:
    """One sampled response."""

    ids: Sequence[int]
    logprobs: Sequence[float]
    """The log-probabilities of `ids` at temperature 1, before top-p and top-k."""
    finished: bool
    """True where an end-of-sequence token ended it, not the limit of tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Responses, and the proof by which weights they were sampled."""

    weights_id: str
    """The name of the push that the engine's weights came by."""
    probe: Sequence[float]
    """The probe's log-probabilities under the weights that sampled `rows`."""
    rows: Sequence[Sampled]
