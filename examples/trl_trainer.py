"""TRL's distillation trainer with our loss in the place of its own (trl 1.16.0).

    python examples/trl_trainer.py

Ten seconds, nearly all of them imports. With `--model NAME --teacher NAME`, which
share a vocabulary, as long as TRL takes. For one process or DDP: gather a head that is sharded
(FSDP2, ZeRO-3) before it comes here.
"""

from __future__ import annotations

import datasets
import torch
from start import load, options, questions
from trl import DistillationConfig, DistillationTrainer
from trl.trainer import distillation_trainer

from opsdc_kernels import linear_divergence


def divergence_loss(
    student_hidden,
    teacher_hidden,
    student_weight,
    teacher_weight,
    completion_mask,
    beta,
    num_items_in_batch=None,
    student_lm_head_bias=None,
    teacher_lm_head_bias=None,
    student_logit_scale=1.0,
    teacher_logit_scale=1.0,
    student_final_logit_softcapping=None,
    teacher_final_logit_softcapping=None,
    temperature=1.0,
):
    """TRL's arguments in, (loss, Σ student entropy, number of tokens) out."""
    mask = completion_mask != 0
    count = mask.sum()
    items = count.clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    ends = {0.0: "forward_kl", 1.0: "reverse_kl"}
    loss, stats = linear_divergence(
        student_hidden,
        student_weight,
        teacher_hidden,
        teacher_weight.detach(),
        divergence=ends.get(beta, "jsd"),
        beta=0.5 if beta in ends else beta,
        token_weight=mask / items,
        reduction="sum",
        temperature=temperature,
        student_bias=student_lm_head_bias,
        teacher_bias=None if teacher_lm_head_bias is None else teacher_lm_head_bias.detach(),
        logit_scale=(student_logit_scale, teacher_logit_scale),
        logit_softcap=(student_final_logit_softcapping, teacher_final_logit_softcapping),
        return_stats=True,
    )
    return loss, stats.student_entropy.sum(), count


def make_trainer(student, teacher, tokenizer, **settings) -> DistillationTrainer:
    prompts = [{"prompt": text} for text in questions(8)]
    return DistillationTrainer(
        model=student,
        teacher_model=teacher,
        args=DistillationConfig(
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            max_completion_length=12,
            max_steps=2,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            bf16=torch.cuda.is_available(),
            use_cpu=not torch.cuda.is_available(),
            **settings,
        ),
        train_dataset=datasets.Dataset.from_list(prompts),
        processing_class=tokenizer,
    )


def main(model: str | None = None, teacher: str | None = None) -> list[float]:
    student, tokenizer = load(model)
    other, _ = load(teacher, seed=1)
    distillation_trainer._chunked_divergence_loss = divergence_loss
    trainer = make_trainer(student, other, tokenizer, output_dir="runs/trl_trainer")
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    print(main(**options(__doc__, "teacher")))
