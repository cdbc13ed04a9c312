"""Self-distillation of a LoRA adapter: the teacher is the same model with the adapter off.

    python examples/peft_lora.py

Ten seconds, nearly all of them imports; minutes with `--model embedded:smollm2` on a CPU. No
second model is in memory, and the head is shared and frozen: no gradient of its size is made.
"""

from __future__ import annotations

import peft
import torch
from plain_loop import states
from start import load, options, sample

from opsdc_kernels import linear_reverse_kl


def main(model: str | None = None, steps: int = 4) -> list[float]:
    base, tokenizer = load(model)
    student = peft.get_peft_model(base, peft.LoraConfig(r=8, target_modules="all-linear"))
    optimizer = torch.optim.AdamW((p for p in student.parameters() if p.requires_grad), lr=1e-3)
    pairs = sample(base, tokenizer)
    losses = []
    for step in range(steps):
        total = 0.0
        for pair in pairs:
            student_hidden = states(base, pair.student_prompt_ids, pair.response_ids)
            with torch.no_grad(), student.disable_adapter():
                teacher_hidden = states(base, pair.teacher_prompt_ids, pair.response_ids)
            loss = linear_reverse_kl(student_hidden, base.lm_head.weight, teacher_hidden)
            loss.backward()
            total += loss.item() / len(pairs)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
        print(f"step {step + 1}: {total:.6f} nats per token")
    return losses


if __name__ == "__main__":
    main(**options(__doc__))
