"""What the loss phase of a training step adds to memory: fused against materialized logits.

    python -m benchmarks.loss_memory            (about 2 minutes on two CPU cores)

The demo model, eight prompts of the demo's problems and responses of 96 tokens (the demo's cap),
then four times as long. Each contender runs in a process of its own: hidden states are computed
first, then the peak of resident memory during loss and backward (to hidden states and head weight)
is read from the kernel's high-water mark, which is reset right before.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

import torch

from benchmarks.contenders import materialized
from benchmarks.resident import added_mib

PROMPTS, RESPONSE, LONGER = 8, 96, 4
WAYS = ("fused", "materialized")


def measure(way: str, response_tokens: int) -> dict[str, float]:
    """One contender, in this process."""
    from opsdc.config.settings import OPSDCConfig
    from opsdc.data.prompted import prompted_sets
    from opsdc.method.batch import Pair, token_batch
    from opsdc.method.loss import distillation_loss
    from opsdc.models.head import Head, hidden_states, read_head
    from opsdc.models.load import load_model, load_tokenizer

    config = OPSDCConfig.load("smollm2-cpu")
    tokenizer = load_tokenizer(config.model)
    problems, _ = prompted_sets(config, tokenizer)
    model = load_model(config.model)
    generator = torch.Generator().manual_seed(0)
    pairs = [
        Pair(
            student_prompt_ids=item.prompts.student_ids,
            teacher_prompt_ids=item.prompts.teacher_ids,
            # Memory depends on shapes alone; the ids only have to be some.
            response_ids=torch.randint(
                99, 49_000, (response_tokens,), generator=generator
            ).tolist(),
        )
        for item in problems.batch(1, PROMPTS)
    ]
    hidden = []
    for side in ("student", "teacher"):
        prompts = [getattr(p, f"{side}_prompt_ids") for p in pairs]
        batch = token_batch(
            [(prompt, p.response_ids) for prompt, p in zip(prompts, pairs, strict=True)],
            packed=False,
            pad_id=0,
            device=torch.device("cpu"),
        )
        with torch.no_grad():
            hidden.append(hidden_states(model, batch))
    student, teacher = hidden[0].requires_grad_(), hidden[1]
    weight = read_head(model).weight
    # The teacher's head is its own: full fine-tuning against a stale teacher.
    teacher_weight = weight.detach().clone()
    n = len(student)
    token_weight = torch.full((n,), 1.0 / n)

    def call() -> torch.Tensor:
        if way == "fused":
            heads = Head(weight=weight), Head(weight=teacher_weight)
            loss, _ = distillation_loss(
                student, heads[0], teacher, heads[1], token_weight, config.loss
            )
        else:
            loss = materialized(student, weight, teacher, teacher_weight)
        loss.backward()
        losses.append(float(loss.detach()))

    losses: list[float] = []
    added = added_mib(call)
    returned = (weight.numel() + student.numel()) * 4 / 2**20
    return {"loss": losses[0], "rows": n, "added_mib": added, "gradients_mib": returned}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--response", type=int, default=RESPONSE, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way:
        print(json.dumps(measure(arguments.way, arguments.response)))
        return
    print("response  rows   fused MiB  materialized MiB  ratio   (of which gradients returned)")
    for response in (RESPONSE, RESPONSE * LONGER):
        found = {}
        for way in WAYS:
            command = [sys.executable, "-m", __spec__.name, "--way", way]
            command += ["--response", str(response)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found[way] = json.loads(done.stdout.splitlines()[-1])
        fused, naive = (found[way] for way in WAYS)
        print(
            f"{response:8d}  {fused['rows']:4.0f}  {fused['added_mib']:10.0f}  "
            f"{naive['added_mib']:16.0f}  {fused['added_mib'] / naive['added_mib']:5.3f}   "
            f"{fused['gradients_mib']:.0f} MiB; losses {fused['loss']:.6f} and {naive['loss']:.6f}"
        )


if __name__ == "__main__":
    main()
