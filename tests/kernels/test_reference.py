"""The reference against exact arithmetic, textbook sums and finite differences."""

import itertools

import mpmath
import pytest
import torch

from opsdc_kernels import linear_divergence
from opsdc_kernels.reference import divergence_of_logits, excess

DIVERGENCES = (("reverse_kl", 0.5), ("forward_kl", 0.5), ("jsd", 0.5), ("jsd", 0.1))


def exact(s, t, divergence, beta):
    """The textbook sums with 60 digits, from float64 logits."""
    with mpmath.workdps(60):
        q = [mpmath.exp(mpmath.mpf(float(x))) for x in s]
        p = [mpmath.exp(mpmath.mpf(float(x))) for x in t]
        q = [x / mpmath.fsum(q) for x in q]
        p = [x / mpmath.fsum(p) for x in p]

        def kl(a, b):
            return mpmath.fsum(x * mpmath.log(x / y) for x, y in zip(a, b, strict=True))

        if divergence == "reverse_kl":
            return kl(q, p)
        if divergence == "forward_kl":
            return kl(p, q)
        m = [(1 - mpmath.mpf(beta)) * x + mpmath.mpf(beta) * y for x, y in zip(q, p, strict=True)]
        return (1 - mpmath.mpf(beta)) * kl(q, m) + mpmath.mpf(beta) * kl(p, m)


@pytest.mark.parametrize(("divergence", "beta"), DIVERGENCES)
@pytest.mark.parametrize("distance", [10.0, 1.0, 1e-2, 1e-4, 1e-6, 1e-8])
@pytest.mark.parametrize("scale", [1.0, 12.0])
def test_value_is_exact_to_tiny_divergences(divergence, beta, distance, scale):
    g = torch.Generator().manual_seed(int(scale))
    s = scale * torch.randn(40, generator=g, dtype=torch.float64)
    # Steps of 2^-40 keep t − s exact in float64, so that only the formula is tested.
    step = (distance * torch.randn(40, generator=g, dtype=torch.float64) * 2**40).round() / 2**40
    s = (s * 2**40).round() / 2**40
    got = divergence_of_logits(s[None], (s + step)[None], step[None], divergence, beta)
    want = exact(s, s + step, divergence, beta)
    assert abs(float((mpmath.mpf(float(got)) - want) / want)) < (2e-7 if distance < 1e-7 else 1e-9)


def test_reverse_kl_of_1e_minus_12_is_exact_to_nine_digits():
    s = torch.linspace(-3, 3, 50, dtype=torch.float64).mul(2**30).round() / 2**30
    step = (torch.sin(torch.arange(50.0, dtype=torch.float64)) * 2e-6 * 2**45).round() / 2**45
    want = exact(s, s + step, "reverse_kl", 0.5)
    got = float(divergence_of_logits(s[None], (s + step)[None], step[None], "reverse_kl", 0.5))
    assert 1e-13 < want < 1e-11
    assert abs(float((mpmath.mpf(got) - want) / want)) < 1e-9
    log_q, log_p = torch.log_softmax(s, 0), torch.log_softmax(s + step, 0)
    textbook = float((log_q.exp() * (log_q - log_p)).sum())
    assert abs(textbook / float(want) - 1) > 1e-6  # what the centred form is for


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_excess_series_meets_expm1(dtype):
    x = torch.cat([torch.linspace(-2, 2, 401), torch.tensor([0.2999, 0.3001, -0.3, 1e-6, 0.0])])
    x = x.to(dtype)
    for value, got in zip(x.tolist(), excess(x).tolist(), strict=True):
        with mpmath.workdps(40):
            want = mpmath.expm1(value) - value
        # Above 0.3 the rounding of expm1 shows: its size over f's, times eps.
        assert abs(got - want) <= 8 * torch.finfo(dtype).eps * abs(want)


def inputs(shared, seed=0, N=3, D=2, V=5):
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    return draw(N, D), draw(V, D), draw(N, D), None if shared else draw(V, D)


FLAGS = {
    "plain": {},
    "temperature": {"temperature": 1.7},
    "scale": {"logit_scale": (0.8, 1.3)},
    "softcap": {"logit_softcap": (2.0, 3.0)},
    "all": {"temperature": 0.7, "logit_scale": 1.2, "logit_softcap": 2.5, "vocab_size": 4},
    "weights": {"token_weight": torch.tensor([1.0, 0.0, 0.5], dtype=torch.float64)},
}


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize(("divergence", "beta"), DIVERGENCES)
@pytest.mark.parametrize("flags", FLAGS)
def test_gradcheck(backend, divergence, beta, flags):
    """Library defaults of `gradcheck`: every divergence, flag, reduction, and bias."""
    h, w, ht, wt = inputs(shared=False)
    b, bt = torch.linspace(-1, 1, 5).double(), torch.linspace(1, 0, 5).double()
    for reduction in ("mean", "sum", "none"):

        def f(h, w, b, reduction=reduction):
            return linear_divergence(
                h, w, ht, wt, student_bias=b, teacher_bias=bt, divergence=divergence, beta=beta,
                reduction=reduction, backend=backend, **FLAGS[flags],
            )  # fmt: skip

        leaves = [x.clone().requires_grad_() for x in (h, w, b)]
        assert torch.autograd.gradcheck(f, leaves)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize(("divergence", "beta"), DIVERGENCES)
def test_gradcheck_shared_head(backend, divergence, beta):
    """With a shared head the teacher is a constant, so only the hidden state can be varied."""
    h, w, ht, _ = inputs(shared=True)
    for cap, reduction in itertools.product((None, 2.0), ("mean", "none")):

        def f(h, cap=cap, reduction=reduction):
            return linear_divergence(
                h, w, ht, divergence=divergence, beta=beta, logit_softcap=cap,
                reduction=reduction, backend=backend, temperature=1.3,
            )  # fmt: skip

        assert torch.autograd.gradcheck(f, [h.clone().requires_grad_()])


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_shared_head_gradient_is_that_of_a_detached_copy(backend):
    h, w, ht, _ = inputs(shared=True)
    found = []
    for other in (None, w.clone()):
        weight = w.clone().requires_grad_()
        linear_divergence(h, weight, ht, other, backend=backend).backward()
        found.append(weight.grad)
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-14)


def test_reference_can_be_differentiated_twice():
    h, w, ht, wt = inputs(shared=False)
    assert torch.autograd.gradgradcheck(
        lambda h: linear_divergence(h, w, ht, wt, backend="reference"), [h.requires_grad_()]
    )
