"""The replay of a step whose numbers were not finite, token by token, from the file it left."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

from opsdc.config.settings import OPSDCConfig
from opsdc.debug.show import padded_layout, per_token
from opsdc.errors import CheckpointError, DataError
from opsdc.method.batch import Pair, plan_step
from opsdc.method.teacher import Teacher
from opsdc.method.update import student_pass, teacher_pass
from opsdc.models.load import load_model, load_tokenizer, prepare_model
from opsdc.models.other import load_other
from opsdc.record import checkpoint

_SHOWN = 8
"""A line names no more than this many parameters."""


def replay(path: Path) -> str:
    """Do a step again from its batch and the checkpoint before it; return a text on the result.

    The text names parameters, gradients and tokens that are not finite. Raises DataError for a file
    that no run wrote, CheckpointError where the state before the step is gone.
    """
    # The batch, and the model and the teacher as they were before the step.
    step, config, pairs = _read_batch(path)
    tokenizer = load_tokenizer(config.model)
    torch.manual_seed(config.seed)
    model = prepare_model(load_model(config.model), config.model)
    teacher = Teacher(model, config.teacher, load_other(config, model, tokenizer))
    where = "the model as it was loaded"
    if step > 1:
        folder = checkpoint.path_of(path.parent / "checkpoints", step - 1)
        problem = checkpoint.verify(folder)
        if problem:
            raise CheckpointError(
                f"the state before step {step} is not in {folder}: {problem}; inspect a batch "
                "before the run goes on, or raise train.keep"
            )
        checkpoint.restore(folder, model, teacher, torch.optim.AdamW(model.parameters()))
        where = str(folder)

    # The step, without its optimizer.
    layout = padded_layout(model, config, tokenizer)
    model.train()
    plan = plan_step(
        pairs, layout, normalization=config.loss.normalization, contexts=teacher.contexts
    )
    hidden = teacher_pass(model, teacher, plan)
    loss, *_ = student_pass(model, teacher, plan, hidden, config, number=step)
    parameters = [n for n, p in model.named_parameters() if not bool(p.isfinite().all())]
    gradients = [
        n for n, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()
    ]
    lines = [
        f"step {step} again, from {where}: loss {loss} nats over {len(pairs)} responses",
        _list_names("parameters that are not finite", parameters),
        _list_names("gradients that are not finite", gradients),
        "response  tokens  mean KL      first token whose divergence is not finite",
    ]

    # Each response by itself, to find the first token.
    model.eval()
    for i, pair in enumerate(pairs):
        kl = per_token(model, teacher, pair, config, layout)["kl"]
        places = (~kl.isfinite()).nonzero().flatten().tolist()
        first = "none"
        if places:
            token = tokenizer.decode([pair.response_ids[places[0]]])
            first = f"{token!r} at {places[0]}, {len(places)} in all"
        mean = float(kl.mean())
        shown = f"{mean:.6f}" if math.isfinite(mean) else str(mean)
        lines.append(f"{i:8d}  {len(kl):6d}  {shown:11s}  {first}")
    return "\n".join(lines)


def _list_names(what: str, names: list[str]) -> str:
    """Return a line with the number of names and the first of them."""
    more = f", … {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{what}: {len(names)}" + (f": {', '.join(names[:_SHOWN])}{more}" if names else "")


def _read_batch(path: Path) -> tuple[int, OPSDCConfig, list[Pair]]:
    """Read the file that a run left: its step, its settings and the step's pairs."""
    try:
        batch: dict[str, Any] = json.loads(path.read_text("utf-8"))
        pairs = [Pair(**row) for row in batch["pairs"] if row["response_ids"]]
        return int(batch["step"]), OPSDCConfig.from_dict(batch["config"], str(path)), pairs
    except OSError as error:
        raise DataError(f"--batch {path} cannot be read: {error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"--batch {path} is not a batch that a run left: {error}") from error
