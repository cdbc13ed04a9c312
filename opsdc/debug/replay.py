"""A step that made no finite number, kept as a file and looked at again token by token."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

from opsdc.config.settings import OPSDCConfig
from opsdc.debug.show import per_token
from opsdc.errors import CheckpointError, DataError
from opsdc.method.batch import Layout, Pair, plan_step
from opsdc.method.teacher import Teacher
from opsdc.method.update import student_pass, teacher_pass
from opsdc.models.load import load_model, load_tokenizer, prepare_model
from opsdc.record import checkpoint

_SHOWN = 8


def replay(path: Path) -> str:
    """Do a step again from its batch and the checkpoint before it, and say what is not finite.

    Raises DataError for a file that no run wrote (`write_batch`), CheckpointError where the state
    before the step is gone.
    """
    step, config, pairs = _read(path)
    tokenizer = load_tokenizer(config.model)
    torch.manual_seed(config.seed)
    model = prepare_model(load_model(config.model), config.model)
    teacher = Teacher(model, config.teacher)
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
    pad = tokenizer.pad_token_id
    layout = Layout(
        packed=False,
        max_tokens=config.train.max_tokens_per_micro_batch,
        pad_id=0 if pad is None else pad,
        dtype=getattr(torch, config.model.dtype),
    )
    model.train()
    plan = plan_step(
        pairs, layout, normalization=config.loss.normalization, contexts=teacher.contexts
    )
    loss, *_ = student_pass(model, teacher, plan, teacher_pass(model, teacher, plan), config)
    sick = [n for n, p in model.named_parameters() if not bool(p.isfinite().all())]
    gradients = [
        n for n, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()
    ]
    lines = [
        f"step {step} again, from {where}: loss {loss} nats over {len(pairs)} responses",
        _names("parameters that are not finite", sick),
        _names("gradients that are not finite", gradients),
        "response  tokens  mean KL      first token whose divergence is not finite",
    ]
    model.eval()
    for i, pair in enumerate(pairs):
        kl = per_token(model, teacher, pair, config, layout)["kl"]
        bad = (~kl.isfinite()).nonzero().flatten().tolist()
        text = repr(tokenizer.decode([pair.response_ids[bad[0]]])) if bad else "–"
        first = f"{text} at {bad[0]}, {len(bad)} in all" if bad else "none"
        mean = float(kl.mean())
        shown = f"{mean:.6f}" if math.isfinite(mean) else str(mean)
        lines.append(f"{i:8d}  {len(kl):6d}  {shown:11s}  {first}")
    return "\n".join(lines)


def _names(what: str, names: list[str]) -> str:
    more = f", … {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{what}: {len(names)}" + (f": {', '.join(names[:_SHOWN])}{more}" if names else "")


def _read(path: Path) -> tuple[int, OPSDCConfig, list[Pair]]:
    try:
        found: dict[str, Any] = json.loads(path.read_text("utf-8"))
        pairs = [Pair(**row) for row in found["pairs"] if row["response_ids"]]
        return int(found["step"]), OPSDCConfig.from_dict(found["config"], str(path)), pairs
    except OSError as error:
        raise DataError(f"--batch {path} cannot be read: {error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"--batch {path} is not a batch that a run left: {error}") from error
