"""Which sampler `rollout.engine` names, built for a run."""

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
from opsdc.rollout.ranked import RankedSampler

if TYPE_CHECKING:
    from opsdc.rollout.vllm.sampler import Engine

# Long enough to touch every weight, short enough to cost nothing.
_PROBE_TOKENS = 64


def start_sampler(
    config: OPSDCConfig,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    probe_ids: Sequence[int],
    ranks: Ranks = ALONE,
) -> Sampler:
    """The sampler of a run. vLLM is imported, or its process started, only when it is asked for.

    `probe_ids`: a prompt, whose first tokens are the fixed sequence that proves each push.
    """
    if config.rollout.engine == "hf":
        sampler = HFSampler(model, tokenizer, seed=config.seed)
        return sampler if ranks.size == 1 else RankedSampler(sampler, ranks, computes_with=model)
    from opsdc.rollout.vllm.sampler import VLLMSampler

    engine = _start_engine(config, model, ranks)
    print(f"rollouts: {engine.description}", flush=True)
    proven = VLLMSampler(
        engine,
        seed=config.seed,
        eos_ids=eos_token_ids(unwrap(model), tokenizer),
        probe_ids=probe_ids[:_PROBE_TOKENS],
        dtype=getattr(torch, config.model.dtype),
        # Ranks that share a server must call their weights by one name.
        run=ranks.from_first(secrets.token_hex(8)),
    )
    each_its_own = ranks.size > 1 and config.rollout.engine == "vllm"
    return RankedSampler(proven, ranks) if each_its_own else proven


def _start_engine(config: OPSDCConfig, model: Any, ranks: Ranks) -> Engine:
    from opsdc.rollout.vllm.engine import VLLMEngine, engine_options

    base = unwrap(model)
    if config.rollout.engine == "vllm":
        folder = Path(tempfile.mkdtemp(prefix="opsdc-vllm-"))
        options = engine_options(config, architecture(base), base.config, folder, sleeps=True)
        engine = VLLMEngine(options, ranks)
        weakref.finalize(engine, shutil.rmtree, folder, ignore_errors=True)
        return engine
    from opsdc.rollout.vllm.client import VLLMServer, connect
    from opsdc.rollout.vllm.ranked_client import SharedServer

    if ranks.size == 1:
        return connect(config, base)
    server: VLLMServer | None = None

    def start() -> None:
        nonlocal server
        server = connect(config, base)

    ranks.on_first_rank(start)
    return SharedServer(server, ranks)
