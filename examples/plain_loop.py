"""On-policy self-distillation in a plain PyTorch loop.

    python examples/plain_loop.py

Ten seconds, nearly all of them imports; minutes with `--model embedded:smollm2` on a CPU.
"""

from __future__ import annotations

import copy

import torch
from start import load, options, sample

from opsdc_kernels import linear_reverse_kl


def states(model, prompt, response):
    """[n, D]: the hidden states that predict the tokens of the response."""
    ids = torch.tensor([[*prompt, *response]], device=model.device)
    return model.get_decoder()(ids).last_hidden_state[0, len(prompt) - 1 : -1]


def main(model: str | None = None, steps: int = 8) -> list[float]:
    student, tokenizer = load(model)
    teacher = copy.deepcopy(student).requires_grad_(False)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-6 if model else 3e-3)
    losses = []
    for step in range(steps):
        pairs = sample(student, tokenizer, seed=step)
        n_tokens = sum(len(pair.response_ids) for pair in pairs)
        total = 0.0
        for pair in pairs:
            student_hidden = states(student, pair.student_prompt_ids, pair.response_ids)
            with torch.no_grad():
                teacher_hidden = states(teacher, pair.teacher_prompt_ids, pair.response_ids)
            loss = linear_reverse_kl(
                student_hidden,
                student.lm_head.weight,
                teacher_hidden,
                teacher.lm_head.weight,
                reduction="sum",
            )
            (loss / n_tokens).backward()
            total += loss.item() / n_tokens
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
        print(f"step {step + 1}: {total:.6f} nats per token")
    return losses


if __name__ == "__main__":
    main(**options(__doc__))
