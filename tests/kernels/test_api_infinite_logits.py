"""−inf logits: a masked vocabulary, on both sides or on one (see `opsdc_kernels.reference`)."""

import math

import pytest
import torch

from opsdc_kernels import linear_divergence

pytestmark = pytest.mark.usefixtures("row_passes")

INF = math.inf
DIVERGENCES = ("reverse_kl", "forward_kl", "jsd")
BACKENDS = ("reference", "chunked")
DTYPES = (torch.float32, torch.float64)


def setup(dtype, masked_s=(), masked_t=()):
    g = torch.Generator().manual_seed(0)
    h, ht = (torch.randn(5, 4, generator=g, dtype=torch.float64).to(dtype) for _ in range(2))
    w, wt = (torch.randn(12, 4, generator=g, dtype=torch.float64).to(dtype) for _ in range(2))
    b, bt = torch.zeros(12, dtype=dtype), torch.zeros(12, dtype=dtype)
    b[list(masked_s)] = -INF
    bt[list(masked_t)] = -INF
    return h.requires_grad_(), w.requires_grad_(), ht, wt, b, bt


def run(parts, **options):
    h, w, ht, wt, b, bt = parts
    loss, stats = linear_divergence(
        h, w, ht, wt, student_bias=b, teacher_bias=bt, reduction="none", return_stats=True,
        **options,
    )  # fmt: skip
    gh, gw = torch.autograd.grad(loss.sum(), (h, w))
    assert torch.isfinite(gh).all()
    assert torch.isfinite(gw).all()
    for name in ("student_entropy", "teacher_entropy", "student_logsumexp"):
        assert torch.isfinite(getattr(stats, name)).all()
    return loss.detach(), gh, gw


