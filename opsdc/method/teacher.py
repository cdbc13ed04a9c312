"""The teacher: the same module with an older copy of the trained parameters swapped in, or another.

Only parameters that are trained can differ between teacher and student, so only they are copied:
all of them in full fine-tuning, the adapter alone with LoRA. Scoring swaps the copies into the
module, which keeps the teacher in the student's dtype and on the student's attention path: the
same prompt on both sides then gives a divergence of exactly zero. Another model (`teacher.model`)
stands in a module of its own and never moves.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from opsdc.config.settings import TeacherConfig
from opsdc.errors import ConfigError
from opsdc.method.mixture import START, Mix, check_mixable
from opsdc.models.head import Head, TokenBatch, read_head
from opsdc.models.other import OtherModel


class Snapshot:
    """A copy of the trained parameters, to be swapped into the module that they are from.

    Args:
        model: The module; the parameters that require a gradient are the trained ones.
        offload: Keep the copy in the host's memory.

    Raises:
        ConfigError: `offload` with a model that is cut over the ranks.
    """

    def __init__(self, model: Any, *, offload: bool = False) -> None:
        self._model, self._offload = model, offload
        self._params = [p for p in model.parameters() if p.requires_grad]
        self._copies = [self._copy(p.detach()) for p in self._params]

    @contextlib.contextmanager
    def weights(self) -> Iterator[None]:
        """Let the module compute with the copy within the block. Blocks must not be nested."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def head(self) -> Head:
        """Return the copy's head; the module's very tensors where they are not trained."""
        head = read_head(self._model)
        copy_of = {id(p): c for p, c in zip(self._params, self._copies, strict=True)}

        def copied(tensor: torch.Tensor) -> torch.Tensor:
            return copy_of.get(id(tensor), tensor).to(tensor.device)

        return dataclasses.replace(
            head,
            weight=copied(head.weight),
            bias=None if head.bias is None else copied(head.bias),
        )

    @torch.no_grad()
    def take(self, decay: float = 0.0) -> None:
        """Move the copy to decay·copy + (1 − decay)·parameters; by default to the parameters."""
        for copy, param in zip(self._copies, self._params, strict=True):
            if decay:
                copy.lerp_(param.to(copy.device), 1.0 - decay)
            else:
                copy.copy_(param)

    @torch.no_grad()
    def give(self) -> None:
        """Set the parameters to the copy."""
        for copy, param in zip(self._copies, self._params, strict=True):
            param.copy_(copy)

    def _copy(self, values: torch.Tensor) -> torch.Tensor:
        if not self._offload:
            return values.clone()
        if isinstance(values, DTensor):
            raise ConfigError(
                "teacher.offload true is for whole models; under distributed.strategy fsdp each "
                "rank holds only its part of the teacher: set it to false, or use ddp"
            )
        # Pinned, so that the bus runs at its full rate.
        host = torch.empty_like(values, device="cpu", pin_memory=values.is_cuda)
        return host.copy_(values)

    @torch.no_grad()
    def _swap(self) -> None:
        for i, copy in enumerate(self._copies):
            param = self._params[i]
            if self._offload or isinstance(copy, DTensor):
                # Swap values, not tensors: each side keeps its memory, from which FSDP gathers, or
                # which lies on the host.
                copied = copy.clone()
                copy.copy_(param)
                param.copy_(copied)
            else:
                param.data, self._copies[i] = copy, param.data


