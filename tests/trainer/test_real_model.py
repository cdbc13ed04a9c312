"""The demo's own model: what holds on a tiny random one must hold on it."""

import math

import pytest
import torch
from helpers.passes import both_passes

from opsdc import checks
from opsdc.config.settings import OPSDCConfig, TeacherConfig
from opsdc.data.prompted import prompted_sets
from opsdc.method.batch import Layout, Pair
from opsdc.method.teacher import Teacher
from opsdc.models.head import read_head
from opsdc.models.load import load_model, load_tokenizer
from opsdc.rollout.base import Request, SamplingParams, difference
from opsdc.rollout.hf import HFSampler

pytestmark = [pytest.mark.model, pytest.mark.whole]


@pytest.fixture(scope="module")
def setting(smollm2):
    """The demo's model moved a little away from its teacher, and real sampled responses."""
    config = OPSDCConfig.load("smollm2-cpu")
    tokenizer = load_tokenizer(config.model)
    problems = prompted_sets(config, tokenizer).training
    model = load_model(config.model)
    batch = problems.batch(1, 4)
    sampler = HFSampler(model, tokenizer, seed=0)
    rollouts = sampler.generate(
        [Request(key=p.problem.id, prompt_ids=p.prompts.student_ids) for p in batch],
        SamplingParams(max_new_tokens=20),
        label="test",
    )
    pairs = [
        Pair(
            student_prompt_ids=p.prompts.student_ids,
            teacher_prompt_ids=p.prompts.teacher_ids,
            response_ids=r.response_ids[: 20 - 4 * i],
        )
        for i, (p, r) in enumerate(zip(batch, rollouts))
    ]
    teacher = Teacher(model, TeacherConfig(mode="frozen"))
    zero = checks.same_prompt_divergence(model, teacher, pairs, layout(), config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * p.std(), alpha=1e-3)
    return model, teacher, pairs, config, zero


def layout(packed=False, max_tokens=10_000):
    return Layout(packed=packed, max_tokens=max_tokens, pad_id=2, dtype=torch.float32)


def gradients(setting, where, **loss):
    model, teacher, pairs, config, _ = setting
    config = OPSDCConfig.from_dict({**config.to_dict(), "loss": loss})
    model.zero_grad(set_to_none=True)
    value, _, stats = both_passes(model, teacher, pairs, where, config)
    flat = torch.cat([p.grad.flatten() for p in model.parameters()]).double()
    return value, flat, torch.cat([s.divergence for s in stats])


def test_same_prompt_gives_exactly_zero(setting):
    assert setting[-1] == 0


def test_packed_equals_single_or_packing_is_off(setting):
    model, _, pairs, config, _ = setting
    sequences = [[*p.student_prompt_ids, *p.response_ids] for p in pairs]
    assert checks.packing_difference(model, sequences, torch.float32) <= 1e-4
    assert not checks.choose_packing(model, config, sequences)[0]


def test_layouts_and_backends_give_one_gradient(setting):
    value, base, divergence = gradients(setting, layout())
    assert value > 1e-3
    # Different heads: logits of up to 44, rounded to float32 and subtracted, condition what two
    # backends agree on, and each of the two carries that error.
    conditioning = 2 * 3e-7 * 44 / math.sqrt(2 * float(divergence.median()))
    for where, loss, tolerance in (
        (layout(max_tokens=200), {}, 1e-5),
        (layout(max_tokens=1), {}, 1e-5),
        (layout(packed=True), {}, 1e-5),
        (layout(), {"backend": "reference"}, 1e-5 + conditioning),
    ):
        other_value, other, _ = gradients(setting, where, **loss)
        assert other_value == pytest.approx(value, rel=tolerance)
        assert float((other - base).norm() / base.norm()) <= tolerance


@pytest.mark.slow
def test_float32_samples_are_those_of_a_16_bit_forward_to_its_rounding(smollm2):
    """Mean and largest |Δ log p|: the sampler as it is, and under autocast, from the loss's logits.

    Those come from 16-bit hidden states and stay in float32.
    """
    config = OPSDCConfig.load("smollm2-cpu")
    tokenizer = load_tokenizer(config.model)
    problems = prompted_sets(config, tokenizer).training
    model = load_model(config.model)
    requests = [
        Request(key=p.problem.id, prompt_ids=p.prompts.student_ids) for p in problems.batch(1, 6)
    ]
    sampler = HFSampler(model, tokenizer, seed=0)
    found = {}
    for name, enabled in (("as it is", False), ("autocast", True)):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            rollouts = sampler.generate(requests, SamplingParams(max_new_tokens=24), label="test")
        sampled, scored = [], []
        for r in rollouts:
            ids, n = torch.tensor([[*r.prompt_ids, *r.response_ids]]), len(r.response_ids)
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                hidden = model.get_decoder()(input_ids=ids).last_hidden_state[0, -n - 1 : -1]
            log_p = read_head(model).logits(hidden).log_softmax(-1)
            scored += log_p.gather(1, ids[0, -n:, None])[:, 0].tolist()
            sampled += r.logprobs
        found[name] = difference(sampled, scored)
        print(f"{name}: {found[name][0]:.4f} and {found[name][1]:.3f} over {len(scored)} tokens")
    assert 1e-3 < found["as it is"][0] < 0.03
    assert found["as it is"][0] < found["autocast"][0]


@pytest.mark.slow
def test_the_demo_resumes_bit_for_bit_in_another_process(smollm2, tmp_path):
    """Two threads, real model, a hard kill between two checkpoints, refreshes on the way."""
    import json
    import subprocess
    import sys
    import time

    def start(folder):
        flags = "--train.steps 4 --train.save_every 1 --eval.problems 0 --rollout.max_new_tokens 24"
        flags += f" --teacher.mode refresh --teacher.refresh_steps 2 --output_dir {folder}"
        return subprocess.Popen([sys.executable, "-m", "opsdc", "train", *flags.split()])

    def record(folder):
        rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        return [{k: v for k, v in row.items() if not k.startswith("perf/")} for row in rows]

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(whole).wait() == 0
    victim = start(killed)
    while not (killed / "checkpoints" / "step-000002").is_dir():
        assert victim.poll() is None
        time.sleep(0.2)
    victim.kill()
    victim.wait()
    assert start(killed).wait() == 0
    assert record(killed) == record(whole)
