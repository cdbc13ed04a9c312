"""Errors on hidden states of a real model: the demo's, on answers it sampled itself.

    python -m benchmarks.real_states                          (about 2 minutes on two CPU cores)
    python -m benchmarks.real_states --save real.safetensors
    python -m opsdc_kernels.verify --hidden-states real.safetensors

Two questions. What does a loss add, for given bf16 hidden states and head? And what does a backbone
that computes in bf16 add before any loss sees them, which no loss can take away?
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch

from opsdc.config.settings import OPSDCConfig
from opsdc.data.prompted import prompted_sets
from opsdc.method.batch import Pair, token_batch
from opsdc.models.head import hidden_states, read_head
from opsdc.models.load import load_model, load_tokenizer
from opsdc.rollout.base import Request, SamplingParams
from opsdc.rollout.hf import HFSampler
from opsdc_kernels import testing
from opsdc_kernels.testing import Case, Outcome

PROBLEMS = 6
TOKENS = 64


@dataclass(frozen=True, slots=True)
class Row:
    what: str
    loss: float
    hidden_gradient: float
    weight_gradient: float

    def __str__(self) -> str:
        errors = (self.loss, self.hidden_gradient, self.weight_gradient)
        return f"{self.what:<52}" + "".join(f"{error:10.1e}" for error in errors)


def real_cases(problems: int = PROBLEMS, tokens: int = TOKENS) -> tuple[Case, Case]:
    """The same tokens through an fp32 backbone and through a bf16 one (its states widened again);
    head and parameters are rounded to bf16 in both, so only the arithmetic differs."""
    torch.manual_seed(0)
    config = OPSDCConfig.load("smollm2-cpu")
    tokenizer = load_tokenizer(config.model)
    model = load_model(config.model)
    chosen = prompted_sets(config, tokenizer)[0].batch(1, problems)
    sampler = HFSampler(model, tokenizer, seed=0)
    requests = [
        Request(key=f"real-{i}", prompt_ids=item.prompts.student_ids)
        for i, item in enumerate(chosen)
    ]
    params = SamplingParams(max_new_tokens=tokens)
    rollouts = sampler.generate(requests, params, label="answers")
    pairs = [
        Pair(
            student_prompt_ids=item.prompts.student_ids,
            teacher_prompt_ids=item.prompts.teacher_ids,
            response_ids=rollout.response_ids,
        )
        for item, rollout in zip(chosen, rollouts, strict=True)
    ]
    model.bfloat16()
    head = read_head(model).weight.detach()
    narrow = [_states(model, pairs, side).float() for side in ("student", "teacher")]
    model.float()
    wide = [_states(model, pairs, side) for side in ("student", "teacher")]
    weight = head.float()
    return Case(wide[0], weight, wide[1]), Case(narrow[0], weight, narrow[1])


def _states(model: torch.nn.Module, pairs: list[Pair], side: str) -> torch.Tensor:
    batch = token_batch(
        [(getattr(pair, f"{side}_prompt_ids"), pair.response_ids) for pair in pairs],
        packed=False,
        pad_id=0,
        device=torch.device("cpu"),
    )
    with torch.no_grad():
        return hidden_states(model, batch)


def measure(wide: Case, narrow: Case) -> list[Row]:
    """Prints each line."""
    rounded = wide.to(torch.bfloat16)
    true = testing.truth(rounded)
    exact = testing.truth(wide)
    found = [
        _row("given bf16 states: ours, chunked", testing.run(rounded, backend="chunked"), true),
        _row("given bf16 states: naive, bf16 logits", testing.naive(rounded, torch.bfloat16), true),
        _row("given bf16 states: naive, fp32 logits", testing.naive(rounded, torch.float32), true),
        _row("given fp32 states: ours, chunked", testing.run(wide, backend="chunked"), exact),
        _row("given fp32 states: naive", testing.naive(wide, torch.float32), exact),
        _row("end to end: bf16 backbone, exact loss", testing.truth(narrow), exact),
    ]
    for row in found:
        print(row, flush=True)
    return found


def _row(what: str, got: Outcome, true: Outcome) -> Row:
    errors = testing.errors(got, true)
    return Row(what, errors.loss, errors.hidden_gradient, errors.weight_gradient)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--problems", type=int, default=PROBLEMS, help="(default %(default)s)")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of each (default %(default)s)")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the fp32 case")
    options = parser.parse_args()
    wide, narrow = real_cases(options.problems, options.tokens)
    true = testing.truth(wide)
    print(
        f"{len(wide.student_hidden)} response tokens of SmolLM2-135M-Instruct, mean KL "
        f"{float(true.per_token.mean()):.2e} nats; relative errors of loss, dH, dW"
    )
    measure(wide, narrow)
    if options.save:
        from safetensors.torch import save_file

        names = ("student_hidden", "student_weight", "teacher_hidden")
        save_file({name: getattr(wide, name).contiguous() for name in names}, options.save)
        print(f"written: {options.save}")


if __name__ == "__main__":
    main()
