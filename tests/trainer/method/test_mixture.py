"""Teachers mixed in hidden space against the materialised geometric mixture in float64."""

import copy
import math

import pytest
import torch
from helpers.passes import both_passes
from helpers.tiny import tiny_model

from opsdc import Distiller, OPSDCConfig, collate
from opsdc.config.settings import LossConfig, TeacherConfig
from opsdc.errors import ConfigError, DataError, ModelError
from opsdc.method.batch import Layout, Pair
from opsdc.method.loss import distillation_loss
from opsdc.method.mixture import CONCISE, PLAIN, START, Mix, blend, widened
from opsdc.method.teacher import Teacher
from opsdc.models.adapters import unwrap
from opsdc.models.head import Head

GAMMAS = (-0.5, 0.0, 0.5, 1.0, 2.0)
CONFIG = OPSDCConfig.from_dict({"loss": {"normalization": "token"}})


def pairs(dial=1.0, against=True):
    generator = torch.Generator().manual_seed(5)

    def ids(n):
        return torch.randint(3, 260, (n,), generator=generator).tolist()

    return [
        Pair(
            student_prompt_ids=ids(4),
            teacher_prompt_ids=ids(9),
            against_prompt_ids=ids(7) if against else (),
            response_ids=ids(n),
            dial=dial,
        )
        for n in (5, 3, 6)
    ]


def layout(max_tokens=10_000):
    return Layout(packed=False, max_tokens=max_tokens, pad_id=0, dtype=torch.float32)


def move(model, seed, size=0.05):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator), alpha=size)


def with_adapter():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    lora = peft.LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0)
    return peft.get_peft_model(tiny_model("qwen3", tied=False), lora)


def truth(models, batch, weights_of):
    """(loss, gradients by name) in float64, from materialised log-probabilities.

    models: student, and the one that scores each context; weights_of(pair) weighs the contexts.
    """
    wide = {name: copy.deepcopy(model).double().eval() for name, model in models.items()}
    student = wide.pop("student")
    count = sum(len(p.response_ids) for p in batch)
    total = torch.zeros((), dtype=torch.float64)
    for p in batch:
        prompts = {"concise": p.teacher_prompt_ids, "against": p.against_prompt_ids}

        def log_probs(model, prompt, response=p.response_ids):
            row = torch.tensor([[*prompt, *response]])
            logits = unwrap(model)(input_ids=row, use_cache=False).logits[0]
            return logits[len(prompt) - 1 : -1].log_softmax(-1)

        log_q = log_probs(student, p.student_prompt_ids)
        with torch.no_grad():
            mixed = sum(
                weight * log_probs(wide[name], prompts.get(name, p.student_prompt_ids))
                for name, weight in weights_of(p).items()
            ).log_softmax(-1)
        total = total + (log_q.exp() * (log_q - mixed)).sum() / count
    total.backward()
    return float(total.detach()), {
        n: p.grad for n, p in student.named_parameters() if p.requires_grad
    }


def assert_equal_to(model, loss, expected):
    value, gradients = expected
    # The body's own rounding in float32; the mixture's is in the test below.
    assert loss == pytest.approx(value, rel=1e-5)
    for name, p in model.named_parameters():
        if p.requires_grad:
            error = float((p.grad.double() - gradients[name]).norm())
            assert error <= 2e-5 * float(gradients[name].norm()), name


def three_weights(anchor=0.0, **config):
    """Student, teacher and start model with weights of their own, the teacher refreshed once."""
    model = tiny_model()
    start = copy.deepcopy(model)
    mode = {"mode": "refresh", "refresh_steps": 1}
    teacher = Teacher(model, TeacherConfig(**{**mode, "anchor": anchor, **config}))
    move(model, 1)
    teacher.after_update(1)
    scoring = copy.deepcopy(model)
    move(model, 2)
    return model, teacher, {
        "student": model,
        "concise": scoring,
        "plain": scoring,
        "against": scoring,
        "start": start,
    }  # fmt: skip


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("anchor", [0.0, 0.25])
@pytest.mark.parametrize("own_head", [False, True])
def test_given_hidden_states_the_mixture_is_exact(gamma, anchor, own_head, dtype, tolerance):
    """Value, dH and dW of one blended teacher against Π p_k^w_k from logits in float64."""
    generator = torch.Generator().manual_seed(7)

    def normal(*shape, size=1.0):
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * size).to(dtype)

    n, dim, vocab = 12, 16, 97
    weight, start_weight = normal(vocab, dim, size=0.5), normal(vocab, dim, size=0.5)
    bias, start_bias = normal(vocab), normal(vocab)
    student = normal(n, dim)
    hidden = {name: student + normal(n, dim, size=0.3) for name in (CONCISE, PLAIN, START)}
    weights = Mix(dial=gamma, anchor=anchor).weights(start_is_teacher=False)
    head = Head(weight=weight, bias=bias)
    start = Head(weight=start_weight, bias=start_bias) if own_head else head
    wide = own_head and anchor > 0
    teacher = widened(head, start, anchor) if wide else head
    w, h = weight.clone().requires_grad_(), student.clone().requires_grad_()
    loss, _ = distillation_loss(
        h,
        Head(weight=w, bias=bias),
        blend({name: hidden[name] for name in weights}, weights, wide=wide).to(dtype),
        teacher,
        torch.ones(n, dtype=dtype),
        LossConfig(),
    )
    loss.backward()

    w64, h64 = (x.clone().double().requires_grad_() for x in (weight, student))
    log_q = (h64 @ w64.T + bias.double()).log_softmax(-1)
    mixed = 0.0
    for name, share in weights.items():
        scoring = start if name == START else head
        logits = hidden[name].double() @ scoring.weight.double().T + scoring.bias.double()
        mixed = mixed + share * logits.log_softmax(-1)
    expected = (log_q.exp() * (log_q - mixed.log_softmax(-1))).sum()
    expected.backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=tolerance)
    for ours, true in ((h.grad, h64.grad), (w.grad, w64.grad)):
        assert float((ours.double() - true).norm() / true.norm()) <= tolerance


