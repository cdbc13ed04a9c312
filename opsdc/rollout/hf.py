"""Sampling with transformers' `generate` in the trainer's process: no second copy of weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from tqdm import tqdm
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation import GenerateDecoderOnlyOutput

from opsdc.models.adapters import unwrap
from opsdc.models.load import padding_id
from opsdc.ranks import stop
from opsdc.rollout.base import Request, Rollout, SamplingParams, stream_seed

_NAMES = {field.name for field in fields(GenerateDecoderOnlyOutput)}
_CACHE = "cache" if "cache" in _NAMES else "past_key_values"
"""What `generate` calls its cache, given and returned; versions of transformers differ."""


class HFSampler:
    """A sampler that uses the very module that is trained, so a push only moves the version.

    Noise is keyed by (seed, request key, position) and added to the logits of a greedy decode
    (the Gumbel-max trick), so a response does not depend on which others share its batch.

    Sampling computes in the dtype of the weights, also where the trainer's forward runs under
    autocast, because autocast would round the logits, which the loss keeps in float32. Mean and
    largest |Δ log p| from the loss's own logits with `model.dtype` bfloat16, over 144 tokens of a
    135M model, are 0.014 and 0.09 this way, 0.024 and 0.11 under autocast, and 0.014 and 0.12 with
    the head alone kept out of autocast.
    """

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase, *, seed: int) -> None:
        self._model = model
        self._seed = seed
        self._eos_ids = eos_token_ids(model, tokenizer)
        self._pad_id = padding_id(model, tokenizer)
        self._version = -1

    def push(self, model: torch.nn.Module, version: int) -> dict[str, float]:
        """Note the version; the weights are in the module already."""
        self._version = version
        return {}

    def close(self) -> None:
        """Do nothing, because the sampler holds nothing of its own."""

    def generate(
        self, requests: Sequence[Request], params: SamplingParams, *, label: str
    ) -> list[Rollout]:
        """Sample one response per request, in batches of `params.batch_size`."""
        was_training = self._model.training
        self._model.eval()
        # `generate` fills what a call leaves unset from the model folder's own generation config
        # (penalties, suppressed tokens): an empty one keeps them out.
        base = unwrap(self._model)
        saved_config, base.generation_config = base.generation_config, GenerationConfig()
        checkpointed = getattr(self._model, "is_gradient_checkpointing", False)
        rollouts: list[Rollout] = []
        # Prompts of similar length share a batch, which then needs less padding.
        order = sorted(range(len(requests)), key=lambda i: (-len(requests[i].prompt_ids), i))
        groups = [order[i : i + params.batch_size] for i in range(0, len(order), params.batch_size)]
        positions = len(groups) * params.max_new_tokens
        progress = tqdm(total=positions, desc=label, unit="position", leave=False, delay=2)
        try:
            if checkpointed:
                self._model.gradient_checkpointing_disable()
            # Layers compiled for training would be compiled again for a cache that grows.
            with torch.compiler.set_stance("force_eager"):
                for done, group in enumerate(groups):
                    rollouts += self._generate([requests[i] for i in group], params, progress)
                    # A batch ends early where all its responses do.
                    progress.update((done + 1) * params.max_new_tokens - progress.n)
        finally:
            progress.close()
            base.generation_config = saved_config
            if checkpointed:
                self._model.gradient_checkpointing_enable()
            self._model.train(was_training)
        by_position = dict(zip(order, rollouts, strict=True))
        return [by_position[i] for i in range(len(requests))]

    @torch.no_grad()
    def _generate(
        self, requests: Sequence[Request], params: SamplingParams, progress: tqdm
    ) -> list[Rollout]:
        """Sample one batch, in its order, with prompts padded on the left.

        The batch would run at its full width to its last straggler. So it is generated in stages:
        a stage ends when a quarter of its rows have, and the others go on from their part of the
        cache. Streams are keyed by request and position, so the same tokens come out.
        """
        device = unwrap(self._model).device
        longest = max(len(r.prompt_ids) for r in requests)
        ids = torch.full((len(requests), longest), self._pad_id, device=device)
        mask = torch.zeros_like(ids)
        for row, request in enumerate(requests):
            n = len(request.prompt_ids)
            ids[row, longest - n :] = torch.tensor(request.prompt_ids, device=device)
            mask[row, longest - n :] = 1
        streams = [
            torch.Generator(device).manual_seed(stream_seed(self._seed, r.key)) for r in requests
        ]
        sampled: list[list[int]] = [[] for _ in requests]
        logprobs: list[list[float]] = [[] for _ in requests]
        rows = list(range(len(requests)))
        cache, left = None, params.max_new_tokens
        while rows and left > 0:
            # It stands before all others, so that it sees the model's own logits.
            chosen = _ChosenLogprobs()
            processors = LogitsProcessorList([chosen])
            if params.temperature > 0:
                processors.append(TemperatureLogitsWarper(float(params.temperature)))
                if params.top_k:
                    processors.append(TopKLogitsWarper(params.top_k))
                if params.top_p < 1:
                    processors.append(TopPLogitsWarper(params.top_p))
                processors.append(_GumbelNoise([streams[row] for row in rows]))
            processors.append(_Advance(progress))
            output = self._model.generate(
                input_ids=ids,
                attention_mask=mask,
                **{_CACHE: cache},
                generation_config=GenerationConfig(
                    do_sample=False,
                    max_new_tokens=left,
                    eos_token_id=self._eos_ids,
                    pad_token_id=self._pad_id,
                    use_cache=True,
                    return_dict_in_generate=True,
                ),
                logits_processor=processors,
                stopping_criteria=StoppingCriteriaList([_SomeEnded(self._eos_ids)]),
                # Ranks do not wait for each other, because each has all weights while it samples
                # (`opsdc.ranks.shard.gathered`).
                synced_gpus=False,
            )
            new = output.sequences[:, ids.shape[1] :]
            left -= new.shape[1]
            of_rows = chosen.finish(new[:, -1]).tolist()
            going_on = []
            for i, (row, tokens) in enumerate(zip(rows, new.tolist(), strict=True)):
                # Behind the first end-of-sequence token there is only padding.
                end = next((k for k, token in enumerate(tokens) if token in self._eos_ids), None)
                length = len(tokens) if end is None else end + 1
                sampled[row] += tokens[:length]
                logprobs[row] += of_rows[i][:length]
                if end is None:
                    going_on.append(i)
            rows = [rows[i] for i in going_on]
            select = torch.tensor(going_on, dtype=torch.int64, device=device)
            ids = output.sequences[select]
            mask = torch.cat([mask, torch.ones_like(new)], dim=1)[select]
            cache = output[_CACHE]
            if rows and left > 0:
                cache.batch_select_indices(select)
        return [self._rollout(*row) for row in zip(requests, sampled, logprobs, strict=True)]

    def _rollout(self, request: Request, sampled: list[int], logprobs: list[float]) -> Rollout:
        return Rollout(
            key=request.key,
            prompt_ids=request.prompt_ids,
            response_ids=sampled,
            finished=bool(sampled) and sampled[-1] in self._eos_ids,
            weights_version=self._version,
            logprobs=logprobs,
        )


def eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return every id that ends a response, by generation config, config or tokenizer."""
    ids: list[int] = []
    for value in (
        getattr(model.generation_config, "eos_token_id", None),
        getattr(model.config, "eos_token_id", None),
        tokenizer.eos_token_id,
    ):
        for token in value if isinstance(value, (list, tuple)) else [value]:
            if token is not None and token not in ids:
                ids.append(int(token))
    return ids


