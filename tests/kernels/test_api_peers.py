"""Defects seen in other libraries' kernels, each a test here. What other files test already is only
named: −inf columns (test_api_infinite_logits), upstream factors and double backward
(chunked/test_op), gradcheck of every divergence (test_reference), negative values (test_api_laws).
"""

import os
import subprocess
import sys

import pytest
import torch

from opsdc_kernels import linear_divergence, testing

DIVERGENCES = ("reverse_kl", "forward_kl", "jsd")


def tensors(n=8, d=6, v=40, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(*s, generator=g).to(dtype) for s in ((n, d), (v, d), (n, d), (v, d))]


def gradients(h, w, ht, wt, **options):
    h, w = h.clone().requires_grad_(), w.clone().requires_grad_()
    loss = linear_divergence(h, w, ht, wt, **options)
    loss.sum().backward()
    return loss.detach(), h.grad, w.grad


@pytest.mark.parametrize("extra", [-3, 5])
def test_vocabularies_of_other_size_raise_instead_of_reading_past_the_end(extra):
    h, w, ht, _ = tensors()
    with pytest.raises(ValueError, match="vocab_size="):
        linear_divergence(h, w, ht, torch.randn(40 + extra, 6))


def test_padded_columns_get_no_phantom_mass():
    """Peaked logits on a vocabulary off every tile size: a padded column of logit 0 would win."""
    for v in (1, 2, 31, 127, 129, 1003):
        h = torch.full((3, 4), 1.0)
        w = torch.full((v, 4), -20.0) + torch.randn(v, 4)
        wt = w + 0.1 * torch.randn(v, 4)
        got = gradients(h, w, h, wt)
        want = gradients(h.double(), w.double(), h.double(), wt.double(), backend="reference")
        for a, b in zip(got, want, strict=True):
            # Subtracting logits of −80 costs 1e-3; a phantom column would cost everything.
            assert (a - b).norm() <= 1e-2 * b.norm() + 1e-9