def softmaxes(parts):
    h, w, ht, wt, b, bt = parts
    q = (h.detach() @ w.detach().T + b).double().softmax(1)
    return q, (ht @ wt.T + bt).double().softmax(1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shared", [True, False])
def test_both_sides_the_column_does_not_exist(backend, divergence, dtype, shared):
    """A mask of the top columns too, so that the largest difference lies in the mask."""
    masked, kept = [0, 3, 11], [i for i in range(12) if i not in (0, 3, 11)]
    h, w, ht, wt, b, bt = setup(dtype, masked, masked)
    with torch.no_grad():
        w[0] = 1e3
    wt = None if shared else wt
    loss, gh, gw = run((h, w, ht, wt, b, None if shared else bt),
                       divergence=divergence, backend=backend)  # fmt: skip
    small = w.detach()[kept].requires_grad_()
    want = linear_divergence(
        h, small, ht, None if shared else wt[kept], divergence=divergence, reduction="none",
        backend="reference",
    )  # fmt: skip
    wh, ww = torch.autograd.grad(want.sum(), (h, small))
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {}
    torch.testing.assert_close(loss, want.detach(), **tolerance)
    torch.testing.assert_close(gh, wh, **tolerance)
    torch.testing.assert_close(gw[kept], ww, **tolerance)
    assert torch.equal(gw[masked], torch.zeros_like(gw[masked]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_student_only(backend, dtype):
    """Student mass 0 there; the value still counts the teacher's mass elsewhere."""
    parts = setup(dtype, masked_s=[2, 7])
    q, p = softmaxes(parts)
    inside = [i for i in range(12) if i not in (2, 7)]
    reverse, gh, gw = run(parts, divergence="reverse_kl", backend=backend)
    textbook = (q[:, inside] * (q[:, inside] / p[:, inside]).log()).sum(1)
    torch.testing.assert_close(reverse.double(), textbook, rtol=1e-5, atol=1e-7)
    c = (p[:, inside] / q[:, inside]).log()
    dz = torch.zeros_like(q)
    dz[:, inside] = -q[:, inside] * (c - (q[:, inside] * c).sum(1, keepdim=True))
    torch.testing.assert_close(gh.double(), dz @ parts[1].detach().double(), rtol=1e-4, atol=1e-6)
    assert torch.equal(gw[[2, 7]], torch.zeros_like(gw[[2, 7]]))
    forward, gh, gw = run(parts, divergence="forward_kl", backend=backend)
    assert torch.equal(forward, torch.full_like(forward, INF))
    dz = (q - p) * (q > 0)
    torch.testing.assert_close(gh.double(), dz @ parts[1].detach().double(), rtol=1e-4, atol=1e-6)
    assert torch.equal(gw[[2, 7]], torch.zeros_like(gw[[2, 7]]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_teacher_only(backend, dtype):
    """Reverse KL is +inf with gradients on the columns where both are finite."""
    parts = setup(dtype, masked_t=[1, 5])
    q, p = softmaxes(parts)
    inside = [i for i in range(12) if i not in (1, 5)]
    reverse, gh, gw = run(parts, divergence="reverse_kl", backend=backend)
    assert torch.equal(reverse, torch.full_like(reverse, INF))
    q_in = q[:, inside] / q[:, inside].sum(1, keepdim=True)
    c = (p[:, inside] / q_in).log()
    dz = torch.zeros_like(q)
    dz[:, inside] = -q_in * (c - (q_in * c).sum(1, keepdim=True))
    torch.testing.assert_close(gh.double(), dz @ parts[1].detach().double(), rtol=1e-4, atol=1e-6)
    assert torch.equal(gw[[1, 5]], torch.zeros_like(gw[[1, 5]]))
    forward, gh, _ = run(parts, divergence="forward_kl", backend=backend)
    textbook = (p[:, inside] * (p[:, inside] / q[:, inside]).log()).sum(1)
    torch.testing.assert_close(forward.double(), textbook, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(
        gh.double(), (q - p) @ parts[1].detach().double(), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("masked_s", "masked_t"), [((2,), ()), ((), (4,)), ((2, 9), (4, 9))])
@pytest.mark.parametrize("beta", [0.5, 0.2])
def test_jsd_is_finite_and_right(backend, masked_s, masked_t, beta):
    parts = setup(torch.float64, masked_s, masked_t)
    q, p = softmaxes(parts)
    m = (1 - beta) * q + beta * p

    def kl(a):
        return torch.where(a > 0, a * (a / m).log(), 0).sum(1)

    loss, gh, _ = run(parts, divergence="jsd", beta=beta, backend=backend)
    torch.testing.assert_close(loss, (1 - beta) * kl(q) + beta * kl(p))
    log_ratio = torch.where(q > 0, (q / m).log(), 0)
    dz = (1 - beta) * q * (log_ratio - kl(q)[:, None])
    torch.testing.assert_close(gh, dz @ parts[1].detach())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_one_row_of_a_block_masked(backend, divergence):
    """A row with infinite logits changes nothing for its neighbours."""
    g = torch.Generator().manual_seed(0)
    h, ht, w = (torch.randn(n, 4, generator=g) for n in (6, 6, 30))
    h[2] = ht[2] = torch.tensor([-INF, 0, 0, 0])
    w[:, 0] = w[:, 0].abs()
    loss = linear_divergence(h, w, ht, w.clone(), divergence=divergence, reduction="none",
                             backend=backend)  # fmt: skip
    others = [0, 1, 3, 4, 5]
    want = linear_divergence(h[others], w, ht[others], w.clone(), divergence=divergence,
                             reduction="none", backend=backend)  # fmt: skip
    torch.testing.assert_close(loss[others], want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("size", [1e2, 1e4])
def test_huge_logits(backend, divergence, size):
    """Far apart and very peaked: e^c overflows fp32, the value and gradients do not."""
    h = torch.tensor([[1.0, 0.0], [0.0, 1.0]], requires_grad=True)
    ht = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    w = (torch.eye(2).repeat(4, 1) * size).requires_grad_()
    w2 = w.detach().clone()
    loss = linear_divergence(h, w, ht, w2, divergence=divergence, reduction="none",
                             backend=backend)  # fmt: skip
    loss.sum().backward()
    want = linear_divergence(h.double(), w.double(), ht.double(), w2.double(), reduction="none",
                             divergence=divergence, backend="reference")  # fmt: skip
    assert torch.isfinite(h.grad).all()
    assert torch.isfinite(w.grad).all()
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=0)
