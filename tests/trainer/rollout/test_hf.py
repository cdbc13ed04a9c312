import pytest
import torch
from helpers.tiny import byte_tokenizer, tiny_model

from opsdc.rollout.base import Request, SamplingParams
from opsdc.rollout.hf import HFSampler
from opsdc.rollout.weights import sequence_logprobs

PROMPTS = [[1, 40 + i] + [100 + i] * (i % 5) for i in range(9)]


def generate(requests, seed=0, model=None, **params):
    sampler = HFSampler(model or tiny_model(), byte_tokenizer(), seed=seed)
    sampler.push(sampler._model, 3)
    settings = SamplingParams(**{"max_new_tokens": 16, **params})
    return sampler.generate(requests, settings, label="test")


def requests(prefix="a"):
    return [Request(key=f"{prefix}/{i}", prompt_ids=p) for i, p in enumerate(PROMPTS)]


def ids(rollouts):
    return [r.response_ids for r in rollouts]


def test_samples_follow_the_key_and_not_the_batch():
    together = generate(requests())
    assert ids(generate(requests(), batch_size=2)) == ids(together)
    assert ids(generate(requests()[::-1])) == ids(together)[::-1]
    assert ids(generate(requests()[3:4])) == ids(together)[3:4]
    assert ids(generate(requests("b"))) != ids(together)
    assert ids(generate(requests(), seed=1)) != ids(together)


def test_rollouts_end_at_the_end_token_or_the_cap():
    for rollout in generate(requests(), max_new_tokens=200):
        assert rollout.weights_version == 3
        assert len(rollout.response_ids) <= 200
        assert rollout.finished == (rollout.response_ids[-1] == 2)
        assert 2 not in rollout.response_ids[:-1]
        assert rollout.finished or len(rollout.response_ids) == 200


def test_logprobs_are_the_models_own_whatever_is_sampled():
    """At temperature 1 and over the whole vocabulary, beside padding and behind others' ends."""
    model = tiny_model()
    for params in ({}, {"temperature": 0.5, "top_k": 9}, {"temperature": 0.0}):
        found = generate(requests(), model=model, max_new_tokens=60, **params)
        assert len({len(r.response_ids) for r in found}) > 1 or params
        for r in found:
            own = sequence_logprobs(model, [*r.prompt_ids, *r.response_ids], torch.float32)
            assert r.logprobs == pytest.approx(own[len(r.prompt_ids) - 1 :], abs=3e-5)
            assert r.is_finite


def test_greedy_is_argmax():
    model = tiny_model()
    (rollout,) = generate([Request(key="x", prompt_ids=[1, 50])], temperature=0.0, model=model)
    ids_so_far = [1, 50]
    with torch.no_grad():
        for token in rollout.response_ids:
            assert int(model(torch.tensor([ids_so_far])).logits[0, -1].argmax()) == token
            ids_so_far.append(token)


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({}, lambda z: z.softmax(-1)),
        ({"temperature": 0.5}, lambda z: (z / 0.5).softmax(-1)),
        ({"top_k": 3}, lambda z: z.where(z >= z.topk(3).values[-1], -torch.inf).softmax(-1)),
    ],
)
def test_first_tokens_have_the_models_distribution(params, expected):
    model, n = tiny_model(initializer_range=0.05), 4000
    many = [Request(key=str(i), prompt_ids=[1, 50]) for i in range(n)]
    found = generate(many, model=model, max_new_tokens=1, batch_size=n, **params)
    counts = torch.bincount(torch.tensor([r.response_ids[0] for r in found]), minlength=264)
    with torch.no_grad():
        p = expected(model(torch.tensor([[1, 50]])).logits[0, -1].double())
    # Pearson's statistic over cells with enough mass; 5 standard deviations of its own law.
    cells = p * n >= 5
    statistic = float(((counts - p * n)[cells] ** 2 / (p * n)[cells]).sum())
    degrees = max(int(cells.sum()) - 1, 1)
    assert statistic < degrees + 5 * (2 * degrees) ** 0.5
    assert int(counts[p == 0].sum()) == 0


def test_the_folders_generation_config_does_not_leak():
    model = tiny_model()
    plain = ids(generate(requests(), model=model))
    model.generation_config.top_k = 1
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.temperature = 0.01
    assert ids(generate(requests(), model=model)) == plain
