"""The contract: shapes, reductions, statistics."""

import inspect

import pytest
import torch

from opsdc_kernels import (
    DivergenceStats,
    LinearDivergence,
    LinearReverseKL,
    linear_divergence,
    linear_reverse_kl,
)

N, D, V = 6, 4, 9
h, w, ht = torch.randn(N, D), torch.randn(V, D), torch.randn(N, D)
ids, ones = torch.zeros(N, dtype=torch.long), torch.ones(N)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_batch_of_sequences_equals_flat_tokens(backend):
    flat = linear_divergence(h, w, ht, reduction="none", backend=backend)
    shaped, stats = linear_divergence(
        h.view(2, 3, D), w, ht.view(2, 3, D), reduction="none", return_stats=True,
        backend=backend, token_weight=ones.view(2, 3), target_ids=ids.view(2, 3),
    )  # fmt: skip
    assert shaped.shape == (2, 3)
    assert torch.equal(shaped.view(-1), flat)
    for name in DivergenceStats.__slots__:
        value = getattr(stats, name)  # None: of skip_tolerance
        assert value is None or value.shape == (2, 3)
        assert value is None or not value.requires_grad
    assert stats.teacher_logprob is not None


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_reductions(backend):
    weight = torch.tensor([1.0, 0.0, 2.0, 0.5, 0.0, 1.0])

    def loss(reduction, token_weight=weight):
        return linear_divergence(
            h, w, ht, reduction=reduction, token_weight=token_weight, backend=backend
        )

    plain, each = loss("none", None), loss("none")
    # Unweighted, 0 where dropped; a product of fewer rows may sum in another order.
    torch.testing.assert_close(each, plain * (weight > 0), rtol=1e-5, atol=0)
    torch.testing.assert_close(loss("sum"), (weight * plain).sum())
    torch.testing.assert_close(loss("mean"), (weight * plain).sum() / weight.sum())
    torch.testing.assert_close(loss("mean", None), plain.mean())
    torch.testing.assert_close(loss("sum", None), plain.sum())
    mask = weight > 0
    torch.testing.assert_close(loss("mean", mask), plain[mask].mean())


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("size", [2.0**127, 2.0**-126, 2.0**-140, 2.0**1000, 2.0**-1000])
def test_means_over_weights_of_any_size(backend, size):
    """Sums that over- or underflow fp32: the very bits of weights near 1."""
    weight = torch.tensor([1.0, 0.0, 0.5, 1.75, 0.0, 1.0])

    def run(token_weight):
        leaves = [h.clone().requires_grad_(), w.clone().requires_grad_()]
        loss = linear_divergence(*leaves, ht, token_weight=token_weight, backend=backend)
        return loss.detach(), *torch.autograd.grad(loss, leaves)

    wide = weight.double() * size
    scaled = wide.float() if 1e-43 < size < 1e39 else wide
    for a, b in zip(run(scaled), run(weight), strict=True):
        assert torch.equal(a, b)


def test_a_weight_too_small_beside_the_others_counts_as_almost_nothing():
    weight = torch.tensor([1e38, 1e-38, 1e38, 0.0, 0.0, 0.0])
    got, stats = linear_divergence(h, w, ht, token_weight=weight, return_stats=True)
    torch.testing.assert_close(got, (stats.divergence[0] + stats.divergence[2]) / 2)
    assert stats.divergence[1] > 0


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("n", [0, 3])
def test_nothing_to_score_is_zero(backend, reduction, n):
    hidden = torch.randn(n, D, requires_grad=True)
    weight = w.clone().requires_grad_()
    loss, stats = linear_divergence(
        hidden, weight, torch.randn(n, D), token_weight=torch.zeros(n), reduction=reduction,
        return_stats=True, backend=backend,
    )  # fmt: skip
    loss.sum().backward()
    assert torch.equal(loss, torch.zeros_like(loss))
    assert torch.equal(hidden.grad, torch.zeros(n, D))
    assert torch.equal(weight.grad, torch.zeros(V, D))
    assert torch.equal(stats.student_entropy, torch.zeros(n))


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_statistics(backend):
    targets = torch.arange(N) % V
    bias = torch.linspace(-1, 1, V)
    loss, stats = linear_divergence(
        h, w, ht, student_bias=bias, temperature=1.4, logit_scale=(2.0, 0.5),
        logit_softcap=4.0, return_stats=True, target_ids=targets, backend=backend,
    )  # fmt: skip
    s = 4 * torch.tanh(2.0 * (h @ w.T + bias) / 4) / 1.4
    t = 4 * torch.tanh(0.5 * (ht @ w.T + bias) / 4) / 1.4
    log_q, log_p = s.log_softmax(1), t.log_softmax(1)
    close = torch.testing.assert_close
    close(stats.divergence, (log_q.exp() * (log_q - log_p)).sum(1), rtol=1e-4, atol=1e-6)
    close(stats.divergence.mean(), loss)
    close(stats.student_logsumexp, s.logsumexp(1))
    close(stats.teacher_logsumexp, t.logsumexp(1))
    close(stats.student_entropy, -(log_q.exp() * log_q).sum(1))
    close(stats.teacher_entropy, -(log_p.exp() * log_p).sum(1))
    close(stats.agreement, (s.argmax(1) == t.argmax(1)).float())
    close(stats.student_logprob, log_q.gather(1, targets[:, None]).squeeze(1))
    close(stats.teacher_logprob, log_p.gather(1, targets[:, None]).squeeze(1))
    plain = linear_divergence(h, w, ht, return_stats=True, backend=backend)[1]
    assert plain.student_logprob is None


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_shared_head_shares_bias_scale_and_cap(backend):
    bias, other = torch.linspace(-1, 1, V), torch.linspace(2, -2, V)

    def loss(weight, **options):
        return linear_divergence(h, w, ht, weight, backend=backend, **options)

    torch.testing.assert_close(
        loss(None, student_bias=bias), loss(w.clone(), student_bias=bias, teacher_bias=bias)
    )
    torch.testing.assert_close(loss(w, student_bias=bias), loss(None, student_bias=bias))
    torch.testing.assert_close(
        loss(None, student_bias=bias, teacher_bias=other),
        loss(w.clone(), student_bias=bias, teacher_bias=other),
    )
    torch.testing.assert_close(loss(None, teacher_bias=other), loss(w.clone(), teacher_bias=other))
    torch.testing.assert_close(
        loss(None, logit_scale=(1.0, 2.0)), loss(w.clone(), logit_scale=(1.0, 2.0))
    )


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_temperature_has_no_square_factor(backend):
    got = linear_divergence(h, w, ht, temperature=3.0, backend=backend)
    want = linear_divergence(h, w / 3, ht, backend=backend)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_vocab_size_scores_the_first_columns(backend):
    padded, other = torch.cat([w, 50 + torch.randn(3, D)]), torch.cat([w, torch.randn(7, D)])
    weight = padded.clone().requires_grad_()
    loss = linear_divergence(h, weight, ht, other, vocab_size=V, backend=backend)
    torch.testing.assert_close(loss, linear_divergence(h, w, ht, w.clone(), backend=backend))
    loss.backward()
    assert torch.equal(weight.grad[V:], torch.zeros(3, D))
    assert weight.grad[:V].abs().sum() > 0


