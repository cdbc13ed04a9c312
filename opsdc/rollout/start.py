"""The sampler that `rollout.engine` names, built for a run."""

from __future__ import annotations

import secrets
import shutil
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedTokenizerBase

from opsdc.config.settings import OPSDCConfig
from opsdc.models.adapters import architecture, unwrap
from opsdc.ranks.talk import ALONE, Ranks
from opsdc.rollout.base import Sampler
from opsdc.rollout.hf import HFSampler, eos_token_ids
from opsdc.rollout.merge import check_merge
from opsdc.rollout.ranked import RankedSampler

if TYPE_CHECKING:
    from opsdc.rollout.vllm.sampler import Engine

_PROBE_TOKENS = 64
"""A probe of this many tokens reaches every weight and costs next to nothing."""


def start_sampler(
    config: OPSDCConfig,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    probe_ids: Sequence[int],
    ranks: Ranks = ALONE,
) -> Sampler:
    """Build the sampler of a run; vLLM is imported or started only where the settings ask for it.

    `probe_ids` is a prompt, whose first tokens are the fixed sequence that proves each push. Raises
    ConfigError where the engine cannot serve this run, ModelError where it cannot be given the
    model's adapter.
    """
    if config.rollout.engine == "hf":
        in_place = HFSampler(model, tokenizer, seed=config.seed)
        return in_place if ranks.size == 1 else RankedSampler(in_place, ranks, computes_with=model)
    from opsdc.rollout.vllm.sampler import VLLMSampler

    check_merge(model, probe_ids[:_PROBE_TOKENS])
    engine = _start_engine(config, model, ranks)
    print(f"rollouts: {engine.description}", flush=True)
    sampler = VLLMSampler(
        engine,
        seed=config.seed,
        eos_ids=eos_token_ids(unwrap(model), tokenizer),
        probe_ids=probe_ids[:_PROBE_TOKENS],
        dtype=getattr(torch, config.model.dtype),
        # Ranks that share a server must give their weights one name.
        run=ranks.from_first(secrets.token_hex(8)),
    )
    engine_per_rank = ranks.size > 1 and config.rollout.engine == "vllm"
    return RankedSampler(sampler, ranks) if engine_per_rank else sampler


def _start_engine(config: OPSDCConfig, model: Any, ranks: Ranks) -> Engine:
    """Start a vLLM engine in this process, or connect to its server."""
    from opsdc.rollout.vllm.engine import VLLMEngine, engine_options

    base = unwrap(model)
    if config.rollout.engine == "vllm":
        folder = Path(tempfile.mkdtemp(prefix="opsdc-vllm-"))
        options = engine_options(config, architecture(base), base.config, folder, sleeps=True)
        engine = VLLMEngine(options, ranks)
        weakref.finalize(engine, shutil.rmtree, folder, ignore_errors=True)
        return engine
    from opsdc.rollout.vllm.client import VLLMClient, connect
    from opsdc.rollout.vllm.ranked_client import RankedClient

    if ranks.size == 1:
        return connect(config, base)
    client: VLLMClient | None = None

    def start() -> None:
        nonlocal client
        client = connect(config, base)

    ranks.on_first_rank(start)
    return RankedClient(client, ranks)
