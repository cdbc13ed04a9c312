"""Saturated rows: one token, or a pair, has all but e^-lead of the mass.

Where student and teacher are sure of different tokens, most divergences hardly move any more: what
is left of the gradient is a small difference of numbers of size log 2. Every logit is a multiple of
1/64, so that logits and differences are exact in fp32 and only the row pass can err. Truth is the
textbook's form in 120 digits.
"""

from __future__ import annotations

import functools

import mpmath
import torch

from opsdc_kernels import linear_divergence

CALLS = (
    {"divergence": "reverse_kl"}, {"divergence": "forward_kl"}, {"divergence": "jsd"},
    {"divergence": "jsd", "beta": 0.1}, {"divergence": "jsd", "beta": 0.9},
)  # fmt: skip
TOKENS = (
    ("apart", 3, 140, 70), ("apart", 149, 0, 64), ("pair", 3, 140, 70), ("pair", 66, 65, 1),
    ("alike", 3, 140, 3), ("alike", 149, 0, 149),
)  # fmt: skip
"""The student's favourite, its second one in a pair, the teacher's favourite."""
LEADS = (12, 20, 30, 40, 60, 80)
COLUMNS = 150
FLUSHED = 2.0**-100
"""The passes on a CPU replace smaller gradients by 0."""
LIMIT = 1e-5
"""The largest relative error of a row, and of its sum."""


def logits():
    """(s, t), a row of each kind for each lead."""
    g = torch.Generator().manual_seed(0)
    shape = len(LEADS), len(TOKENS), COLUMNS
    s, t = (torch.randint(-64, 65, shape, generator=g) / 64 for _ in range(2))
    for row, (kind, first, second, other) in enumerate(TOKENS):
        for i, lead in enumerate(LEADS):
            s[i, row, first] = t[i, row, other] = lead
            if kind == "pair":
                s[i, row, second] = lead - 0.25
    return s.flatten(0, 1), t.flatten(0, 1)


@functools.cache
def gradient(divergence, beta=0.5):
    """The gradient of each row's divergence with respect to the student's logits, float64."""
    rows = []
    with mpmath.workdps(120):
        for s, t in zip(*(x.tolist() for x in logits()), strict=True):
            q, p = _softmax(s), _softmax(t)
            if divergence == "forward_kl":
                rows.append([float(x - y) for x, y in zip(q, p, strict=True)])
                continue
            share = mpmath.mpf(beta) if divergence == "jsd" else mpmath.mpf(1)
            m = [(1 - share) * x + share * y for x, y in zip(q, p, strict=True)]
            a = [mpmath.log(x / y) for x, y in zip(m, q, strict=True)]
            mean = sum(x * y for x, y in zip(q, a, strict=True))
            factor = 1 - share if divergence == "jsd" else 1
            rows.append([float(-factor * x * (y - mean)) for x, y in zip(q, a, strict=True)])
    return torch.tensor(rows, dtype=torch.float64)


def _softmax(logits):
    weights = [mpmath.exp(mpmath.mpf(x)) for x in logits]
    total = mpmath.fsum(weights)
    return [x / total for x in weights]


def errors(got, **options):
    """The error of each row or, where larger, of its sum, which is 0: relative to the row's size.
    `got`: the first rows' gradients."""
    true, got = gradient(**options)[: len(got)], got.double()
    floor = FLUSHED * COLUMNS
    error = ((got - true).norm(dim=1) - floor) / true.norm(dim=1)
    return torch.maximum(error, (got.sum(1).abs() - floor) / true.abs().sum(1))


def failures(gradient_of):
    """The rows beyond the limit, of `gradient_of(**options)`."""
    wrong = []
    for options in CALLS:
        found = errors(gradient_of(**options), **options)
        for row in (~(found <= LIMIT)).nonzero().squeeze(1).tolist():
            lead, kind = LEADS[row // len(TOKENS)], TOKENS[row % len(TOKENS)][0]
            wrong.append(f"{options} {kind} lead {lead}: {float(found[row]):.1e}")
    return wrong


def gradient_of_heads(dtype=torch.float32, **options):
    """dH of heads that hand the logits on: the gradient of the logits."""
    s, t = (x.to(dtype) for x in logits())
    weight, hidden = torch.eye(COLUMNS, dtype=dtype), s.requires_grad_()
    linear_divergence(hidden, weight, t, weight.clone(), reduction="sum", **options).backward()
    return hidden.grad
