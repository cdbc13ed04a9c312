"""Options and tensors on their way through an operator, one head's transform, rows of results."""

import dataclasses
import math
import re

import pytest
import torch
from helpers.kernels import make_problem
from torch import library

from opsdc_kernels.problem import (
    DIVERGENCES,
    OPTIONS,
    SCHEMA,
    STATISTICS,
    TENSORS,
    TRAINED,
    Options,
    Problem,
    Stat,
    mean_factor,
    named,
)
from opsdc_kernels.row_pass import compiled

N, D, V = 3, 4, 7
h, w, ht = torch.randn(N, D), torch.randn(V, D), torch.randn(N, D)
EXAMPLES = {str: "x", float: 0.1 + 0.2, int: 2**40, bool: True}
"""A value of each plain type that no default has."""


def another(name):
    """A value of the option that differs from its default."""
    hint = re.sub(r" \| None", "", {f.name: f.type for f in dataclasses.fields(Options)}[name])
    if hint.startswith("tuple"):
        return (None, 0.3) if name == "logit_softcap" else (1e-3, -0.7)
    return EXAMPLES[{"str": str, "float": float, "int": int, "bool": bool}[hint]]


@pytest.fixture(scope="module")
def through_an_operator():
    """What arrives inside an operator of the common schema."""
    seen = []

    @library.custom_op("opsdc_tests::see", mutates_args=(), schema=f"({SCHEMA}) -> Tensor")
    def see(*arguments):
        seen.append(Problem.of(arguments))
        return torch.zeros(())

    def send(problem):
        see(*problem.arguments)
        return seen.pop()

    return send


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_arrives_as_it_was_sent(through_an_operator, name):
    value = another(name)
    assert value != getattr(Options(), name)
    options = Options(**{name: value})
    problem = dataclasses.replace(make_problem(h, w, ht), options=options)
    assert through_an_operator(problem).options == options
    assert through_an_operator(dataclasses.replace(problem, options=Options())).options == Options()


@pytest.mark.parametrize("name", TENSORS)
def test_every_tensor_arrives_in_its_place(through_an_operator, name):
    problem = make_problem(h, w, ht)
    optional = getattr(problem, name) is None
    sent = torch.full_like(w if optional else getattr(problem, name), 5.0)
    arrived = through_an_operator(dataclasses.replace(problem, **{name: sent}))
    for other in TENSORS:
        want = sent if other == name else getattr(problem, other)
        got = getattr(arrived, other)
        assert got is want is None or torch.equal(got, want)


def test_no_option_holds_a_tensor_and_none_can_be_changed():
    problem = make_problem(h, w, ht)
    assert not any(isinstance(getattr(problem.options, name), torch.Tensor) for name in OPTIONS)
    with pytest.raises(dataclasses.FrozenInstanceError):
        problem.options.beta = 0.3
    assert [TENSORS[i] for i in TRAINED] == ["student_hidden", "student_weight", "student_bias"]


@pytest.mark.parametrize("cap", [None, 3.0])
def test_a_side_is_eq_1(cap):
    bias = torch.randn(V)
    problem = make_problem(
        h, w, ht, student_bias=bias, logit_softcap=(cap, None), logit_scale=(1.3, 0.7),
        temperature=0.6, vocab_size=5,
    )  # fmt: skip
    side = problem.side(0)
    x = (h @ w.T)[:, :5]
    capped = 1.3 * (x + bias[:5])
    capped = (capped if cap is None else cap * torch.tanh(capped / cap)) / 0.6
    made = side.pre * (x + side.bias)
    made = made if side.post is None else side.post * torch.tanh(made)
    torch.testing.assert_close(made, capped)
    assert problem.side(1).pre == 0.7 / 0.6


def test_whose_bias_the_teachers_side_has():
    bias, other = torch.randn(V), torch.randn(V)

    def of(**given):
        return make_problem(h, w, ht, **given).side(1).bias

    assert of(student_bias=bias) is None  # of the difference of hidden states
    assert torch.equal(of(student_bias=bias, logit_scale=(1.0, 2.0)), bias)
    assert torch.equal(of(student_bias=bias, teacher_bias=other), other)
    assert of(student_bias=bias, teacher_weight=w.clone()) is None
    assert torch.equal(of(teacher_weight=w.clone(), teacher_bias=other), other)
    assert make_problem(h, w, ht, student_bias=bias).shared_logits
    assert not make_problem(h, w, ht, student_bias=bias, teacher_bias=other).shared_logits


def test_statistics_have_the_names_of_the_user_and_the_rows_of_c():
    from opsdc_kernels import DivergenceStats

    assert DivergenceStats.__slots__[: len(Stat)] == STATISTICS
    values = torch.arange(3.0).repeat(2, 1)
    assert list(named(values)) == list(STATISTICS[:2])
    text = compiled.SOURCE.read_text("utf-8")
    enums = [re.findall(r"\w+", x) for x in re.findall(r"enum \{([^}]*)\}", text)]
    assert [stat.name for stat in Stat] in enums
    assert [kind.upper() for kind in DIVERGENCES] in enums


def test_the_mean_divides_by_the_weights():
    weight = torch.tensor([1.0, 0.0, 0.5, 2.0])
    assert math.isclose(float(mean_factor(weight)), 1 / float(weight.sum()), rel_tol=1e-6)
    assert float(mean_factor(0 * weight)) == 0
