"""The teacher: the same module with an older copy of the trained parameters swapped in.

Only parameters that are trained can differ between teacher and student, so only they are copied:
all of them in full fine-tuning, the adapter alone with LoRA. Scoring swaps the copies into the
module, which keeps the teacher in the student's dtype and on the student's attention path: the
same prompt on both sides then gives a divergence of exactly zero.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from opsdc.config.settings import TeacherConfig
from opsdc.errors import ConfigError
from opsdc.models.head import Head, read_head


class Teacher:
    """The teacher's weights, its head included, and the rule by which they follow the student.

    Args:
        model: The student's module; the parameters that require a gradient are the trained ones.
        config: Mode, refresh interval, decay, and where the copies lie.

    Raises:
        ConfigError: `teacher.offload` with a model that is cut over the ranks.
    """

    def __init__(self, model: Any, config: TeacherConfig) -> None:
        self._model = model
        self._config = config
        self._params = [p for p in model.parameters() if p.requires_grad]
        self._copies: list[torch.Tensor] = []
        if config.mode != "live":
            self._copies = [self._copy(p.detach()) for p in self._params]
        self.version = 0
        """Number of student updates that the teacher's weights have seen (ema: averaged)."""

    @property
    def is_student(self) -> bool:
        """Return True in mode "live", where the teacher has no weights of its own."""
        return self._config.mode == "live"

    def equals_student(self, step: int) -> bool:
        """Return True when both have the same weights after `step` updates, as after a refresh."""
        averaged = self._config.mode == "ema" and step > 0
        return self.is_student or (self.version == step and not averaged)

    @contextlib.contextmanager
    def weights(self) -> Iterator[None]:
        """Let the module compute as the teacher within the block. Blocks must not be nested."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _copy(self, values: torch.Tensor) -> torch.Tensor:
        if not self._config.offload:
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
            if self._config.offload or isinstance(copy, DTensor):
                # Swap values, not tensors: each side keeps its memory, from which FSDP gathers, or
                # which lies on the host.
                teachers = copy.clone()
                copy.copy_(param)
                param.copy_(teachers)
            else:
                param.data, self._copies[i] = copy, param.data

    def head(self) -> Head:
        """Return the teacher's head; the student's very tensors where they are not trained."""
        head = read_head(self._model)
        # In mode "live" there are no copies.
        copy_of = {id(p): c for p, c in zip(self._params, self._copies, strict=False)}

        def teachers(tensor: torch.Tensor) -> torch.Tensor:
            return copy_of.get(id(tensor), tensor).to(tensor.device)

        return dataclasses.replace(
            head,
            weight=teachers(head.weight),
            bias=None if head.bias is None else teachers(head.bias),
        )

    @torch.no_grad()
    def after_update(self, step: int, losses: Sequence[float | None] = ()) -> bool:
        """Move the teacher after the update of `step` (from 1); return True after a hard refresh.

        `losses` holds the loss of each step up to this one in nats, None for a skipped step; only
        `refresh_plateau` reads them.
        """
        mode = self._config.mode
        if mode == "ema":
            for copy, param in zip(self._copies, self._params, strict=True):
                copy.lerp_(param.to(copy.device), 1.0 - self._config.ema_decay)
        elif mode == "refresh" and self._refresh_due(step, losses):
            for copy, param in zip(self._copies, self._params, strict=True):
                copy.copy_(param)
        elif mode != "live":
            return False
        self.version = step
        return mode == "refresh"

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
