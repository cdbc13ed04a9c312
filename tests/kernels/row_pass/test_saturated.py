"""Gradients of saturated rows, relative to their own size, and Σ_v dz = 0 of each row."""

import functools

import pytest
import torch
from helpers.kernels import mutate_c
from helpers.saturated import TOKENS, errors, failures, gradient_of_heads

from opsdc_kernels import maths
from opsdc_kernels.row_pass import build, compiled, eager, exact, fast


@pytest.mark.whole
@pytest.mark.usefixtures("row_passes")
def test_as_exact_as_fp32_allows():
    assert not failures(gradient_of_heads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_shortcuts(monkeypatch, dtype):
    monkeypatch.setenv(build.SWITCH, "0")
    monkeypatch.setattr(eager, "fast_rows_", lambda *_, **__: None)
    assert not failures(functools.partial(gradient_of_heads, dtype))


def test_truth_is_that_of_the_reference_where_it_has_digits():
    for divergence in ("reverse_kl", "forward_kl", "jsd"):
        found = gradient_of_heads(torch.float64, divergence=divergence, backend="reference")
        assert errors(found, divergence=divergence)[: len(TOKENS)].max() <= 1e-9


def from_zero(x, r0, beta):
    """a itself, whose mean the passes then take off."""
    return maths.log_mixture((x + r0).nan_to_num(neginf=-100.0), beta)


def test_a_measured_from_zero_is_rejected_in_torch(monkeypatch):
    monkeypatch.setenv(build.SWITCH, "0")
    monkeypatch.setattr(exact, "log_mixture_from", from_zero)
    assert failures(gradient_of_heads)


def test_rows_that_hardly_differ_are_left_to_the_exact_pass(monkeypatch):
    monkeypatch.setenv(build.SWITCH, "0")
    monkeypatch.setattr(fast, "NOISE_LIMIT", 1e30)
    assert failures(gradient_of_heads)


@pytest.mark.parametrize(("old", "new"), [
    ("log_one_plus(p->weight[j] * (c + excess(c)))", "a"),
    ("b->d[v][j] - p->middle[j]", "b->d[v][j]"),
    ("sum_a[j] += q * from_mean", "sum_a[j] -= q * excess(from_mean)"),
])  # fmt: skip
def test_other_ways_to_the_mean_are_rejected_in_c(monkeypatch, tmp_path, old, new):
    mutate_c(monkeypatch, tmp_path, compiled, old, new)
    assert failures(gradient_of_heads)