@pytest.mark.parametrize("gamma", GAMMAS)
def test_a_dial_is_the_geometric_mixture(gamma):
    model, teacher, models = three_weights()
    batch = pairs(dial=gamma)
    expected = truth(models, batch, lambda p: {"concise": gamma, "plain": 1 - gamma})
    loss, *_ = both_passes(model, teacher, batch, layout(), CONFIG)
    assert_equal_to(model, loss, expected)


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("anchor", [0.1, 0.6])
def test_an_anchor_under_a_head_that_has_moved_is_one_wide_teacher(gamma, anchor):
    model, teacher, models = three_weights(anchor)
    assert teacher.is_wide
    batch = pairs(dial=gamma)
    expected = truth(
        models,
        batch,
        lambda p: {
            "concise": (1 - anchor) * gamma,
            "plain": (1 - anchor) * (1 - gamma),
            "start": anchor,
        },
    )
    loss, *_ = both_passes(model, teacher, batch, layout(max_tokens=30), CONFIG)
    assert_equal_to(model, loss, expected)


def test_an_anchor_with_an_adapter_needs_no_second_head():
    model = with_adapter()
    start = copy.deepcopy(model)
    config = TeacherConfig(mode="refresh", refresh_steps=1, anchor=0.3)
    teacher = Teacher(model, config)
    move(model, 1)
    teacher.after_update(1)
    scoring = copy.deepcopy(model)
    move(model, 2)
    assert not teacher.is_wide
    batch = pairs(dial=0.5)
    models = {"student": model, "concise": scoring, "plain": scoring, "start": start}
    expected = truth(models, batch, lambda p: {"concise": 0.35, "plain": 0.35, "start": 0.3})
    loss, *_ = both_passes(model, teacher, batch, layout(), CONFIG)
    assert_equal_to(model, loss, expected)


def test_a_style_is_subtracted():
    model, teacher, models = three_weights(against="Be wordy, please.", against_weight=0.4)
    batch = pairs(dial=1.5)
    expected = truth(models, batch, lambda p: {"concise": 1.5, "plain": -0.1, "against": -0.4})
    loss, *_ = both_passes(model, teacher, batch, layout(), CONFIG)
    assert_equal_to(model, loss, expected)


def test_responses_of_one_step_have_dials_of_their_own():
    """A dial of 0 is the plain teacher, also where another style is subtracted elsewhere."""
    model, teacher, models = three_weights(against="Be wordy, please.", against_weight=0.4)
    first, second, third = pairs()
    batch = [first, *(Pair(**{f: getattr(p, f) for f in p.__slots__} | {"dial": d})
                      for p, d in ((second, 0.0), (third, 0.5)))]  # fmt: skip

    def weights_of(p):
        if p.dial == 0:
            return {"plain": 1.0}
        return {"concise": p.dial, "plain": 1 - p.dial + 0.4, "against": -0.4}

    expected = truth(models, batch, weights_of)
    loss, *_ = both_passes(model, teacher, batch, layout(), CONFIG)
    assert_equal_to(model, loss, expected)


def forwards(monkeypatch, model, teacher, batch):
    from opsdc.method import update

    calls = []
    real = update.hidden_states

    def counted(model, tokens):
        if not torch.is_grad_enabled():
            calls.append(tokens.input_ids.shape)
        return real(model, tokens)

    monkeypatch.setattr(update, "hidden_states", counted)
    both_passes(model, teacher, batch, layout(), CONFIG)
    return len(calls)


