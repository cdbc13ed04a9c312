"""TRL's SDFT trainer set up as OPSDC (trl 1.16.0, `trl.experimental.sdft`): its loss, its update.

Everything is TRL's own code but sampling, which hands out recorded answers. The settings that make
SDFT OPSDC: reverse KL over the full vocabulary (`distillation_mode`, `distillation_alpha` 1), no
importance clip, a teacher that is a hard copy taken every so many steps ("ema" with rate 1), one
answer per prompt, the instruction in front. Gradient checkpointing, TRL's default, is off: nobody
else here recomputes.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.rollouts import Rollouts

NAME = "TRL's SDFT trainer"


def loss(h: Tensor, w: Tensor, ht: Tensor, wt: Tensor) -> Tensor:
    """What the trainer computes from hidden states: both logits, then TRL's divergence of them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is experimental
        from trl.experimental.sdft.loss_utils import compute_full_logit_self_distillation_loss

    with torch.no_grad():
        teacher = ht @ wt.T
    return compute_full_logit_self_distillation_loss(
        h @ w.T, teacher, distillation_alpha=1.0
    ).mean()


def update_of(model: Any, tokenizer: Any, rollouts: Rollouts) -> tuple[Callable[[], float], Any]:
    """The trainer's training step on these rollouts, which adds to the model's gradients and
    returns the loss; and the trainer's teacher."""
    import datasets

    rows = [
        {"prompt": list(messages), "privileged_context": rollouts.instruction}
        for messages in rollouts.messages
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is experimental
        from trl.experimental.sdft import SDFTConfig, SDFTTrainer

        trainer = SDFTTrainer(
            model=model,
            args=SDFTConfig(
                output_dir=tempfile.mkdtemp(prefix="sdft-"),
                distillation_mode="full_logits",
                distillation_alpha=1.0,
                distillation_is_clip=None,
                teacher_model_kind="ema",
                teacher_update_rate=1.0,
                teacher_sync_steps=50,
                teacher_prompt_template="{privileged_context}\n\n{prompt}",
                num_generations=1,
                per_device_train_batch_size=len(rows),
                max_completion_length=max(len(pair.response_ids) for pair in rollouts.pairs),
                gradient_checkpointing=False,
                bf16=False,
                use_cpu=True,
                report_to="none",
                save_strategy="no",
            ),
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tokenizer,
        )
    answers = [list(pair.response_ids) for pair in rollouts.pairs]
    trainer._generate = lambda prompt_ids: (prompt_ids, answers)
    # Set by `train()`, whose loop this replaces.
    trainer.current_gradient_accumulation_steps = 1
    _check_prompts(trainer, rows, rollouts)
    return lambda: float(trainer.training_step(model, rows, None)), trainer.teacher_model


def _check_prompts(trainer: Any, rows: list[dict[str, Any]], rollouts: Rollouts) -> None:
    """The same tokens on both sides as everyone else's, or the comparison is void."""
    batch = trainer._prepare_training_batch(rows)
    for i, pair in enumerate(rollouts.pairs):
        sequences = {
            "teacher": (batch["teacher_input_ids"][i], batch["teacher_attention_mask"][i]),
            "student": (
                torch.cat([batch["prompt_ids"][i], batch["completion_ids"][i]]),
                torch.cat([batch["prompt_mask"][i], batch["completion_mask"][i]]),
            ),
        }
        for side, (ids, mask) in sequences.items():
            want = [*getattr(pair, f"{side}_prompt_ids"), *pair.response_ids]
            assert ids[mask.bool()].tolist() == want, f"TRL's {side} sequence {i} is another one"
