"""A close look at one problem: both prompts, the scored tokens, and where the teacher disagrees."""

from __future__ import annotations

import sys
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from opsdc.config.settings import OPSDCConfig
from opsdc.data.prompted import Prompted
from opsdc.method.batch import Layout, Pair, plan_step
from opsdc.method.loss import distillation_loss
from opsdc.method.teacher import Teacher
from opsdc.method.update import autocast, teacher_head, teacher_pass
from opsdc.models.head import hidden_states, read_head
from opsdc.models.load import padding_id
from opsdc.models.other import load_other
from opsdc.rollout.base import Request, Rollout, SamplingParams
from opsdc.rollout.hf import HFSampler

_STRONG = 1.0
"""From this many nats on a token gets the strongest colour."""

_SHADES = (231, 230, 229, 228, 227, 226, 220, 214, 208, 202, 196)
"""These backgrounds, of a terminal's 256 colours, go from white over yellow to red."""


def padded_layout(model: Any, config: OPSDCConfig, tokenizer: PreTrainedTokenizerBase) -> Layout:
    """Return the layout of padded batches, which every model can be trusted with."""
    return Layout(
        packed=False,
        max_tokens=config.train.max_tokens_per_micro_batch,
        pad_id=padding_id(model, tokenizer),
        dtype=getattr(torch, config.model.dtype),
    )


@torch.no_grad()
def per_token(
    model: Any, teacher: Teacher, pair: Pair, config: OPSDCConfig, layout: Layout
) -> dict[str, torch.Tensor]:
    """Return KL(student‖teacher), entropies and log-probabilities of a response's tokens.

    The values of `kl`, `student_entropy`, `teacher_entropy`, `student_logprob` and
    `teacher_logprob` are float32 tensors [R] on the CPU.
    """
    plan = plan_step(
        [pair], layout, normalization=config.loss.normalization, contexts=teacher.contexts
    )
    teacher_rows = teacher_pass(model, teacher, plan)[0]
    device = teacher_rows.device
    batch = plan.student_batch([0], device)
    with autocast(device, layout.dtype):
        student_rows, head = hidden_states(model, batch), read_head(model)
        _, stats = distillation_loss(
            student_rows,
            head,
            teacher_rows.to(student_rows.dtype),
            teacher_head(teacher, head, layout.dtype) or head,
            None,
            config.loss,
            reduction="none",
            target_ids=torch.tensor(list(pair.response_ids), device=device),
            vocab_size=teacher.vocab_size,
        )
    assert stats.student_logprob is not None
    assert stats.teacher_logprob is not None
    return {
        "kl": stats.divergence.cpu(),
        "student_entropy": stats.student_entropy.cpu(),
        "teacher_entropy": stats.teacher_entropy.cpu(),
        "student_logprob": stats.student_logprob.cpu(),
        "teacher_logprob": stats.teacher_logprob.cpu(),
    }


def inspect(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    item: Prompted,
    config: OPSDCConfig,
    *,
    colour: bool | None = None,
) -> str:
    """Sample one answer to a problem and return what the loss sees, as text for a terminal.

    `colour` None colours the text if standard output is a terminal.
    """
    teacher = Teacher(model, config.teacher, load_other(config, model, tokenizer))
    sampler = HFSampler(model, tokenizer, seed=config.seed)
    sampler.push(model, 0)
    (rollout,) = sampler.generate(
        [Request(key=f"inspect/{item.problem.id}", prompt_ids=item.prompts.student_ids)],
        SamplingParams(
            max_new_tokens=config.rollout.max_new_tokens,
            temperature=config.rollout.temperature,
            top_p=config.rollout.top_p,
        ),
        label="inspect",
    )
    pair = Pair(
        student_prompt_ids=item.prompts.student_ids,
        teacher_prompt_ids=item.prompts.teacher_ids,
        against_prompt_ids=item.prompts.against_ids,
        response_ids=rollout.response_ids,
        dial=config.teacher.dial,
    )
    model.eval()
    values = per_token(model, teacher, pair, config, padded_layout(model, config, tokenizer))
    use_colour = sys.stdout.isatty() if colour is None else colour
    return _render(tokenizer, item, rollout, values, teacher.contexts(pair.dial), use_colour)


def _render(
    tokenizer: PreTrainedTokenizerBase,
    item: Prompted,
    rollout: Rollout,
    values: dict[str, torch.Tensor],
    contexts: dict[str, float],
    colour: bool,
) -> str:
    """Return the text of a problem, its response and the values of its tokens."""
    prompts, kl = item.prompts, values["kl"]
    tokens = [str(tokenizer.decode([i])) for i in rollout.response_ids]
    parts = [
        f"problem {item.problem.id}   answer {item.problem.answer!r}",
        _prompt("student prompt", prompts.student_text, prompts.student_ids),
        _prompt("teacher prompt", prompts.teacher_text, prompts.teacher_ids),
        *_against(tokenizer, prompts.against_ids),
        "── teacher mixed of: " + " ".join(f"{w:+g} {name}" for name, w in contexts.items()),
        f"── response: {len(tokens)} tokens, "
        + ("ended by itself" if rollout.finished else "cut at rollout.max_new_tokens")
        + f"\nids {list(rollout.response_ids)}",
        f"mask: {len(prompts.student_ids)} prompt positions not scored, "
        f"{len(tokens)} response tokens scored, predicted at student positions "
        f"{len(prompts.student_ids) - 1}–{len(prompts.student_ids) + len(tokens) - 2}",
        "── KL(student‖teacher) per token"
        + (f", white 0 to red ≥ {_STRONG:g} nats" if colour else ", nats in brackets"),
        _coloured(tokens, kl) if colour else _bracketed(tokens, kl),
        f"mean {float(kl.mean()):.4f} nats per token, largest {float(kl.max()):.3f}; "
        f"entropy student {float(values['student_entropy'].mean()):.3f}, "
        f"teacher {float(values['teacher_entropy'].mean()):.3f}",
        "── where they differ most",
        "position  token                 KL      log p student   teacher",
    ]
    for i in torch.argsort(kl, descending=True)[:8].tolist():
        parts.append(
            f"{i:8d}  {tokens[i]!r:20s} {float(kl[i]):7.4f}   "
            f"{float(values['student_logprob'][i]):13.3f}   "
            f"{float(values['teacher_logprob'][i]):7.3f}"
        )
    return "\n".join(parts)


def _prompt(name: str, text: str, ids: list[int]) -> str:
    return f"── {name}: {len(ids)} tokens\n{text}\nids {ids}"


def _against(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    return [_prompt("prompt with teacher.against", str(tokenizer.decode(ids)), ids)] if ids else []


def _coloured(tokens: list[str], kl: torch.Tensor) -> str:
    shown = []
    for token, value in zip(tokens, kl.tolist(), strict=True):
        # Most tokens have small divergences, which the root spreads over more shades.
        strength = min(max(value, 0.0) / _STRONG, 1.0) ** 0.5
        shade = _SHADES[round(strength * (len(_SHADES) - 1))]
        shown.append(f"\033[38;5;16;48;5;{shade}m{token}\033[0m")
    return "".join(shown)


def _bracketed(tokens: list[str], kl: torch.Tensor) -> str:
    return "".join(
        f"{token}[{value:.2f}]" if value >= 0.05 else token
        for token, value in zip(tokens, kl.tolist(), strict=True)
    )