def test_directions_differ_and_are_named_right():
    hidden = torch.eye(2)[:1]
    student = torch.tensor([[3.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    teacher = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    q, p = (hidden @ student.T).softmax(1), (hidden @ teacher.T).softmax(1)
    reverse, forward = (q * (q / p).log()).sum(), (p * (p / q).log()).sum()
    m = 0.7 * q + 0.3 * p
    jsd = 0.7 * (q * (q / m).log()).sum() + 0.3 * (p * (p / m).log()).sum()
    assert abs(reverse - forward) > 0.01
    close = torch.testing.assert_close
    close(linear_reverse_kl(hidden, student, hidden, teacher), reverse)
    close(linear_divergence(hidden, student, hidden, teacher, divergence="forward_kl"), forward)
    close(linear_divergence(hidden, student, hidden, teacher, divergence="jsd", beta=0.3), jsd)


def test_modules_only_hold_options():
    want = linear_divergence(h, w, ht, divergence="jsd", beta=0.2, reduction="sum")
    module = LinearDivergence(divergence="jsd", beta=0.2, reduction="mean")
    assert torch.equal(module(h, w, ht, reduction="sum"), want)
    assert torch.equal(LinearReverseKL()(h, w, ht), linear_reverse_kl(h, w, ht))
    assert not list(module.parameters())
    assert "beta=0.2" in repr(module)
    for call in (lambda: LinearReverseKL(divergence="jsd"),
                 lambda: linear_reverse_kl(h, w, ht, divergence="jsd")):  # fmt: skip
        with pytest.raises(TypeError, match=r"linear_divergence|LinearDivergence"):
            call()


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_a_mean_over_sequences_of_the_mean_over_tokens(backend):
    """By token weights: the lengths of the sequences change nothing."""
    lengths = (1, 3, 2)
    weight = torch.cat([torch.full((n,), 1 / (n * len(lengths))) for n in lengths])
    leaves = [h.clone().requires_grad_(), w.clone().requires_grad_()]
    loss = linear_divergence(*leaves, ht, token_weight=weight, reduction="sum", backend=backend)
    per_sequence = [
        linear_divergence(x, leaves[1], y, backend=backend)
        for x, y in zip(leaves[0].split(lengths), ht.split(lengths), strict=True)
    ]
    mean = torch.stack(per_sequence).mean()
    torch.testing.assert_close(loss, mean)
    found, want = (torch.autograd.grad(x, leaves) for x in (loss, mean))
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b)
    # The weights of a mean need not be normalized.
    again = linear_divergence(*leaves, ht, token_weight=7 * weight, backend=backend)
    torch.testing.assert_close(again, mean)


def test_reverse_kl_shows_every_option_and_refuses_others():
    shown = set(inspect.signature(linear_reverse_kl).parameters)
    every = set(inspect.signature(linear_divergence).parameters)
    assert every - shown == {"divergence", "beta"}
    assert shown <= every
    h, w = torch.ones(2, 3), torch.ones(5, 3)
    with pytest.raises(TypeError, match="linear_reverse_kl takes no temprature"):
        linear_reverse_kl(h, w, h, temprature=2.0)
