"""What must hold for any input, without a reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opsdc_kernels import linear_divergence

pytestmark = pytest.mark.usefixtures("row_passes")

DIVERGENCES = ("reverse_kl", "forward_kl", "jsd")
EXAMPLES = settings(max_examples=25, deadline=None)


@st.composite
def problems(draw, max_v=70, **overrides):
    n, d, v = draw(st.integers(1, 9)), draw(st.integers(1, 12)), draw(st.integers(1, max_v))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scale = draw(st.sampled_from([0.1, 1.0, 5.0]))
    near = draw(st.sampled_from([1e-4, 1e-1, 2.0]))
    h, w = scale * torch.randn(n, d, generator=g), torch.randn(v, d, generator=g)
    ht = h + near * scale * torch.randn(n, d, generator=g)
    wt = None if draw(st.booleans()) else w + near * torch.randn(v, d, generator=g)
    options = {"divergence": draw(st.sampled_from(DIVERGENCES)), **overrides}
    if draw(st.booleans()):
        options["temperature"] = draw(st.sampled_from([0.5, 2.0]))
    if draw(st.booleans()):
        options["logit_softcap"] = 10.0
    return h, w, ht, wt, options


def run(h, w, ht, wt, **options):
    h, w = h.clone().requires_grad_(), w.clone().requires_grad_()
    loss = linear_divergence(h, w, ht, wt, backend="chunked", **options)
    loss.sum().backward()
    return loss.detach(), h.grad, w.grad


def close(a, b, size=None, tol=3e-5):
    """Equal up to rounding, on the scale of the whole tensor."""
    size = b if size is None else size
    assert (a - b).norm() <= tol * size.norm() + 1e-12


@EXAMPLES
@given(problems(reduction="none"))
def test_never_negative_and_finite(problem):
    h, w, ht, wt, options = problem
    loss, gh, gw = run(h, w, ht, wt, **options)
    assert (loss >= 0).all()
    for x in (loss, gh, gw):
        assert torch.isfinite(x).all()


@EXAMPLES
@given(problems())
def test_equal_teacher_is_exactly_zero(problem):
    h, w, _, wt, options = problem
    other = None if wt is None else w.clone()
    for x in run(h, w, h.clone(), other, **options):
        assert torch.equal(x, torch.zeros_like(x))


@EXAMPLES
@given(problems(), st.integers(0, 2**31))
def test_a_row_added_to_every_row_of_w_changes_nothing(problem, seed):
    h, w, ht, _, options = problem
    options.pop("logit_softcap", None)  # a soft-cap sees the level of the logits
    row = torch.randn(1, w.shape[1], generator=torch.Generator().manual_seed(seed)).double()
    h, w, ht = h.double(), w.double(), ht.double()
    loss, gh, gw = run(h, w, ht, None, **options)
    other_loss, other_gh, other_gw = run(h, w + row, ht, None, **options)
    close(other_loss, loss)
    close(other_gw, gw)
    close(other_gh, gh)  # Σ_v dZ = 0, so the row meets nothing


@EXAMPLES
@given(problems())
def test_weight_gradients_sum_to_zero(problem):
    h, w, ht, wt, options = problem
    options.pop("logit_softcap", None)
    _, _, gw = run(h.double(), w.double(), ht.double(), None if wt is None else wt.double(),
                   **options)  # fmt: skip
    assert gw.sum(0).norm() <= 1e-9 * gw.norm() + 1e-12


@EXAMPLES
@given(problems(), st.randoms(use_true_random=False))
def test_permuting_the_vocabulary_permutes_dw(problem, random):
    h, w, ht, wt, options = problem
    order = list(range(w.shape[0]))
    random.shuffle(order)
    h, w, ht = h.double(), w.double(), ht.double()
    wt = None if wt is None else wt.double()
    loss, gh, gw = run(h, w, ht, wt, **options)
    other = run(h, w[order], ht, None if wt is None else wt[order], **options)
    close(other[0], loss)
    close(other[1], gh)
    close(other[2], gw[order])


@EXAMPLES
@given(problems(reduction="sum"), st.randoms(use_true_random=False))
def test_permuting_tokens_permutes_dh_and_batches_add_up(problem, random):
    h, w, ht, wt, options = problem
    order = list(range(h.shape[0]))
    random.shuffle(order)
    h, w, ht = h.double(), w.double(), ht.double()
    wt = None if wt is None else wt.double()
    loss, gh, gw = run(h, w, ht, wt, **options)
    _, other_gh, other_gw = run(h[order], w, ht[order], wt, **options)
    close(other_gh, gh[order])
    close(other_gw, gw)
    cut = h.shape[0] // 2
    first, second = (
        run(h[:cut], w, ht[:cut], wt, **options),
        run(h[cut:], w, ht[cut:], wt, **options),
    )
    close(first[0] + second[0], loss)
    close(torch.cat([first[1], second[1]]), gh)
    close(first[2] + second[2], gw)


@EXAMPLES
@given(problems(), st.sampled_from(["mean", "sum", "none"]))
def test_masked_rows_may_hold_anything(problem, reduction):
    h, w, ht, wt, options = problem
    options["reduction"] = reduction
    weight = (torch.arange(h.shape[0]) % 3 != 1).float()
    loss, gh, gw = run(h, w, ht, wt, token_weight=weight, **options)
    dirty, dirty_t = h.clone(), ht.clone()
    dirty[weight == 0] = float("nan")
    dirty_t[weight == 0] = float("inf")
    other = run(dirty, w, dirty_t, wt, token_weight=weight, **options)
    for a, b in zip(other, (loss, gh, gw), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(gh[weight == 0], torch.zeros_like(gh[weight == 0]))


@EXAMPLES
@given(problems(), st.integers(0, 2**31))
def test_directional_derivative(problem, seed):
    h, w, ht, wt, options = problem
    h, w, ht = h.double(), w.double(), ht.double()
    wt = w.clone() if wt is None else wt.double()
    _, gh, gw = run(h, w, ht, wt, **options)
    g = torch.Generator().manual_seed(seed)
    vh, vw = (torch.randn(x.shape, generator=g, dtype=torch.float64) for x in (h, w))
    eps = 1e-5

    def value(sign):
        return run(h + sign * eps * vh, w + sign * eps * vw, ht, wt, **options)[0]

    slope = float((gh * vh).sum() + (gw * vw).sum())
    measured = float(value(1) - value(-1)) / (2 * eps)
    assert abs(slope - measured) <= 1e-5 * (gh.norm() * vh.norm() + gw.norm() * vw.norm()) + 1e-9


@EXAMPLES
@given(problems(), st.sampled_from([0.3, 2.0, 7.0]))
def test_weights_over_temperature_equal_temperature(problem, temperature):
    h, w, ht, _, options = problem
    options = {"divergence": options["divergence"]}
    h, w, ht = h.double(), w.double(), ht.double()
    loss, gh, gw = run(h, w, ht, None, temperature=temperature, **options)
    other_loss, other_gh, other_gw = run(h, w / temperature, ht, None, **options)
    close(other_loss, loss)
    close(other_gh, gh)
    close(other_gw / temperature, gw)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_token_weights_scale_gradients_and_the_mean_is_a_weighted_one(divergence):
    g = torch.Generator().manual_seed(0)
    h, ht, w = (torch.randn(n, 6, generator=g).double() for n in (8, 8, 20))
    weight = torch.rand(8, generator=g).double()
    _, gh, gw = run(h, w, ht, None, token_weight=weight, divergence=divergence)
    _, other_gh, other_gw = run(h, w, ht, None, token_weight=5 * weight, divergence=divergence)
    close(other_gh, gh)
    close(other_gw, gw)
    _, doubled, _ = run(h, w, ht, None, token_weight=5 * weight, divergence=divergence,
                        reduction="sum")  # fmt: skip
    close(doubled, gh * 5 * weight.sum())


@EXAMPLES
@given(problems(divergence="jsd"))
def test_the_jsd_at_half_does_not_tell_student_from_teacher(problem):
    h, w, ht, wt, options = problem
    wt = w.clone() if wt is None else wt
    there, stats = linear_divergence(h, w, ht, wt, return_stats=True, **options)
    back, other = linear_divergence(ht, wt, h, w, return_stats=True, **options)
    # Logits are off by 3e-7 of their size, and a divergence is the square of their differences.
    size = 3e-7 * float(torch.stack([h.norm(dim=1).max() * w.norm(dim=1).max() + 1]))
    slack = (there.clamp(min=1e-30).sqrt() * size + size**2) * 4
    assert (there - back).abs() <= 1e-5 * there + slack
    # An entropy near 0 is a difference of numbers of the logits' size.
    assert (stats.student_entropy - other.teacher_entropy).abs().max() <= size
    close(stats.teacher_logsumexp, other.student_logsumexp)


@EXAMPLES
@given(problems())
def test_kl_is_cross_entropy_less_entropy(problem):
    """Statistics and values of one call belong together: E_q[log q − log p] by both routes."""
    h, w, ht, wt, options = problem
    h, w, ht = h.double(), w.double(), ht.double()
    wt = w if wt is None else wt.double()
    cap, temperature = options.get("logit_softcap"), options.get("temperature", 1.0)
    s, t = h @ w.T, ht @ wt.T
    if cap:
        s, t = cap * torch.tanh(s / cap), cap * torch.tanh(t / cap)
    s, t = s / temperature, t / temperature
    for divergence in ("reverse_kl", "forward_kl"):
        call = {**options, "divergence": divergence, "return_stats": True, "reduction": "none"}
        value, stats = linear_divergence(h, w, ht, wt, **call)
        first, second, entropy = (
            (s, t - stats.teacher_logsumexp[:, None], stats.student_entropy)
            if divergence == "reverse_kl"
            else (t, s - stats.student_logsumexp[:, None], stats.teacher_entropy)
        )
        cross_entropy = -(first.softmax(1) * second).sum(1)
        torch.testing.assert_close(value, cross_entropy - entropy, rtol=1e-9, atol=1e-10)
