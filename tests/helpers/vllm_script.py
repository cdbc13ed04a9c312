"""A run with vLLM, measured from inside; a process of its own, because vLLM changes its process.

python vllm_script.py CONFIG.yaml TOKENS > measurements (last line, JSON)
"""

import json
import sys

import torch

from opsdc.config.settings import OPSDCConfig
from opsdc.errors import WeightSyncError
from opsdc.rollout.base import Request, SamplingParams
from opsdc.rollout.weights import Weights, sequence_logprobs
from opsdc.train import OPSDCTrainer


def sample(trainer, tokens, name):
    """Rollouts of at least `tokens` tokens together."""
    config, found = trainer.config, []
    while sum(len(r.response_ids) for r in found) < tokens:
        batch = trainer.problems.batch(len(found) + 1, config.rollout.prompts_per_step)
        requests = [
            Request(key=f"{name}/{len(found)}/{i}", prompt_ids=p.prompts.student_ids)
            for i, p in enumerate(batch)
        ]
        params = SamplingParams(max_new_tokens=config.rollout.max_new_tokens)
        found += trainer.sampler.generate(requests, params, label=name)
    return found


def worst(model, rollouts):
    """Largest |log p of the engine − log p of the trainer| over the sampled tokens."""
    gaps = []
    for r in rollouts:
        own = sequence_logprobs(model, [*r.prompt_ids, *r.response_ids], torch.float32)
        pairs = zip(own[-len(r.response_ids) :], r.logprobs, strict=True)
        gaps += [abs(a - b) for a, b in pairs]
    return max(gaps)


def main(path, tokens):
    set_num_threads = torch.set_num_threads
    config = OPSDCConfig.load(path)
    trainer = OPSDCTrainer(None, config)
    trainer.sampler.push(trainer.model, 0)
    before = sample(trainer, tokens, "before")
    again = sample(trainer, tokens, "before")
    found = {
        "tokens": sum(len(r.response_ids) for r in before),
        "start": worst(trainer.model, before),
        "repeats": [r.response_ids for r in before] == [r.response_ids for r in again],
        "finished": sum(r.finished for r in before),
    }
    trainer.train()
    after = sample(trainer, tokens, "after")
    found["versions"] = sorted({r.weights_version for r in after})
    found["after_updates"] = worst(trainer.model, after)
    # What the first test would say of an engine that still had the first weights.
    found["without_sync"] = worst(trainer.model, before)

    sampler, engine = trainer.sampler, trainer.sampler._engine
    if config.rollout.engine == "vllm":
        # A push that reaches nobody.
        call = engine._llm.collective_rpc
        with torch.no_grad():
            for p in trainer.model.parameters():
                if p.requires_grad:
                    p.add_(torch.sign(p), alpha=config.optim.lr)
        engine._llm.collective_rpc = lambda *args, **kwargs: None
        found["lost_push"] = error_of(lambda: sampler.push(trainer.model, 6))
        found["then_generate"] = error_of(lambda: sample(trainer, 1, "lost"))
        engine._llm.collective_rpc = call
        found["push_again"] = error_of(lambda: sampler.push(trainer.model, 6))
        # Not the sampler's own push: the same version name, other weights.
        first = next(p for p in trainer.model.parameters() if p.requires_grad)
        with torch.no_grad():
            first.add_(1e-3)
        engine.load(Weights(trainer.model, torch.float32), sampler._weights_id, sampler._probe_ids)
        found["behind_the_back"] = error_of(lambda: sample(trainer, 1, "changed"))
        # A layer that does not arrive.
        partial = [
            item for item in Weights(trainer.model, torch.float32) if "down_proj" not in item[0]
        ]
        try:
            engine.load(partial, "partial", sampler._probe_ids)
        except ValueError as error:
            found["partial"] = str(error)
        found["threads_function_kept"] = torch.set_num_threads is set_num_threads
    sampler.close()
    print(json.dumps(found))


def error_of(call):
    try:
        call()
    except WeightSyncError as error:
        return str(error)
    return None


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