@pytest.mark.parametrize(
    ("config", "dial", "refreshed", "count"),
    [
        ({}, 1.0, True, 1),
        ({}, 0.0, True, 1),
        ({}, 0.5, True, 2),
        ({"anchor": 0.2}, 1.0, False, 2),  # the start model is the teacher: its plain context
        ({"anchor": 0.2}, 1.0, True, 2),
        ({"anchor": 0.2}, 0.5, True, 3),
        ({"against": "Be wordy.", "against_weight": 1.0}, 1.0, True, 3),
        ({"against": "Be wordy.", "against_weight": 1.0}, 2.0, True, 2),  # plain weighs 0
    ],
)
def test_a_context_costs_one_forward_and_none_without_weight(
    monkeypatch, config, dial, refreshed, count
):
    model = tiny_model()
    teacher = Teacher(model, TeacherConfig(mode="refresh", refresh_steps=1, **config))
    if refreshed:
        move(model, 1)
        teacher.after_update(1)
    assert forwards(monkeypatch, model, teacher, pairs(dial=dial)) == count


def test_a_dial_of_one_is_bit_identical_to_no_mixture():
    results = []
    for config in ({}, {"dial": 1.0, "anchor": 0.0}):
        model = tiny_model()
        teacher = Teacher(model, TeacherConfig(mode="frozen", **config))
        move(model, 3)
        loss, *_ = both_passes(model, teacher, pairs(), layout(), CONFIG)
        results.append((loss, [p.grad.clone() for p in model.parameters()]))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1]))


def test_a_dial_of_zero_right_after_a_refresh_changes_nothing():
    model = tiny_model()
    teacher = Teacher(model, TeacherConfig(mode="refresh", refresh_steps=1))
    move(model, 1)
    teacher.after_update(1)
    loss, *_ = both_passes(model, teacher, pairs(dial=0.0), layout(), CONFIG)
    assert loss == 0
    assert all(float(p.grad.abs().max()) == 0 for p in model.parameters())


def test_a_capped_head_is_refused_in_words():
    model = tiny_model()
    model.config.final_logit_softcapping = 30.0
    for config in ({"dial": 0.5}, {"anchor": 0.1}, {"against": "Be wordy."}, {"target": 0.5}):
        with pytest.raises(ModelError, match="caps its logits softly"):
            Teacher(model, TeacherConfig(**config))
    Teacher(model, TeacherConfig())


def test_the_distiller_mixes_the_same_teacher():
    student, scoring, start = (tiny_model(seed=s) for s in (0, 1, 2))
    batch = pairs()
    mix = Mix(dial=0.7, anchor=0.2, against=0.3)
    contexts = {
        "concise": 0.8 * 0.7,
        "plain": 0.8 * (0.3 + 0.3),
        "against": -0.8 * 0.3,
        "start": 0.2,
    }
    models = dict.fromkeys(("concise", "plain", "against"), scoring)
    expected = truth({**models, "student": student, "start": start}, batch, lambda p: contexts)
    distiller = Distiller(student, scoring, mix=mix, start=start)
    loss = distiller(**collate(batch))["loss"]
    loss.backward()
    assert_equal_to(student, float(loss.detach()), expected)


def test_the_distiller_with_an_adapter_has_its_start_in_the_teacher():
    model = with_adapter()
    base = copy.deepcopy(model).unload()
    move(model, 2)
    batch = pairs(against=False)
    models = {"student": model, "concise": base, "plain": base}
    expected = truth(models, batch, lambda p: {"concise": 0.45, "plain": 0.55})
    distiller = Distiller(model, mix=Mix(dial=0.5, anchor=0.1))
    loss = distiller(**collate(batch))["loss"]
    loss.backward()
    assert_equal_to(model, float(loss.detach()), expected)


def test_the_distiller_says_what_a_mixture_lacks():
    student, teacher = tiny_model(), tiny_model(seed=1)
    distiller = Distiller(student, teacher, mix=Mix(against=0.5))
    with pytest.raises(DataError, match="against_prompt_ids"):
        distiller(**collate(pairs(against=False)))
    teacher.config.final_logit_softcapping = 30.0
    with pytest.raises(ModelError):
        Distiller(student, teacher, mix=Mix(dial=0.5))


@pytest.mark.parametrize(
    ("teacher", "word"),
    [
        ({"dial": 5}, "teacher.dial must be"),
        ({"anchor": 1.0}, "teacher.anchor must be"),
        ({"against": " "}, "teacher.against"),
        ({"against_weight": 0}, "teacher.against_weight"),
        ({"target": 0.5, "dial": 2.5}, "teacher.dial_max"),
    ],
)
def test_settings_of_the_mixture(teacher, word):
    with pytest.raises(ConfigError, match=word):
        OPSDCConfig.from_dict({"teacher": teacher})


def test_weights_of_contexts_sum_to_one():
    for mix in (Mix(), Mix(dial=0.3), Mix(dial=-0.5, anchor=0.4, against=1.2)):
        for start_is_teacher in (True, False):
            assert math.isclose(sum(mix.weights(start_is_teacher=start_is_teacher).values()), 1.0)
