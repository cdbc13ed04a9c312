"""What an update says of the columns it left out: means over tokens, bounds over micro-batches."""

import dataclasses

import pytest
import torch

from opsdc.config.settings import LossConfig
from opsdc.method.batch import Pair
from opsdc.method.measures import of_left_out, of_tokens
from opsdc.ranks.talk import ALONE
from opsdc_kernels import linear_divergence


def statistics(n, **columns):
    """Statistics of n tokens, with these measures of their columns."""
    g = torch.Generator().manual_seed(n)
    states = [torch.randn(n, 8, generator=g) for _ in range(2)]
    weight = torch.randn(50, 8, generator=g)
    _, stats = linear_divergence(states[0], weight, states[1], weight, return_stats=True)
    return dataclasses.replace(stats, **{k: torch.tensor(v) for k, v in columns.items()})


BATCHES = [
    {"kept_share": 0.5, "gemm_units": 4.0, "hidden_gradient_bound": 0.001,
     "weight_gradient_bound": 0.004, "divergence_error": [0.1, 0.2, 0.3]},
    {"kept_share": 0.1, "gemm_units": 2.0, "hidden_gradient_bound": 0.003,
     "weight_gradient_bound": 0.002, "divergence_error": [0.4]},
    {"kept_share": 1.0, "gemm_units": 3.0, "hidden_gradient_bound": 0.0,
     "weight_gradient_bound": 0.0, "divergence_error": [0.0, 0.0]},
]  # fmt: skip


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1,)])
def test_bounds_are_the_largest_and_shares_the_means_over_tokens(order):
    batches = [BATCHES[i] for i in order]
    tokens = [len(b["divergence_error"]) for b in batches]
    stats = [statistics(n, **b) for n, b in zip(tokens, batches)]
    pairs = [Pair(student_prompt_ids=[1], teacher_prompt_ids=[1], response_ids=[2] * sum(tokens))]
    found = of_left_out(1.0, 1.0, stats, pairs, LossConfig(skip_tolerance=0.01), ALONE)

    def mean(key):
        return sum(n * b[key] for n, b in zip(tokens, batches)) / sum(tokens)

    lacking = sum(sum(b["divergence_error"]) for b in batches) / sum(tokens)
    expected = {
        "kept_columns_share": mean("kept_share"),
        "loss_gemm_units": mean("gemm_units"),
        "hidden_gradient_bound": max(b["hidden_gradient_bound"] for b in batches),
        "weight_gradient_bound": max(b["weight_gradient_bound"] for b in batches),
        "kl_missing": lacking,
    }
    assert found == pytest.approx(expected, rel=1e-6)
    assert of_left_out(1.0, 1.0, stats, pairs, LossConfig(), ALONE) == {}


def test_statistics_of_tokens_are_means_over_all_of_them():
    stats = [statistics(n) for n in (1, 5, 2)]
    found = of_tokens(stats, ALONE)
    assert len(found["divergence"]) == 8
    for name in ("student_entropy", "teacher_entropy", "agreement"):
        values = torch.cat([getattr(s, name).double() for s in stats])
        assert found[name] == pytest.approx(float(values.mean()), rel=1e-6)
