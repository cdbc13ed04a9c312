"""The gate that every wrong variant of the row passes and the chunk code must fail.

A tolerance is worth what it refuses. The gate is `opsdc_kernels.testing`'s budget in the regimes of
self-distillation, plus three laws; it passes on the code as it is, and fails on every mutant.
"""

from __future__ import annotations

import torch

from helpers.kernels import case_of, errors_and_budget, truth_of
from opsdc_kernels import linear_divergence, products, testing

N, D, V = 9, 24, 205
WEIGHT = torch.tensor([1.0, 0.0, 0.5, 2.0, 1.0, 0.0, 0.3, 1.0, 0.0])
OPTIONS = (
    {}, {"reduction": "sum"}, {"reduction": "none"}, {"token_weight": WEIGHT},
    {"temperature": 2.0, "logit_softcap": 15.0, "logit_scale": 1.5}, {"vocab_size": V - 5},
    {"divergence": "forward_kl"}, {"divergence": "jsd", "beta": 0.3},
    {"divergence": "jsd", "beta": 0.3, "temperature": 1.5},
)  # fmt: skip


WORKSPACE = 4 * 8 * V * 12
"""A few rows per chunk, so that chunks have to add up."""


def cases():
    for kl, shared, common_mode in ((1e-2, True, 0.0), (1e-6, True, 2.0), (1e-1, False, 0.0)):
        yield case_of(tokens=N, dim=D, vocab_size=V, entropy=1.0, kl=kl, shared_head=shared,
                      common_mode=common_mode)  # fmt: skip


def prepare():
    """Make the truth of all that the gate compares, before anything is mutated."""
    for case in cases():
        for options in OPTIONS:
            truth_of(case, **options)


def gate():
    """Raises AssertionError unless `chunked` is right."""
    for case in cases():
        for options in OPTIONS:
            call = {"backend": "chunked", "workspace_bytes": WORKSPACE, **options}
            wrong = testing.excesses(*errors_and_budget(case, **call))
            assert not wrong, (options, wrong)
    backward_twice(case)
    per_token_upstream(case)
    bias_gradient(case)
    rounded_tile_gradient()


def backward_twice(case):
    h = case.student_hidden.clone().requires_grad_()
    loss = linear_divergence(h, case.student_weight, case.teacher_hidden)
    first = torch.autograd.grad(loss, h, retain_graph=True)[0].clone()
    torch.autograd.grad(loss, h, torch.tensor(3.0), retain_graph=True)
    assert torch.equal(torch.autograd.grad(loss, h)[0], first)


def per_token_upstream(case):
    found = []
    for backend in ("chunked", "reference"):
        leaves = [x.clone().requires_grad_() for x in (case.student_hidden, case.student_weight)]
        loss = linear_divergence(*leaves, case.teacher_hidden, case.teacher_weight,
                                 reduction="none", backend=backend)  # fmt: skip
        found.append(torch.autograd.grad(loss, leaves, torch.linspace(-1, 2, N)))
    for a, b in zip(*found, strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm()


def bias_gradient(case):
    found = []
    for backend in ("chunked", "reference"):
        b = torch.linspace(-1, 1, V).requires_grad_()
        loss = linear_divergence(
            case.student_hidden, case.student_weight, case.teacher_hidden,
            case.teacher_weight, student_bias=b, token_weight=WEIGHT, backend=backend,
        )  # fmt: skip
        loss.backward()
        found.append(b.grad)
    assert (found[0] - found[1]).norm() <= 1e-4 * found[1].norm()


def rounded_tile_gradient():
    """dH of a bf16 tile whose rows do not sum to 0, as under a soft-cap, and a common row of W."""
    g = torch.Generator().manual_seed(0)
    dz = torch.randn(N, 2000, generator=g)
    dz = dz - dz.mean(1, keepdim=True) + 1e-3
    weight = torch.randn(2000, D, generator=g) + 20 * torch.randn(1, D, generator=g)
    found = products.rounded_tile(dz.clone(), torch.empty_like(dz), torch.bfloat16)
    got = products.hidden_gradient(found, weight, weight.mean(0)).double()
    want = dz.double() @ weight.double()
    assert (got - want).norm() <= 3e-3 * want.norm()
