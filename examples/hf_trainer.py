"""Self-distillation with Hugging Face's Trainer: batches, accumulation, schedules, checkpoints.

    python examples/hf_trainer.py

Ten seconds, nearly all of them imports; minutes with `--model embedded:smollm2` on a CPU.
The responses are sampled once, before training; `opsdc train` samples anew for every step.
"""

from __future__ import annotations

import copy

from start import load, options, sample
from transformers import Trainer, TrainingArguments

from opsdc import Distiller, collate


def main(model: str | None = None, output_dir: str = "runs/hf_trainer") -> list[float]:
    student, tokenizer = load(model)
    args = TrainingArguments(
        output_dir,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        max_steps=4,
        learning_rate=1e-6 if model else 3e-3,
        logging_steps=1,
        report_to="none",
    )
    trainer = Trainer(
        model=Distiller(student, teacher=copy.deepcopy(student)),
        args=args,
        train_dataset=sample(student, tokenizer),
        data_collator=collate,
    )
    trainer.train()
    trainer.model.save_pretrained(f"{output_dir}/model")
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    print(main(**options(__doc__)))