class _GumbelNoise(LogitsProcessor):
    """Noise that makes a greedy decode a sample, from one random stream per row.

    argmax(z − log E) with E ~ Exp(1) is a draw from softmax(z).
    """

    def __init__(self, streams: Sequence[torch.Generator]) -> None:
        self._streams = streams

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.Tensor:
        noise = torch.empty_like(scores, dtype=torch.float32)
        for row, stream in zip(noise, self._streams, strict=True):
            row.exponential_(generator=stream)
        return scores.float() - noise.log_()


class _ChosenLogprobs(LogitsProcessor):
    """The log-probabilities of the sampled tokens.

    A position's logits are held until the next position, whose input shows the token.
    """

    def __init__(self) -> None:
        self._logits: torch.Tensor | None = None
        self._logprobs: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.Tensor:
        if self._logits is not None:
            self._take(input_ids[:, -1])
        self._logits = scores
        return scores

    def finish(self, last: torch.Tensor) -> torch.Tensor:
        """Return all log-probabilities, [rows, positions]; `last` is the last position's tokens."""
        self._take(last)
        return torch.stack(self._logprobs, dim=1)

    def _take(self, tokens: torch.Tensor) -> None:
        assert self._logits is not None
        logits = self._logits.float()
        chosen = logits.gather(1, tokens[:, None])[:, 0]
        self._logprobs.append(chosen - logits.logsumexp(1))


class _SomeEnded(StoppingCriteria):
    """Ends a stage for all rows once a quarter of them, and one at least, have ended."""

    def __init__(self, eos_ids: Sequence[int]) -> None:
        self._eos_ids = eos_ids
        self._ended: torch.Tensor | None = None

    def __call__(
        self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any
    ) -> torch.Tensor:
        last = input_ids[:, -1]
        ended = torch.isin(last, torch.tensor(self._eos_ids, device=last.device))
        self._ended = ended if self._ended is None else self._ended | ended
        enough = int(self._ended.sum()) >= max(len(last) // 4, 1)
        return torch.full_like(ended, enough)


class _Advance(LogitsProcessor):
    """The progress bar's step at every position, where a run that must stop can also leave."""

    def __init__(self, progress: tqdm) -> None:
        self._progress = progress

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.Tensor:
        stop.check()
        self._progress.update()
        return scores