class Teacher:
    """The teacher's weights, its head and its mixture, and the rule by which it moves.

    Args:
        model: The student's module, as it is before training; the parameters that require a
            gradient are the trained ones.
        config: Mode, refresh interval, decay, mixture, and where the copies lie.
        other: Another model that teaches; it is moved to where the student is. None: the student's
            own module does, with other weights.

    Raises:
        ConfigError: `teacher.offload` with a model that is cut over the ranks.
        ModelError: A mixture under a head that caps its logits softly.
    """

    def __init__(self, model: Any, config: TeacherConfig, other: OtherModel | None = None) -> None:
        self._model = model
        self._config = config
        self._other = other
        if other is not None:
            other.place(read_head(model).weight.device, offload=config.offload)
        self.anchor = config.anchor
        against = config.against_weight if config.against is not None else 0.0
        self._mix = Mix(dial=config.dial, anchor=config.anchor, against=against)
        asks = {
            "dial": config.dial != 1,
            "anchor": config.anchor != 0,
            "against": config.against is not None,
            "target": config.target is not None,
        }
        if any(asks.values()):
            names = ", ".join(f"teacher.{name}" for name, asked in asks.items() if asked)
            check_mixable(read_head(self.module), names)
        self._snapshot = None
        if config.mode != "live" and other is None:
            self._snapshot = Snapshot(model, offload=config.offload)
        # A frozen teacher has the weights before training itself.
        self._start = None
        if config.anchor and config.mode != "frozen":
            self._start = Snapshot(model, offload=config.offload)
        self.version = 0
        """Number of student updates that the teacher's weights have seen (ema: averaged)."""

    @property
    def module(self) -> Any:
        """Return the module that computes as the teacher within `weights`."""
        return self._model if self._other is None else self._other.module

    @property
    def is_other(self) -> bool:
        """Return True where another model teaches."""
        return self._other is not None

    @property
    def is_student(self) -> bool:
        """Return True in mode "live", where the teacher has no weights of its own."""
        return self._config.mode == "live"

    @property
    def is_copy(self) -> bool:
        """Return True where the teacher is a copy of weights that a run must save."""
        return self._snapshot is not None

    @property
    def vocab_size(self) -> int | None:
        """Return the rows of both heads that are tokens; None for all rows."""
        return None if self._other is None else self._other.vocab_size

    @property
    def is_wide(self) -> bool:
        """Return True where the start model is mixed in by a head that is not the teacher's."""
        if self._start is None or self.version == 0:
            return False
        return read_head(self._model).weight.requires_grad

    def contexts(self, dial: float) -> dict[str, float]:
        """Return the weight of each context that the teacher is mixed from, for one response."""
        # A response pulled back to the plain teacher (dial 0) is not pushed from a style either.
        mix = dataclasses.replace(self._mix, dial=dial, against=self._mix.against * (dial != 0))
        return mix.weights(start_is_teacher=self.version == 0)

    def equals_student(self, step: int) -> bool:
        """Return True when both compute alike after `step` updates, as after a refresh."""
        if self.is_other:
            return False
        averaged = self._config.mode == "ema" and step > 0
        same_weights = self.is_student or (self.version == step and not averaged)
        return same_weights and START not in self.contexts(self._config.dial)

    def weights(self) -> contextlib.AbstractContextManager[None]:
        """Let the module compute as the teacher within the block. Blocks must not be nested."""
        source = self._other or self._snapshot
        return contextlib.nullcontext() if source is None else source.weights()

    def known(self, batch: TokenBatch) -> TokenBatch:
        """Return a batch as the module can read it, see `OtherModel.known`."""
        return batch if self._other is None else self._other.known(batch)

    def start_weights(self) -> contextlib.AbstractContextManager[None]:
        """Let the module compute as it did before training within the block."""
        assert self._start is not None
        return self._start.weights()

    def head(self) -> Head:
        """Return the teacher's head; the student's very tensors where they are not trained."""
        source = self._other or self._snapshot
        return read_head(self._model) if source is None else source.head()

    def start_head(self) -> Head:
        """Return the head of the model before training."""
        assert self._start is not None
        return self._start.head()

    def after_update(
        self,
        step: int,
        losses: Sequence[float | None] = (),
        accepts: Callable[[int], bool] = lambda step: True,
    ) -> bool:
        """Move the teacher after the update of `step` (from 1); return True after a hard refresh.

        Args:
            losses: The loss of each step up to this one in nats, None for a skipped step; only
                `refresh_plateau` reads them.
            accepts: Asked at a refresh that is due, whether it may take place.
        """
        mode, snapshot = self._config.mode, self._snapshot
        if self.is_other:
            return False
        if snapshot is not None:
            if mode == "ema":
                snapshot.take(self._config.ema_decay)
            elif mode == "refresh" and self._refresh_due(step, losses) and accepts(step):
                snapshot.take()
            else:
                return False
        self.version = step
        return mode == "refresh"

    def reset_student(self) -> None:
        """Set the student's parameters to the teacher's."""
        assert self._snapshot is not None
        self._snapshot.give()

    def _refresh_due(self, step: int, losses: Sequence[float | None]) -> bool:
        """Return True where the teacher is to be refreshed: every M steps, or at a plateau.

        A plateau is there when the mean loss of the last M steps is not lower than the mean of the
        M before them by the share `refresh_plateau`, all of them since the last refresh.
        """
        window, plateau = self._config.refresh_steps, self._config.refresh_plateau
        if plateau is None:
            return step % window == 0
        # Skipped steps have no loss, and say nothing about convergence.
        finite = [x for x in losses[self.version :] if x is not None and math.isfinite(x)]
        if len(finite) < 2 * window:
            return False
        before, now = sum(finite[-2 * window : -window]), sum(finite[-window:])
        return now > (1 - plateau) * before
