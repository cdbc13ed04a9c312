"""Which sampler `rollout.engine` names, built for a run."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from opsdc.config import OPSDCConfig
from opsdc.distributed import ALONE, Ranks
from opsdc.errors import ConfigError
from opsdc.model import unwrap
from opsdc.rollout import Sampler
from opsdc.rollout.hf import HFSampler, eos_token_ids
from opsdc.rollout.ranks import RankedSampler

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
        return sampler if ranks.size == 1 else RankedSampler(sampler, model, ranks)
    if ranks.size > 1:
        raise ConfigError(
            f"rollout.engine {config.rollout.engine} runs with one trainer process; use hf"
        )
    from opsdc.rollout.vllm_local import VLLMEngine, engine_options
    from opsdc.rollout.vllm_sampler import Engine, VLLMSampler

    base = unwrap(model)
    engine: Engine
    if config.rollout.engine == "vllm":
        folder = Path(tempfile.mkdtemp(prefix="opsdc-vllm-"))
        options = engine_options(config, type(base).__name__, base.config, folder, sleeps=True)
        engine = VLLMEngine(options)
        weakref.finalize(engine, shutil.rmtree, folder, ignore_errors=True)
    else:
        from opsdc.rollout.vllm_server import connect

        engine = connect(config, base)
    print(f"rollouts: {engine.description}", flush=True)
    return VLLMSampler(
        engine,
        seed=config.seed,
        eos_ids=eos_token_ids(base, tokenizer),
        probe_ids=probe_ids[:_PROBE_TOKENS],
        dtype=getattr(torch, config.model.dtype),
    )