def test_nan_in_an_ignored_row_poisons_nothing():
    h, w, ht, wt = tensors()
    weight = torch.ones(8)
    weight[3] = 0
    clean = gradients(h, w, ht, wt, token_weight=weight)
    h[3], ht[3] = float("nan"), float("nan")
    for a, b in zip(gradients(h, w, ht, wt, token_weight=weight), clean, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("parts", [1, 2, 4, 8])
@pytest.mark.parametrize("density", [1.0, 0.6, 0.1])
def test_micro_batches_add_up_at_every_mask_density(parts, density):
    """1×B = B×1: sums over parts divided by the weight of the whole."""
    h, w, ht, wt = (x.double() for x in tensors())
    weight = (torch.rand(8, generator=torch.Generator().manual_seed(1)) < density).double()
    weight[0] = 1
    _, gh, gw = gradients(h, w, ht, wt, token_weight=weight)
    total_h, total_w = [], torch.zeros_like(gw)
    for rows in torch.arange(8).chunk(parts):
        _, part_h, part_w = gradients(
            h[rows], w, ht[rows], wt, token_weight=weight[rows] / weight.sum(), reduction="sum"
        )
        total_h.append(part_h)
        total_w += part_w
    torch.testing.assert_close(torch.cat(total_h), gh)
    torch.testing.assert_close(total_w, gw)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("size", [30.0, 1e4])
def test_peaked_rows_and_huge_logits_underflow_to_nothing_infinite(divergence, size):
    h, w, ht, wt = tensors()
    for x in gradients(size * h, w, size * ht, wt, divergence=divergence):
        assert torch.isfinite(x).all()
    loss, _, _ = gradients(size * h, w, size * ht, wt, divergence=divergence)
    want = linear_divergence(*(x.double() for x in (size * h, w, size * ht, wt)),
                             divergence=divergence, backend="reference")  # fmt: skip
    torch.testing.assert_close(loss.double(), want, rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shared", [True, False])
def test_identical_models_give_exactly_zero(dtype, shared):
    """Probabilities rounded before a subtraction give spurious divergences of ±0.025."""
    h, w, _, _ = tensors(v=1003, dtype=dtype)
    for divergence in DIVERGENCES:
        for x in gradients(h, w, h.clone(), None if shared else w.clone(),
                           divergence=divergence):  # fmt: skip
            assert torch.equal(x, torch.zeros_like(x))


def test_defaults_mix_in_nothing():
    """No hard-label term, no temperature² factor, no default label smoothing."""
    h, w, ht, wt = (x.double() for x in tensors())
    log_q, log_p = (h @ w.T).log_softmax(1), (ht @ wt.T).log_softmax(1)
    want = (log_q.exp() * (log_q - log_p)).sum(1).mean()
    torch.testing.assert_close(linear_divergence(h, w, ht, wt), want)


def test_temperature_applies_to_both_sides():
    h, w, ht, wt = (x.double() for x in tensors())
    log_q, log_p = (h @ w.T / 3).log_softmax(1), (ht @ wt.T / 3).log_softmax(1)
    want = (log_q.exp() * (log_q - log_p)).sum(1).mean()
    torch.testing.assert_close(linear_divergence(h, w, ht, wt, temperature=3.0), want)


def test_jsd_gradient_is_the_true_one_not_q_minus_m():
    h, w, ht, wt = (x.double() for x in tensors())
    _, gh, _ = gradients(h, w, ht, wt, divergence="jsd")
    q, p = (h @ w.T).softmax(1), (ht @ wt.T).softmax(1)
    m = (q + p) / 2
    log_ratio = (q / m).log()
    true = 0.5 * q * (log_ratio - (q * log_ratio).sum(1, keepdim=True)) @ w / 8
    torch.testing.assert_close(gh, true)
    wrong = 0.5 * (q - m) @ w / 8
    assert torch.nn.functional.cosine_similarity(gh.flatten(), wrong.flatten(), dim=0) < 0.99


@pytest.mark.parametrize("entropy", [0.05, 1.0])
@pytest.mark.parametrize("kl", [1e-13, 1e-9, 1e-5, 1e-1])
def test_error_does_not_grow_as_the_teacher_comes_near(entropy, kl):
    case = testing.make_case(tokens=8, dim=64, vocab_size=2000, entropy=entropy, kl=kl)
    found = testing.assert_accurate(case, backend="chunked")
    assert found.hidden_gradient <= 1e-4
    assert not found.negative


def test_soft_targets_keep_the_factor_of_their_mass():
    """Forward KL's gradient is q·Σp − p; with vocab_size, Σp is 1 over the scored columns only."""
    h, w, ht, wt = (x.double() for x in tensors())
    _, gh, _ = gradients(h, w, ht, wt, divergence="forward_kl", vocab_size=33)
    q, p = (h @ w[:33].T).softmax(1), (ht @ wt[:33].T).softmax(1)
    torch.testing.assert_close(gh, (q - p) @ w[:33] / 8)


BLOCKED = """
import sys
sys.modules["triton"] = None
sys.modules["transformers"] = None
import torch, opsdc_kernels
from opsdc_kernels import linear_divergence
x = torch.randn(3, 4, requires_grad=True)
linear_divergence(x, torch.randn(5, 4), torch.randn(3, 4)).backward()
try:
    linear_divergence(x, torch.randn(5, 4), torch.randn(3, 4), backend="fused")
except (ValueError, ImportError) as error:
    assert "fused" in str(error)
    print("works")
"""


@pytest.mark.whole
def test_import_and_use_without_triton_or_transformers():
    done = subprocess.run([sys.executable, "-c", BLOCKED], capture_output=True, text=True)
    assert done.stdout.strip() == "works", done.stderr


LAZY = """
import sys, torch, opsdc_kernels
from opsdc_kernels import linear_divergence
linear_divergence(torch.randn(3, 4), torch.randn(5, 4), torch.randn(3, 4))
kernels = ("opsdc_kernels.triton", "opsdc_kernels.fused.op", "opsdc_kernels.fused.forward")
assert not [name for name in sys.modules if name.startswith(kernels)]  # torch may load triton
print("works")
"""


@pytest.mark.whole
def test_triton_is_imported_only_when_asked_for():
    done = subprocess.run([sys.executable, "-c", LAZY], capture_output=True, text=True)
    assert done.stdout.strip() == "works", done.stderr


LIGER = """
import torch
from liger_kernel.ops.jsd import LigerJSDFunction
from opsdc_kernels import linear_divergence
g = torch.Generator().manual_seed(0)
h, w = torch.randn(5, 8, generator=g), torch.randn(70, 8, generator=g)
ht, wt = h + 0.4 * torch.randn(5, 8, generator=g), w + 0.2 * torch.randn(70, 8, generator=g)
for beta, divergence in ((0.0, "forward_kl"), (0.3, "jsd"), (0.5, "jsd"), (1.0, "reverse_kl")):
    options = {"beta": beta} if divergence == "jsd" else {}
    found = []
    for liger in (False, True):
        x, y = h.clone().requires_grad_(), w.clone().requires_grad_()
        if liger:
            q, p = (x @ y.T).log_softmax(1), (ht @ wt.T).log_softmax(1)
            loss = LigerJSDFunction.apply(q, p, None, beta)
        else:
            loss = linear_divergence(x, y, ht, wt, divergence=divergence, **options)
        found.append((loss.detach(), *torch.autograd.grad(loss, (x, y))))
    for a, b in zip(*found, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm(), (divergence, beta)
print("agrees")
"""


@pytest.mark.whole
def test_a_second_opinion_of_ligers_kernel():
    """Its JSD in Triton, interpreted, where it is installed: value, dH and dW."""
    pytest.importorskip("liger_kernel")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-W", "ignore", "-c", LIGER]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.stdout.strip().endswith("agrees"), done.stderr[-3000:]
