import pytest
import torch
from helpers.tiny import byte_tokenizer, tiny_model

from opsdc.rollout.base import Request, SamplingParams
from opsdc.rollout.hf import HFSampler, eos_token_ids
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


def most_likely(logits, k):
    return logits.where(logits >= logits.topk(k).values[-1], -torch.inf).softmax(-1)


def nucleus(p, mass):
    """The fewest tokens that hold the mass."""
    order = p.argsort(descending=True)
    kept = order[: int((p[order].cumsum(0) < mass).sum()) + 1]
    return torch.zeros_like(p).index_put((kept,), p[kept] / p[kept].sum())


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({}, lambda z: z.softmax(-1)),
        ({"temperature": 0.5}, lambda z: (z / 0.5).softmax(-1)),
        ({"top_k": 3}, lambda z: most_likely(z, 3)),
        ({"top_p": 0.3}, lambda z: nucleus(z.softmax(-1), 0.3)),
        # The nucleus is taken of what top-k leaves, as vLLM does it: of 3 tokens, not of half.
        ({"top_k": 3, "top_p": 0.5}, lambda z: nucleus(most_likely(z, 3), 0.5)),
        (
            {"top_k": 9, "top_p": 0.9, "temperature": 0.5},
            lambda z: nucleus(most_likely(z / 0.5, 9), 0.9),
        ),
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


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        (None, 2, [2]),
        (7, 9, [7, 9, 2]),
        ([7, 8], [8, 9], [7, 8, 9, 2]),
        (None, None, [2]),
        (None, [11, 12], [11, 12, 2]),
    ],
)
def test_every_id_that_ends_a_response_does(generation, config, expected):
    """By the generation config, the model's config and the tokenizer: any of them may have more."""
    model = tiny_model()
    model.generation_config.eos_token_id = generation
    model.config.eos_token_id = config
    assert eos_token_ids(model, byte_tokenizer()) == expected
    found = generate(requests(), model=model, max_new_tokens=200)
    ends = {r.response_ids[-1] for r in found if r.finished}
    assert ends <= set(expected)
    assert len(expected) == 1 or ends - {2}
    assert not any(set(r.response_ids[:-1]) & set(expected) for r in found)


@pytest.mark.parametrize("fails", [False, True])
def test_sampling_is_without_dropout_and_leaves_the_model_as_it_was(fails):
    model = tiny_model(attention_dropout=0.5)
    plain = ids(generate(requests(), model=tiny_model().eval()))
    for training in (True, False):
        model.train(training)
        model.generation_config.temperature = 0.3
        if fails:
            hook = model.lm_head.register_forward_hook(lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                generate(requests(), model=model)
            hook.remove()
        assert ids(generate(requests(), model=model)) == plain
        assert {m.training for m in model.modules()} == {training}
        assert model.generation_config.temperature == 0.3
