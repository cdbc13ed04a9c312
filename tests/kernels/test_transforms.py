"""Forward AD, `torch.func`, `vmap`, batches of upstream gradients: right, or refused by name."""

import functools

import pytest
import torch
from torch.autograd import forward_ad

from opsdc_kernels import linear_divergence

N, D, V = 5, 6, 37
g = torch.Generator().manual_seed(0)
h, w, ht, wt, dh, dw = (
    torch.randn(n, D, generator=g, dtype=torch.float64) for n in (N, V, N, V, N, V)
)
DIVERGENCES = ("reverse_kl", "forward_kl", "jsd")
REFUSED = 'backend="auto" knows the backward of torch.autograd alone.*backend="reference"'


def loss(hidden, weight=w, teacher=None, **options):
    return linear_divergence(hidden, weight, ht, teacher, **options)


def gradients(**options):
    leaves = [x.clone().requires_grad_() for x in (h, w)]
    return torch.autograd.grad(loss(*leaves, **options), leaves)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("teacher", [None, wt])
@pytest.mark.parametrize("cap", [None, 3.0])
def test_forward_ad_of_the_reference(divergence, teacher, cap):
    """The directional derivative; no tangent comes from the teacher of a shared head."""
    options = {"divergence": divergence, "teacher": teacher, "logit_softcap": cap}
    along_h, along_w = gradients(**options)
    _, tangent = torch.func.jvp(
        lambda *x: loss(*x, backend="reference", **options), (h, w), (dh, dw)
    )
    torch.testing.assert_close(tangent, (along_h * dh).sum() + (along_w * dw).sum())


def test_the_reference_under_transforms():
    along_h, along_w = gradients()

    def reference(*x):
        return loss(*x, backend="reference")

    torch.testing.assert_close(torch.func.grad(reference)(h), along_h)
    torch.testing.assert_close(torch.func.grad(reference, argnums=1)(h, w), along_w)
    pair = torch.func.vmap(torch.func.grad(reference))(torch.stack([h, h]))
    torch.testing.assert_close(pair, torch.stack([along_h, along_h]))


def with_a_tangent(call):
    with forward_ad.dual_level():
        return call(forward_ad.make_dual(h, dh))


TRANSFORMS = {
    "grad": lambda call: torch.func.grad(call)(h),
    "grad through others": lambda call: torch.func.grad(lambda x: call(2 * x + 1))(h),
    "vjp": lambda call: torch.func.vjp(call, h),
    "jvp": lambda call: torch.func.jvp(call, (h,), (dh,)),
    "a tangent": with_a_tangent,
    "hessian": lambda call: torch.func.hessian(call)(h),
    "vmap of grad": lambda call: torch.func.vmap(torch.func.grad(call))(h[None]),
    "grad of vmap": lambda call: torch.func.grad(lambda x: torch.func.vmap(call)(x).sum())(h[None]),
    "vmap of leaves": lambda call: torch.func.vmap(call)(h[None].clone().requires_grad_()),
}


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("options", [{}, {"skip_tolerance": 1e-2}])
def test_others_refuse_what_they_cannot_differentiate(name, options):
    with pytest.raises(ValueError, match=f"student_hidden is differentiated.*{REFUSED}"):
        TRANSFORMS[name](lambda x: loss(x, **options))


def test_every_tensor_is_looked_at():
    bias = torch.zeros(V, dtype=torch.float64)
    with pytest.raises(ValueError, match=f"student_weight is .*{REFUSED}"):
        torch.func.grad(lambda x: loss(h, x))(w)
    with pytest.raises(ValueError, match=f"student_bias is .*{REFUSED}"):
        torch.func.grad(lambda x: loss(h, student_bias=x))(bias)
    for backend in ("auto", "reference"):
        call = functools.partial(linear_divergence, h, w, backend=backend)
        with pytest.raises(ValueError, match=r"teacher_hidden .* pass teacher_hidden.detach\(\)"):
            torch.func.jvp(call, (ht,), (dh,))
    detached = torch.func.grad(lambda x: linear_divergence(x, w, x.detach(), backend="reference"))
    assert torch.equal(detached(h), torch.zeros_like(h))


def test_without_gradients_vmap_is_right():
    want = torch.stack([loss(h), loss(2 * h)])
    torch.testing.assert_close(torch.func.vmap(loss)(torch.stack([h, 2 * h])), want)
    with torch.no_grad():
        leaves = torch.stack([h, 2 * h]).requires_grad_()
        torch.testing.assert_close(torch.func.vmap(loss)(leaves), want)


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_batch_of_upstream_gradients(backend, reduction, frozen):
    leaves = [x.clone().requires_grad_() for x in ((h,) if frozen else (h, w))]

    def value():
        return loss(*leaves, backend=backend, reduction=reduction)

    shape = (3, N) if reduction == "none" else (3,)
    upstream = torch.randn(shape, generator=g, dtype=torch.float64)
    got = torch.autograd.grad(value(), leaves, upstream, is_grads_batched=True)
    each = [torch.autograd.grad(value(), leaves, row) for row in upstream]
    for a, b in zip(got, zip(*each, strict=True), strict=True):
        torch.testing.assert_close(a, torch.stack(b))
