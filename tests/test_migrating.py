"""Each row of docs/migrating.md on our side; test_migrating_peers has the other libraries'."""

import functools

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers.migrating import (
    close,
    gradients,
    inputs,
    log_probs,
    near,
    peer,
    reverse,
    table,
    with_nan,
    without_a_column,
)

from opsdc_kernels import linear_divergence, linear_reverse_kl

pytestmark = [pytest.mark.whole, pytest.mark.filterwarnings("ignore")]

OURS = {}
"""{topic of a row: its test}."""


def ours(topic):
    return functools.partial(OURS.setdefault, topic)


@pytest.mark.parametrize(("library", "there", "here"), table("The call"))
def test_both_calls_give_one_number(library, there, here):
    by_batch = library.startswith("TRL")
    h, W, ht, Wt = inputs(*((3, 5) if by_batch else (15,)))
    labels = torch.randint(0, 40, h.shape[:-1], generator=torch.Generator().manual_seed(1))
    labels.view(-1)[::4] = -100
    names = {"h": h, "W": W, "ht": ht, "Wt": Wt, "labels": labels, "mask": (labels != -100).float()}
    names |= {f.__name__: f for f in (linear_divergence, linear_reverse_kl)}
    our_loss = eval(here.strip("`"), dict(names))
    close(eval(there.strip("`"), {**names, **peer(library)}), our_loss)
    assert float(our_loss) > 0.1


TOPICS = [row[0] for row in table("What means something else")]


def test_every_row_has_its_test():
    assert sorted(OURS) == sorted(TOPICS)


@pytest.mark.parametrize("topic", TOPICS)
def test_ours(topic):
    OURS[topic]()


@ours("β")
def _():
    h, W, ht, Wt = inputs(9, dtype=torch.float64)
    log_q, log_p = log_probs(h, W, ht, Wt)
    m = 0.7 * log_q.exp() + 0.3 * log_p.exp()
    want = 0.7 * reverse(log_q, m.log()) + 0.3 * reverse(log_p, m.log())
    close(linear_divergence(h, W, ht, Wt, divergence="jsd", beta=0.3), want.mean())
    close(linear_divergence(h, W, ht, Wt, divergence="forward_kl"), reverse(log_p, log_q).mean())
    close(linear_divergence(h, W, ht, Wt), reverse(log_q, log_p).mean())
    for beta in (0.0, 1.0):
        with pytest.raises(ValueError, match="forward_kl"):
            linear_divergence(h, W, ht, Wt, divergence="jsd", beta=beta)


@ours("defaults")
def _():
    tensors = inputs(9)
    close(linear_divergence(*tensors), reverse(*log_probs(*tensors)).mean())


@ours("labels")
def _():
    tensors, labels = inputs(9), torch.tensor([1, -100, 2, 3, -100, 4, 5, 6, -100])
    kept = labels != -100
    want = reverse(*log_probs(*tensors))[kept].mean()
    close(linear_reverse_kl(*tensors, token_weight=kept.float()), want)


@ours("items in the batch")
def _():
    tensors = inputs(3, 5)
    want = reverse(*log_probs(*tensors)).sum() / 31
    close(linear_reverse_kl(*tensors, reduction="sum") / 31, want)


@ours("batchmean")
def _():
    tensors = inputs(3, 5)
    log_q, log_p = log_probs(*tensors)
    torchs = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    close(torchs, linear_divergence(*tensors, divergence="forward_kl", reduction="sum") / 3)
    close(torchs / 5, linear_divergence(*tensors, divergence="forward_kl"))


@ours("mean")
def _():
    tensors = inputs(9)
    log_q, log_p = log_probs(*tensors)
    torchs = F.kl_div(log_q, log_p, reduction="mean", log_target=True)
    close(torchs * 40, linear_divergence(*tensors, divergence="forward_kl"))


@ours("none")
def _():
    tensors, weight = inputs(9), torch.ones(9)
    weight[2], weight[4] = 0, 3
    log_q, log_p = log_probs(*tensors)
    want = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    want[2] = 0
    options = {"divergence": "forward_kl", "reduction": "none", "token_weight": weight}
    close(linear_divergence(*tensors, **options), want)


@ours("sequence mean")
def _():
    tensors, mask = inputs(3, 5), torch.ones(3, 5)
    mask[0, 2:], mask[1, 4:] = 0, 0
    per_token = reverse(*log_probs(*tensors)) * mask
    want = (per_token.sum(1) / mask.sum(1)).mean()
    weight = mask / mask.sum(1, keepdim=True)
    close(linear_reverse_kl(*tensors, token_weight=weight, reduction="sum") / 3, want)


@ours("temperature")
def _():
    tensors = inputs(9)
    close(linear_reverse_kl(*tensors, temperature=3.0), reverse(*log_probs(*tensors, 3.0)).mean())
    log_q, log_p = log_probs(*tensors, 2.0)[0], log_probs(*tensors, 5.0)[1]
    got = linear_reverse_kl(*tensors, logit_scale=(1 / 2.0, 1 / 5.0))
    close(got, reverse(log_q, log_p).mean())


