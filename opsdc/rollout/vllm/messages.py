"""Plain values that an engine is built from and gives back, here or over a socket."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineOptions:
    """What an engine is built from; plain values, so that they can be sent to another process."""

    folder: str
    """Holds the model's config.json; weights come by pushes alone."""
    dtype: str
    vocab_size: int
    max_model_len: int
    """Tokens of the longest prompt and response together."""
    max_num_seqs: int
    memory_share: float
    trust_remote_code: bool
    sleeps: bool
    """Frees the device's memory between batches (GPU), because a trainer needs it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampled:
    ids: Sequence[int]
    logprobs: Sequence[float]
    """Of `ids`, at temperature 1, before top-p and top-k."""
    finished: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Responses, and what proves by which weights they were sampled."""

    weights_id: str
    probe: Sequence[float]
    """Log-probabilities of the probe under the weights that sampled `rows`."""
    rows: Sequence[Sampled]
