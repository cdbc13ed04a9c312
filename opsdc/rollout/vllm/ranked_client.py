"""One vLLM server for all ranks: the first speaks with it and tells the others what it said.

A server answers one batch after the other; the whole step as one batch keeps it busier than a share
from every rank in turn.

Weights that are cut over the ranks are gathered, tensor by tensor, into files that the first rank
keeps until the next push: a server that has to be replaced in the middle of a batch is given them
again, while the other ranks only wait for its answers.
"""

from __future__ import annotations

import dataclasses
import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path

from opsdc.ranks.talk import Ranks
from opsdc.rollout.base import SamplingParams
from opsdc.rollout.vllm.client import VLLMServer
from opsdc.rollout.vllm.messages import Batch, Sampled
from opsdc.rollout.weights import Weights, write_weights


class SharedServer:
    """`VLLMServer`'s methods, called by all ranks in lockstep.

    Args:
        server: on the first rank; None on the others.
    """

    def __init__(self, server: VLLMServer | None, ranks: Ranks) -> None:
        self._server, self._ranks = server, ranks
        self._files: Path | None = None

    @property
    def description(self) -> str:
        return "" if self._server is None else f"{self._server.description}, for all ranks"

    def load(self, weights: Weights, weights_id: str, probe: list[int]) -> list[float]:
        gathered = self._gather(weights) if weights.is_sharded else weights

        def push() -> list[float]:
            assert self._server is not None
            return self._server.load(gathered, weights_id, probe)

        return self._ranks.on_first_rank(push)

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        params: SamplingParams,
        eos_ids: Sequence[int],
        probe: list[int],
    ) -> Batch:
        def ask() -> dict:
            assert self._server is not None
            batch = self._server.sample(prompts, seeds, params, eos_ids, probe)
            return dataclasses.asdict(batch)

        fields = self._ranks.on_first_rank(ask)
        rows = [Sampled(**row) for row in fields.pop("rows")]
        return Batch(rows=rows, **fields)

    def close(self) -> None:
        self._forget()
        if self._server is not None:
            self._server.close()

    def _gather(self, weights: Weights) -> Path:
        """Files of all weights on the first rank, whose path alone means something there."""
        self._forget()
        if self._server is None:
            for _ in weights:
                pass
            return Path()
        self._files = self._server.weights_dir / f"gathered-{secrets.token_hex(8)}"
        write_weights(weights, self._files)
        return self._files

    def _forget(self) -> None:
        if self._files is not None:
            shutil.rmtree(self._files, ignore_errors=True)
            self._files = None
