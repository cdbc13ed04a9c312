"""vLLM in this process: ids in, ids and log-probabilities out, weights replaced in place."""

from __future__ import annotations

import contextlib
import copy
import gc
import math
import os
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from opsdc.config.settings import OPSDCConfig
from opsdc.errors import ConfigError
from opsdc.ranks import stop
from opsdc.ranks.talk import ALONE, Ranks
from opsdc.record.versions import check_vllm
from opsdc.rollout.vllm.messages import Batch, EngineOptions, SampleCall, Sampled

_REFUSED = ("VLLM_ALLOW_INSECURE_SERIALIZATION", "VLLM_SERVER_DEV_MODE")
"""Both variables open vLLM to code from outside, and nothing here needs them."""

_CPU_BLOCK = 128
"""vLLM's cache on a CPU consists of blocks of this many tokens."""


class VLLMEngine:
    """A vLLM engine in this process, which starts with random weights and samples after a push.

    Each of several ranks has its own engine and samples by itself. They must start together,
    because vLLM makes its process groups out of the run's.
    """

    def __init__(self, options: EngineOptions, ranks: Ranks = ALONE) -> None:
        refuse_environment()
        place = "in this process" if ranks.size == 1 else "in each of the ranks' processes"
        self.description = f"vLLM {check_vllm()} {place}"
        self.options = options
        self._weights_id = ""
        self._count = 0
        # Without a child process, so that tensors are handed over as they are.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        self._gpu = torch.cuda.is_available()
        memory: dict[str, Any] = {"gpu_memory_utilization": options.memory_share}
        if not self._gpu:
            memory = {"kv_cache_memory_bytes": _cpu_cache_bytes(options)}
        with _restoring_threads_and_generators():
            from vllm import LLM

            self._llm = LLM(
                model=options.folder,
                load_format="dummy",
                dtype=options.dtype,
                max_model_len=options.max_model_len,
                max_num_seqs=options.max_num_seqs,
                trust_remote_code=options.trust_remote_code,
                skip_tokenizer_init=True,
                # Nothing from the model's folder may change how responses are sampled.
                generation_config="vllm",
                # Log-probabilities of the model itself, before temperature, top-p and top-k.
                logprobs_mode="raw_logprobs",
                # A cache of prompts would outlive the weights that filled it.
                enable_prefix_caching=False,
                enforce_eager=not self._gpu,
                enable_sleep_mode=self._gpu and options.sleeps,
                worker_extension_cls="opsdc.rollout.vllm.worker.WeightLoader",
                disable_log_stats=True,
                seed=0,
                # The engine is one process, started by torchrun among others.
                distributed_executor_backend="external_launcher" if ranks.size > 1 else None,
                **memory,
            )

    def load(
        self,
        weights: Iterable[tuple[str, torch.Tensor]] | Path,
        weights_id: str,
        probe: Sequence[int],
    ) -> list[float]:
        """Replace all weights and return the probe's log-probabilities under the new ones.

        Weights are (name, tensor) or a folder of `write_weights`. Raises ValueError where some are
        missing.
        """
        # Weights that a failed load leaves behind must not pass for the old ones.
        self._weights_id = ""
        with self._awake():
            source = str(weights) if isinstance(weights, Path) else weights
            self._llm.collective_rpc("opsdc_load", args=(source,))
            self._weights_id = weights_id
            return self._score(probe)

    def sample(self, call: SampleCall) -> Batch:
        """Sample one response per prompt, then score the probe with the same weights."""
        import vllm

        params = call.params
        settings = [
            vllm.SamplingParams(
                n=1,
                temperature=params.temperature,
                top_p=params.top_p,
                top_k=params.top_k,
                min_p=0.0,
                presence_penalty=0.0,
                frequency_penalty=0.0,
                repetition_penalty=1.0,
                max_tokens=params.max_new_tokens,
                stop_token_ids=list(call.eos_ids),
                seed=seed,
                logprobs=0,
                detokenize=False,
            )
            for seed in call.seeds
        ]
        with self._awake(), _restoring_generators():
            weights_id = self._weights_id
            rows = [_sampled(output.outputs[0]) for output in self._run(call.prompts, settings)]
            return Batch(weights_id=weights_id, probe=self._score(call.probe), rows=rows)

    def close(self) -> None:
        """Free the memory and end every process group, because vLLM cannot end only its own.

        Ranks therefore call it last.
        """
        from vllm.distributed import cleanup_dist_env_and_memory

        self._llm.llm_engine.engine_core.shutdown()
        del self._llm
        gc.collect()
        cleanup_dist_env_and_memory()

    def _score(self, ids: Sequence[int]) -> list[float]:
        """Return log p(ids[i] | ids[:i]) for i ≥ 1 under the engine's weights."""
        import vllm

        params = vllm.SamplingParams(
            max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False
        )
        (output,) = self._run([ids], [params])
        return [
            entry[token].logprob
            for token, entry in zip(ids[1:], output.prompt_logprobs[1:], strict=True)
        ]

    def _run(self, prompts: Sequence[Sequence[int]], settings: Sequence[Any]) -> list[Any]:
        """Do what `LLM.generate` does, but leave between two tokens when a stop was asked for."""
        from vllm.sampling_params import RequestOutputKind

        engine = self._llm.llm_engine
        names = [f"{self._count + i}" for i in range(len(prompts))]
        self._count += len(prompts)
        rounds = math.ceil(len(prompts) / self.options.max_num_seqs)
        total = rounds * max(s.max_tokens for s in settings)
        label = f"vLLM, {len(prompts)} responses"
        progress = tqdm(total=total, desc=label, unit="position", leave=False, delay=2)
        done: dict[str, Any] = {}
        try:
            for name, ids, setting in zip(names, prompts, settings, strict=True):
                setting.output_kind = RequestOutputKind.FINAL_ONLY
                engine.add_request(name, {"prompt_token_ids": list(ids)}, setting)
            while engine.has_unfinished_requests():
                stop.check()
                done |= {output.request_id: output for output in engine.step()}
                progress.update()
        except BaseException:
            # Unfinished requests would run along with the next batch.
            engine.abort_request(names)
            raise
        finally:
            progress.close()
        return [done[name] for name in names]

    @contextlib.contextmanager
    def _awake(self) -> Iterator[None]:
        """Keep the engine's memory on the device within the block, if it sleeps otherwise."""
        if not (self._gpu and self.options.sleeps):
            yield
            return
        self._llm.wake_up()
        try:
            yield
        finally:
            # Level 1 keeps the weights in host memory.
            self._llm.sleep(level=1)


