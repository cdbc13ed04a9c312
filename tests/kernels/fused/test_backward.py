"""16-bit inputs: what rounding the gradient tile costs and what the correction takes back.

The interpreter truncates to bf16 where a GPU rounds to nearest: a harsher test of the correction.
"""

import functools
import os

import pytest
import torch
from helpers.saturated import failures, gradient_of_heads

from opsdc_kernels import linear_divergence

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("run by test_interpreter.py", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
N, V, D = 8, 130, 48
DIVERGENCES = ("reverse_kl", "forward_kl", "jsd")


def inputs(dtype, common=0.0, near=0.1, shared=False, seed=0):
    """Hidden states and heads; `common` scales a direction that all rows of both heads share."""
    g = torch.Generator().manual_seed(seed)
    h = torch.randn(N, D, generator=g)
    direction = torch.randn(D, generator=g)
    h = h - 0.9 * torch.outer(h @ direction, direction) / direction.square().sum()
    w = torch.randn(V, D, generator=g) / D**0.5 + common * direction / D**0.5
    ht = h + near * torch.randn(N, D, generator=g)
    wt = None if shared else (w + near * torch.randn(V, D, generator=g) / D**0.5).to(dtype)
    return h.to(dtype), w.to(dtype), ht.to(dtype), wt


def run(backend, tensors, **options):
    wide = [x if x is None or backend == "fused" else x.double() for x in tensors]
    h, w = wide[0].clone().requires_grad_(), wide[1].clone().requires_grad_()
    loss = linear_divergence(h, w, *wide[2:], backend=backend, **options)
    loss.backward()
    return loss.detach(), h.grad, w.grad


def relative(got, truth):
    return ((got.double() - truth).norm() / truth.norm()).item()


LIMITS = {torch.float16: (1e-3, 1e-3), torch.bfloat16: (8e-3, 8e-3)}


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", LIMITS)
def test_loss_is_exact_and_gradients_are_rounded_once(dtype, divergence, shared):
    tensors = inputs(dtype, shared=shared)
    got, truth = (run(b, tensors, divergence=divergence) for b in ("fused", "reference"))
    assert relative(got[0], truth[0]) <= 1e-5
    for mine, other, limit in zip(got[1:], truth[1:], LIMITS[dtype]):
        assert mine.dtype == dtype
        assert relative(mine, other) <= limit


@pytest.mark.parametrize("options", [{}, {"logit_softcap": 60.0}, {"vocab_size": 70}])
def test_common_direction_of_the_head_costs_nothing(options, monkeypatch):
    """Without the residual correction the truncated bf16 tile is off by several times as much."""
    from opsdc_kernels.fused import backward

    tensors = inputs(torch.bfloat16, common=30.0)
    if "vocab_size" in options:
        tensors[1][70:] = -10.0  # rows that are not scored must not enter the mean row
    truth = run("reference", tensors, **options)
    corrected = relative(run("fused", tensors, **options)[1], truth[1])
    original = backward.gradient_tile

    def without(*arguments, **options):
        residual, dbias = original(*arguments, **options)
        return torch.zeros_like(residual), dbias

    monkeypatch.setattr(backward, "gradient_tile", without)
    uncorrected = relative(run("fused", tensors, **options)[1], truth[1])
    assert corrected <= 1e-2
    assert uncorrected >= 3 * corrected


@pytest.mark.parametrize("near", [1e-6, 1e-3])
def test_shared_head_of_16_bits_resolves_small_differences(near):
    """One 16-bit part of the difference would be off by up to 4e-3; two are not."""
    h, w, _, _ = inputs(torch.bfloat16)
    g = torch.Generator().manual_seed(5)
    base = h.float() * (1 + 2**-7 * torch.randint(-1, 2, h.shape, generator=g))
    ht = (base + near * torch.randn(N, D, generator=g)).to(torch.bfloat16)
    for divergence in DIVERGENCES:
        got, truth = (
            run(b, (h, w, ht, None), divergence=divergence) for b in ("fused", "reference")
        )
        assert relative(got[0], truth[0]) <= 1e-5


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("near", [1e-2, 3.0, 30.0])
def test_fp16_neither_underflows_nor_overflows(near, divergence):
    """The row scale holds gradients of rows with tiny and with huge divergence in fp16's range."""
    h, w, ht, wt = inputs(torch.float16, near=near)
    ht[0] = h[0] + (ht[0] - h[0]) * 2**-5
    weight = torch.logspace(-6, 0, N)
    got, truth = (
        run(b, (h, w, ht, wt), divergence=divergence, token_weight=weight, reduction="mean")
        for b in ("fused", "reference")
    )
    assert relative(got[0], truth[0]) <= 1e-4
    assert relative(got[1], truth[1]) <= 2e-3
    assert relative(got[2], truth[2]) <= 2e-3


def test_saturated_rows():
    """Gradients of rows whose student and teacher are sure of different tokens."""
    assert not failures(functools.partial(gradient_of_heads, backend="fused"))


def test_scale_bounds_the_gradient():
    """Scaled gradients stay at most 2**14, and not far below it where one column holds the mass."""
    from opsdc_kernels.problem import Options
    from opsdc_kernels.reference import divergence_of_logits
    from opsdc_kernels.triton.scaling import GRADIENT_LIMIT_LOG2, gradient_scale

    g = torch.Generator().manual_seed(0)
    for divergence in DIVERGENCES:
        for size in (0.1, 3.0, 40.0):
            for near in (1e-6, 1e-2, 1.0, 10.0):
                s = (size * torch.randn(200, 50, generator=g)).double().requires_grad_()
                d = near * torch.randn(200, 50, generator=g).double()
                value = divergence_of_logits(
                    s, s.detach() + d, d - (s - s.detach()), divergence, 0.4
                )
                (dz,) = torch.autograd.grad(value.sum(), s)
                dz = dz / 0.6 if divergence == "jsd" else dz
                value = value.detach().float()
                options = Options(divergence=divergence, beta=0.4)
                scale = gradient_scale(value, value, options, torch.float16)
                assert torch.equal(torch.frexp(scale).mantissa, torch.full((200,), 0.5))
                scaled = (dz.abs().amax(1) * scale).max()
                assert 2**6 <= scaled <= 2**GRADIENT_LIMIT_LOG2
