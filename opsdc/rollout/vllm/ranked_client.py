"""One vLLM server for all ranks: the first rank asks it and shares the answers.

A server answers one batch after the other, and the whole step as one batch keeps it busier than a
share from every rank in turn.

Weights that are cut over the ranks are gathered, tensor by tensor, into files that the first rank
keeps until the next push. A server that is replaced in the middle of a batch gets them again from
there, while the other ranks wait for its answers.
"""

from __future__ import annotations

import dataclasses
import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path

from opsdc.ranks.talk import Ranks
from opsdc.rollout.vllm.client import VLLMClient
from opsdc.rollout.vllm.messages import Batch, SampleCall, Sampled
from opsdc.rollout.weights import Weights, write_weights


class RankedClient:
    """The first rank's `VLLMClient`, with methods that all ranks call in lockstep.

    Args:
        client: The client on the first rank; None on the others.
    """

    def __init__(self, client: VLLMClient | None, ranks: Ranks) -> None:
        self._client, self._ranks = client, ranks
        self._files: Path | None = None

    @property
    def description(self) -> str:
        """The server's place on the first rank; empty on the others."""
        return "" if self._client is None else f"{self._client.description}, for all ranks"

    def load(self, weights: Weights, weights_id: str, probe: Sequence[int]) -> list[float]:
        """Push the weights from the first rank; see `VLLMClient.load`."""
        gathered = self._gather(weights) if weights.is_sharded else weights

        def push() -> list[float]:
            assert self._client is not None
            return self._client.load(gathered, weights_id, probe)

        return self._ranks.on_first_rank(push)

    def sample(self, call: SampleCall) -> Batch:
        """Sample on the first rank and return the batch on all of them."""

        def ask() -> dict:
            assert self._client is not None
            return dataclasses.asdict(self._client.sample(call))

        fields = self._ranks.on_first_rank(ask)
        rows = [Sampled(**row) for row in fields.pop("rows")]
        return Batch(rows=rows, **fields)

    def close(self) -> None:
        """Remove gathered weights and end the server, if it is the run's own."""
        self._remove_files()
        if self._client is not None:
            self._client.close()

    def _gather(self, weights: Weights) -> Path:
        """Write all weights to files on the first rank and return their folder there."""
        self._remove_files()
        if self._client is None:
            # Reading is what gathers, so every rank must.
            for _ in weights:
                pass
            return Path()
        self._files = self._client.weights_dir / f"gathered-{secrets.token_hex(8)}"
        write_weights(weights, self._files)
        return self._files

    def _remove_files(self) -> None:
        if self._files is not None:
            shutil.rmtree(self._files, ignore_errors=True)
            self._files = None
