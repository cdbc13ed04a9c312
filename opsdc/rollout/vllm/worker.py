"""The loading of pushed weights inside vLLM's workers."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from opsdc.rollout.weights import read_weights


class WeightLoader:
    """Methods that vLLM mixes into its worker class, by `worker_extension_cls`."""

    model_runner: Any

    def opsdc_load(self, source: str | Iterable[tuple[str, torch.Tensor]]) -> int:
        """Replace every weight, by tensors or from a folder of them; return how many were replaced.

        vLLM itself only warns about missing weights, which keep their old values. It also keeps the
        packed copy of a tied head that its CPU kernels use. Raises ValueError for missing weights.
        """
        weights = read_weights(Path(source)) if isinstance(source, str) else source
        model = self.model_runner.get_model()
        expected = {name for name, _ in model.named_parameters()}
        loaded: set[str] = set()
        original = model.load_weights

        def load_weights(weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
            names = original(weights)
            loaded.update(names)
            return names

        model.load_weights = load_weights
        try:
            self.model_runner.reload_weights(weights_iterator=weights)
        finally:
            del model.load_weights
        missing = sorted(expected - loaded)
        if missing:
            raise ValueError(
                f"{len(missing)} weights of vLLM's model were not in the push, {missing[0]} for one"
            )
        _refresh_tied_heads(model)
        return len(loaded)


def _refresh_tied_heads(model: torch.nn.Module) -> None:
    """Pack tied heads again, whose packed copy vLLM's reload leaves as it was."""
    from vllm.model_executor.layers.vocab_parallel_embedding import (
        ParallelLMHead,
        UnquantizedEmbeddingMethod,
        VocabParallelEmbedding,
    )

    layers = [m for m in model.modules() if isinstance(m, VocabParallelEmbedding)]
    embeddings = {id(m.weight) for m in layers if not isinstance(m, ParallelLMHead)}
    for layer in layers:
        method = layer.quant_method
        if (
            isinstance(layer, ParallelLMHead)
            and id(layer.weight) in embeddings
            and isinstance(method, UnquantizedEmbeddingMethod)
        ):
            method.process_weights_after_loading(layer)
