"""Callbacks of transformers around our loop: trackers of experiments, and a user's own."""

from __future__ import annotations

import sys
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
from opsdc.errors import ConfigError
from opsdc.ranks.talk import Ranks


class Callbacks:
    """The `transformers.TrainerCallback`s of a run, trackers of `log.report_to` included.

    A tracker that cannot start is an error, one that fails later is left out with a line on stderr:
    metrics.jsonl has all that it is sent. An error of a user's own callback is the user's to raise.

    Raises ConfigError for a tracker that is unknown or not installed.
    """

    def __init__(self, config: OPSDCConfig, callbacks: Sequence[TrainerCallback]) -> None:
        self._config, self._callbacks = config, callbacks
        self._trackers = {name: [_tracker(name)] for name in config.log.report_to}

    def begin(
        self, model: Any, tokenizer: Any, optimizer: torch.optim.Optimizer, step: int, ranks: Ranks
    ) -> None:
        """Send "on_train_begin" after `step` steps; raises ConfigError for a tracker that fails."""
        config = self._config

        def handler(callbacks: Sequence[TrainerCallback]) -> CallbackHandler:
            return CallbackHandler(list(callbacks), model, tokenizer, optimizer, None)

        self._handler = handler([DefaultFlowCallback(), *self._callbacks])
        self._reports = {name: handler(tracker) for name, tracker in self._trackers.items()}
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
        self._state = TrainerState(max_steps=config.train.steps, is_world_process_zero=ranks.first)
        self._control = TrainerControl()
        ranks.on_each_rank(lambda: self.emit("on_train_begin", step=step))

    def emit(self, event: str, *, step: int, **kwargs: Any) -> bool:
        """Send one event ("on_step_end", ...); return True where a callback asks to stop."""
        self._state.global_step = step
        sent = kwargs
        if "logs" in kwargs:
            # Trackers show eval_x as eval/x, and all else below train/.
            logs = {key.replace("eval/", "eval_"): v for key, v in kwargs["logs"].items()}
            sent = kwargs | {"logs": logs}
        for name, report in list(self._reports.items()):
            try:
                report.call_event(event, self._args, self._state, self._control, **sent)
            except Exception as error:  # Networks, accounts and disks fail in many different ways.
                problem = f"log.report_to {name}: {event} failed: {error!r}"
                if event == "on_train_begin":
                    raise ConfigError(f"{problem}; mend that, or leave it out") from error
                print(f"{problem}; it is left out from now on", file=sys.stderr, flush=True)
                del self._reports[name]
        self._handler.call_event(event, self._args, self._state, self._control, **kwargs)
        return self._control.should_training_stop


def _tracker(name: str) -> TrainerCallback:
    """Return the callback of a tracker; raises ConfigError for one that cannot be used here."""
    try:
        (callback,) = get_reporting_integration_callbacks([name])
        return callback() if isinstance(callback, type) else callback
    except (ValueError, RuntimeError, ImportError) as error:
        raise ConfigError(f"log.report_to {name}: {' '.join(str(error).split())}") from error