def _sampled(completion: Any) -> Sampled:
    """Convert vLLM's result of one response."""
    ids = list(completion.token_ids)
    return Sampled(
        ids=ids,
        logprobs=[e[i].logprob for i, e in zip(ids, completion.logprobs, strict=True)],
        finished=completion.finish_reason == "stop",
    )


def refuse_environment() -> None:
    """Raise ConfigError when a variable is set that opens vLLM to code from outside."""
    for name in _REFUSED:
        if os.environ.get(name, "0") not in ("", "0"):
            raise ConfigError(
                f"{name} is set, which lets others run code in vLLM's process; unset it: OPSDC "
                "does not need it"
            )


def engine_options(
    config: OPSDCConfig, architecture: str, model_config: Any, folder: Path, *, sleeps: bool
) -> EngineOptions:
    """Return the options of a run's engine, and write the model's config.json into `folder`.

    `architecture` is the name of the model's class, which a config does not always hold.
    """
    plain = copy.deepcopy(model_config)
    plain.architectures = [architecture]
    # Weights are pushed in the dtype of the computation, whatever the folder stores.
    if hasattr(plain, "quantization_config"):
        del plain.quantization_config
    plain.save_pretrained(folder)
    longest = config.prompt.max_tokens + max(
        config.rollout.max_new_tokens, config.eval.max_new_tokens
    )
    positions = getattr(plain.get_text_config(), "max_position_embeddings", longest)
    return EngineOptions(
        folder=str(folder),
        dtype=config.model.dtype,
        vocab_size=plain.get_text_config().vocab_size,
        max_model_len=min(longest, positions),
        max_num_seqs=max(config.rollout.batch_size, config.eval.batch_size),
        memory_share=config.rollout.memory_share,
        trust_remote_code=config.model.trust_remote_code,
        sleeps=sleeps,
    )


def _cpu_cache_bytes(options: EngineOptions) -> int:
    """Return the bytes of keys and values of `max_num_seqs` full sequences, or the memory share.

    The share is the limit. vLLM's own default would always take all of it.
    """
    import psutil
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(
        options.folder, trust_remote_code=options.trust_remote_code
    ).get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    item = getattr(torch, options.dtype).itemsize
    blocks = math.ceil(options.max_model_len / _CPU_BLOCK) * options.max_num_seqs + 1
    needed = blocks * _CPU_BLOCK * 2 * config.num_hidden_layers * heads * size * item
    return min(needed, int(options.memory_share * psutil.virtual_memory().total))


@contextlib.contextmanager
def _restoring_threads_and_generators() -> Iterator[None]:
    """Undo that vLLM's CPU worker disables torch.set_num_threads and seeds every generator."""
    set_num_threads, threads = torch.set_num_threads, torch.get_num_threads()
    with _restoring_generators():
        try:
            yield
        finally:
            torch.set_num_threads = set_num_threads
            torch.set_num_threads(threads)


@contextlib.contextmanager
def _restoring_generators() -> Iterator[None]:
    """Restore the random generators of torch, Python and numpy after the block."""
    with torch.random.fork_rng():
        python, numpy = random.getstate(), np.random.get_state()
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