@ours("logits, not states")
def _():
    h, W, ht, Wt = inputs(9)
    z, zt, eye = h @ W.T, ht @ Wt.T, torch.eye(40)
    loss, dz, _ = gradients(lambda z, head: linear_reverse_kl(z, head, zt, eye), z, eye)
    free = z.clone().requires_grad_()
    want = reverse(free.log_softmax(-1), zt.log_softmax(-1)).mean()
    want.backward()
    close(loss, want.detach())
    close(dz, free.grad)


@ours("log-probabilities in")
def _():
    log_q, log_p = log_probs(*inputs(9))
    entries = log_q.clone().requires_grad_()
    F.kl_div(entries, log_p, reduction="sum", log_target=True).backward()
    g, eye = entries.grad, torch.eye(40)
    options = {"divergence": "forward_kl", "reduction": "sum"}
    _, dz, _ = gradients(lambda z, w: linear_divergence(z, w, log_p, eye, **options), log_q, eye)
    close(dz, g - log_q.exp() * g.sum(-1, keepdim=True))
    assert (dz - g).norm() > 0.1 * g.norm()


@ours("unnormalised targets")
def _():
    log_q, log_p = log_probs(*inputs(9))
    eye = torch.eye(40)
    close(linear_reverse_kl(log_q, eye, log_p + 1.5, eye), reverse(log_q, log_p).mean())
    torchs = [F.kl_div(log_q, log_p + c, reduction="sum", log_target=True) for c in (0.0, 1.5)]
    assert abs(torchs[0] - torchs[1]) > 1


@ours("entropy")
def _():
    tensors = inputs(9)
    log_q, log_p = log_probs(*tensors)
    _, stats = linear_reverse_kl(*tensors, return_stats=True)
    close(stats.student_entropy, -(log_q.exp() * log_q).sum(-1))
    close(stats.teacher_entropy, -(log_p.exp() * log_p).sum(-1))
    assert (stats.student_entropy >= 0).all()


@ours("mixed dtypes")
def _():
    h, W, ht, Wt = inputs(9)
    with pytest.raises(TypeError, match="cast to one dtype"):
        linear_reverse_kl(h.bfloat16(), W, ht, Wt)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear_reverse_kl(h.bfloat16(), W, ht, Wt).isfinite()


@ours("autocast, all float32")
def _():
    tensors = inputs(9)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_reverse_kl(*tensors)
    assert torch.equal(loss, linear_reverse_kl(*tensors))
    log_q, log_p = log_probs(*(x.bfloat16().float() for x in tensors))
    assert abs(loss - reverse(log_q, log_p).mean()) > 1e-4


@ours("dtype of the loss")
def _():
    for dtype, want in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        assert linear_reverse_kl(*inputs(9, dtype=dtype)).dtype == want


@ours("teacher with a gradient")
def _():
    h, W, ht, Wt = inputs(9)
    with pytest.raises(ValueError, match=r"\.detach\(\)"):
        linear_reverse_kl(h, W, ht.requires_grad_(), Wt)


@ours("two sizes of vocabulary")
def _():
    h, W, ht, Wt = inputs(9)
    more = torch.cat([Wt, Wt[:3]])
    with pytest.raises(ValueError, match="vocab_size="):
        linear_reverse_kl(h, W, ht, more)
    got = linear_reverse_kl(h, W, ht, more, vocab_size=40)
    assert torch.equal(got, linear_reverse_kl(h, W, ht, Wt))


@ours("NaN in a masked row")
def _():
    *tensors, labels = with_nan()
    mask = (labels != -100).float()
    got = gradients(lambda *x: linear_reverse_kl(*x, token_weight=mask), *tensors)
    tensors[0][3] = 0.5
    clean = gradients(lambda *x: linear_reverse_kl(*x, token_weight=mask), *tensors)
    for a, b in zip(got, clean, strict=True):
        assert torch.equal(a, b)


@ours("−∞ logits on both sides")
def _():
    (h, W, ht, Wt), bias = without_a_column()
    keep = bias == 0
    got = linear_reverse_kl(h, W, ht, Wt, student_bias=bias, teacher_bias=bias)
    close(got, linear_reverse_kl(h, W[keep], ht, Wt[keep]))


@ours("teacher = student")
def _():
    h, W, *_ = inputs(9)
    for result in gradients(linear_reverse_kl, h, W, h.clone(), W.clone()):
        assert torch.equal(result, torch.zeros_like(result))
    h, W, ht, Wt = near()
    got = linear_reverse_kl(h, W, ht, Wt.clone(), reduction="none")
    assert (got >= 0).all()
    assert 0 < got.mean() < 1e-7


@ours("nothing left")
def _():
    h, W, ht, Wt = inputs(9)
    for part, options in ((slice(0), {}), (slice(9), {"token_weight": torch.zeros(9)})):
        call = functools.partial(linear_reverse_kl, **options)
        for result in gradients(call, h[part], W, ht[part], Wt):
            assert torch.equal(result, torch.zeros_like(result))


@ours("sharded vocabulary")
def _():
    """One rank here; tests/kernels/vocab_parallel has uneven and empty shards of several."""
    tensors = inputs(9)
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        options = {"process_group": dist.group.WORLD, "vocab_size": 33}
        got = linear_reverse_kl(*tensors, **options)
    finally:
        dist.destroy_process_group()
    close(got, linear_reverse_kl(*tensors, vocab_size=33))
