"""The formulas of the passes against those of their judge, bit for bit, and against exact ones."""

import math

import mpmath
import pytest
import torch

from opsdc_kernels import maths, reference

DTYPES = (torch.float32, torch.float64)


def numbers(dtype):
    """Near 0, around 1 and far: [300, 400]."""
    g = torch.Generator().manual_seed(0)
    parts = [scale * torch.randn(100, 400, generator=g) for scale in (0.1, 1.0, 30.0)]
    return torch.cat(parts).to(dtype)


def equal(got, want):
    """The same bits, NaN for NaN."""
    return torch.equal(got.nan_to_num(-7.0), want.nan_to_num(-7.0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_excess_and_mixture(dtype):
    x = numbers(dtype)
    assert equal(maths.excess(x), reference.excess(x))
    for beta in (0.02, 0.5, 0.9):
        assert equal(maths.log_mixture(x, beta), reference.log_mixture(x, beta))


@pytest.mark.parametrize("dtype", DTYPES)
def test_weighted_excess_and_the_mean_of_exponentials(dtype):
    x, outside = numbers(dtype), torch.zeros(300, 400, dtype=torch.bool)
    outside[:, ::7] = True
    log_w = (20 * x.flip(0).clamp(-1, 1)).masked_fill(outside, -math.inf).log_softmax(1)
    assert equal(
        maths.weighted_excess(log_w, x, log_w + x), reference.weighted_excess(log_w, x, log_w + x)
    )
    c = x.masked_fill(outside, 0.0)
    got, want = (f(log_w, c, outside) for f in (maths.log_mean_exp, reference.log_mean_exp))
    assert equal(got, want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_excess_is_exact_to_rounding(dtype):
    x = torch.cat([torch.linspace(-2, 2, 101), torch.tensor([0.2999, 0.3001, 1e-6])]).to(dtype)
    for value, got in zip(x.tolist(), maths.excess(x).tolist(), strict=True):
        with mpmath.workdps(40):
            want = mpmath.expm1(value) - value
        assert abs(got - want) <= 8 * torch.finfo(dtype).eps * abs(want)


def test_soft_cap_and_its_slope():
    x = torch.linspace(-9, 9, 37, dtype=torch.float64, requires_grad=True)
    want = 3 * torch.tanh(x / 3) / 1.7
    (slope,) = torch.autograd.grad(want.sum(), x)
    torch.testing.assert_close(maths.capped(x.detach().clone(), 3.0, 1.7), want.detach())
    torch.testing.assert_close(maths.slope_of(x.detach(), 3.0) / 1.7, slope)
    assert torch.equal(maths.capped(x.detach().clone(), None, 1.0), x.detach())
