"""The research on columns left out: its gradients are those of the definitions it compares."""

import pytest
import torch

from benchmarks.columns_kept import States, errors, kept_share, mean_row, renormalized, sampled
from opsdc_kernels import linear_divergence
from opsdc_kernels.testing import Case

N, D, V, HEIGHT = 48, 16, 300, 16


@pytest.fixture(scope="module")
def case():
    g = torch.Generator().manual_seed(0)
    hidden = 2 * torch.randn(N, D, generator=g)
    weight = torch.randn(V, D, generator=g)
    return Case(hidden, weight, hidden + 0.2 * torch.randn(N, D, generator=g))


@pytest.fixture(scope="module")
def states(case):
    return States.of(case, 1.0)


def dense(found):
    return torch.zeros(len(found.dz_CK), V).index_add_(1, found.columns_K, found.dz_CK)


def test_the_exact_gradient_is_the_losss(case, states):
    hidden, weight = (
        x.clone().requires_grad_() for x in (case.student_hidden, case.student_weight)
    )
    loss = linear_divergence(hidden, weight, case.teacher_hidden, reduction="sum")
    dh, dw = torch.autograd.grad(loss, (hidden, weight))
    hidden_NP, weight_VP = states.exact
    torch.testing.assert_close(hidden_NP, dh @ states.directions_DP, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(weight_VP, dw @ states.directions_DP, rtol=1e-4, atol=1e-4)


def test_all_columns_make_no_error_and_some_make_the_one_of_their_gradient(states):
    every = [torch.arange(V)] * 3
    assert max(errors(states, HEIGHT, every)) < 1e-5
    some = [torch.arange(0, V, 2)] * 3
    whole = [states.gradient(rows) for rows in states.chunks(HEIGHT)]
    parts = [
        dense(renormalized(states, rows, columns, 0))
        for rows, columns in zip(states.chunks(HEIGHT), some, strict=True)
    ]
    gap, true = torch.cat(parts) - torch.cat(whole), torch.cat(whole)
    want = ((gap @ states.weight_VD).norm() / (true @ states.weight_VD).norm()).item()
    # Through random directions.
    assert errors(states, HEIGHT, some)[0] == pytest.approx(want, rel=0.2)


def test_a_mean_row_is_exact_where_the_dropped_rows_are_one(case):
    weight = case.student_weight.clone()
    weight[V // 2 :] = weight[V // 2]
    states = States.of(Case(case.student_hidden, weight, case.teacher_hidden), 1.0)
    kept = [torch.arange(V // 2)] * 3
    assert errors(states, HEIGHT, kept)[0] > 1e-2
    for by_mass in (False, True):
        assert errors(states, HEIGHT, kept, mean_row(by_mass))[0] < 1e-5


def test_sampled_columns_are_right_on_average(states):
    rows, kept = slice(0, HEIGHT), torch.arange(V // 2)
    exact = states.gradient(rows)
    draws = torch.stack([dense(sampled(64)(states, rows, kept, seed)) for seed in range(400)])
    one = (draws[0] - exact).norm()
    assert (draws.mean(0) - exact).norm() < 0.1 * one


def test_a_larger_target_keeps_fewer_columns(states):
    shares = [kept_share(states, HEIGHT, target) for target in (1e-3, 1e-1)]
    assert 0 < shares[1] < shares[0] <= 1
