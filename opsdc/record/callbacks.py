"""Callbacks of transformers around our loop: trackers of experiments, and a user's own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    DefaultFlowCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_callback import CallbackHandler
from transformers.utils import logging as transformers_logging

from opsdc.config.settings import OPSDCConfig


class Callbacks:
    """The `transformers.TrainerCallback`s of a run, trackers of `log.report_to` included.

    `first` is True on the rank that writes and prints.
    """

    def __init__(
        self,
        config: OPSDCConfig,
        callbacks: Sequence[TrainerCallback],
        model: Any,
        tokenizer: Any,
        optimizer: torch.optim.Optimizer,
        *,
        first: bool = True,
    ) -> None:
        integrations = get_reporting_integration_callbacks(list(config.log.report_to))
        trackers = [c() if isinstance(c, type) else c for c in integrations]
        self._handler = CallbackHandler(
            [DefaultFlowCallback(), *trackers, *callbacks], model, tokenizer, optimizer, None
        )
        # TrainingArguments warns of a process group that it did not start, and does not know ranks
        # on a CPU.
        verbosity = transformers_logging.get_verbosity()
        transformers_logging.set_verbosity_error()
        self._args = TrainingArguments(
            output_dir=config.output_dir,
            max_steps=config.train.steps,
            learning_rate=config.optim.lr,
            logging_steps=config.log.every,
            seed=config.seed,
            report_to="none",
            run_name=Path(config.output_dir).name,
        )
        transformers_logging.set_verbosity(verbosity)
        self._state = TrainerState(max_steps=config.train.steps, is_world_process_zero=first)
        self._control = TrainerControl()

    def emit(self, event: str, *, step: int, **kwargs: Any) -> bool:
        """Send one event ("on_step_end", ...); return True where a callback asks to stop."""
        self._state.global_step = step
        self._handler.call_event(event, self._args, self._state, self._control, **kwargs)
        return self._control.should_training_stop
