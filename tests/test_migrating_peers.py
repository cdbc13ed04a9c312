"""Rows of docs/migrating.md on the other library's side, where it is installed."""

import functools

import pytest
import torch
import torch.nn.functional as F
from helpers.migrating import (
    close,
    gradients,
    inputs,
    is_liger,
    near,
    peer,
    table,
    with_nan,
    without_a_column,
)

from opsdc_kernels import linear_divergence, linear_reverse_kl

pytestmark = [pytest.mark.whole, pytest.mark.filterwarnings("ignore")]

THEIRS = {}
"""{(topic of a row, library): its test}."""


def theirs(topic, library):
    return functools.partial(THEIRS.setdefault, (topic, library))


ENDS = {0.0: {"divergence": "forward_kl"}, 1.0: {}, 0.3: {"divergence": "jsd", "beta": 0.3}}
"""Our options for their β."""


@theirs("β", "Liger")
def _():
    tensors = inputs(9)
    for beta, options in ENDS.items():
        loss = is_liger(beta=beta)(*tensors, torch.zeros(9, dtype=torch.long))
        close(loss, linear_divergence(*tensors, **options))


@theirs("β", "TRL")
def _():
    h, W, ht, Wt = inputs(3, 5)
    for beta, options in ENDS.items():
        loss = peer("TRL")["_chunked_divergence_loss"](h, ht, W, Wt, torch.ones(3, 5), beta=beta)[0]
        close(loss, linear_divergence(h, W, ht, Wt, **options))


@theirs("β", "unsloth")
def _():
    tensors = inputs(9)
    for beta, options in ENDS.items():
        loss = peer("unsloth")["fused_linear_jsd"](*tensors, beta=beta)
        close(loss, linear_divergence(*tensors, **options))


@theirs("defaults", "Liger")
def _():
    h, W, ht, Wt = inputs(9)
    labels = torch.arange(9)
    loss = peer("Liger")["LigerFusedLinearJSDLoss"](compiled=False)(h, W, ht, Wt, labels)
    jsd = linear_divergence(h, W, ht, Wt, divergence="jsd")
    close(loss, 0.5 * F.cross_entropy(h @ W.T, labels) + 0.5 * jsd)


@theirs("labels", "Liger")
def _():
    tensors, labels = inputs(9), torch.tensor([1, -100, 2, 3, -100, 4, 5, 6, -100])
    loss = is_liger(beta=1.0)(*tensors, labels)
    close(loss, linear_reverse_kl(*tensors, token_weight=(labels != -100).float()))


@theirs("labels", "TRL, GKD")
def _():
    (h, W, ht, Wt), labels = inputs(3, 5), torch.arange(15).view(3, 5)
    labels[1, 2:] = -100
    loss = peer("TRL, GKD")["GKDTrainer"].generalized_jsd_loss(h @ W.T, ht @ Wt.T, labels, beta=1.0)
    close(loss, linear_reverse_kl(h, W, ht, Wt, token_weight=(labels != -100).float()))


@theirs("items in the batch", "TRL")
def _():
    h, W, ht, Wt = inputs(3, 5)
    loss = peer("TRL")["_chunked_divergence_loss"](
        h, ht, W, Wt, torch.ones(3, 5), beta=1.0, num_items_in_batch=31
    )[0]
    close(loss, linear_reverse_kl(h, W, ht, Wt, reduction="sum") / 31)


@theirs("batchmean", "TRL, GKD")
def _():
    h, W, ht, Wt = inputs(3, 5)
    loss = peer("TRL, GKD")["GKDTrainer"].generalized_jsd_loss(h @ W.T, ht @ Wt.T, beta=1.0)
    close(loss, linear_reverse_kl(h, W, ht, Wt, reduction="sum") / 3)


@theirs("none", "TRL, GKD")
def _():
    h, W, ht, Wt = inputs(3, 5)
    terms = peer("TRL, GKD")["GKDTrainer"].generalized_jsd_loss(
        h @ W.T, ht @ Wt.T, beta=1.0, reduction="none"
    )
    close(terms.sum(-1), linear_reverse_kl(h, W, ht, Wt, reduction="none"))


@theirs("temperature", "Liger")
def _():
    tensors = inputs(9)
    loss = is_liger(beta=1.0, temperature=3.0)(*tensors, torch.zeros(9, dtype=torch.long))
    close(loss, linear_reverse_kl(*tensors, temperature=3.0))


@theirs("entropy", "TRL")
def _():
    h, W, ht, Wt = inputs(3, 5)
    mask = torch.ones(3, 5)
    mask[1] = 0
    entropy = peer("TRL")["_chunked_divergence_loss"](h, ht, W, Wt, mask, beta=1.0)[1]
    _, stats = linear_reverse_kl(h, W, ht, Wt, token_weight=mask, return_stats=True)
    close(entropy, stats.student_entropy.sum())


@theirs("mixed dtypes", "TRL")
def _():
    h, W, ht, Wt = inputs(3, 5)
    loss_of, ones = peer("TRL")["_chunked_divergence_loss"], torch.ones(3, 5)
    loss = loss_of(h.bfloat16(), ht, W, Wt, ones, beta=1.0)[0]
    close(loss, loss_of(h, ht, W, Wt, ones, beta=1.0)[0], rtol=0.05)


@theirs("autocast, all float32", "TRL")
def _():
    h, W, ht, Wt = inputs(3, 5)
    loss_of, ones = peer("TRL")["_chunked_divergence_loss"], torch.ones(3, 5)
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(h, ht, W, Wt, ones, beta=1.0)[0]
    assert abs(loss - linear_reverse_kl(h, W, ht, Wt)) > 1e-4


@theirs("dtype of the loss", "TRL, GKD")
def _():
    h, W, ht, Wt = inputs(3, 5, dtype=torch.bfloat16)
    loss = peer("TRL, GKD")["GKDTrainer"].generalized_jsd_loss(h @ W.T, ht @ Wt.T, beta=1.0)
    assert loss.dtype == torch.bfloat16


@theirs("teacher with a gradient", "TRL")
def _():
    h, W, ht, Wt = inputs(3, 5)
    h.requires_grad_(), ht.requires_grad_()
    loss = peer("TRL")["_chunked_divergence_loss"](h, ht, W, Wt, torch.ones(3, 5), beta=1.0)[0]
    loss.backward()
    assert h.grad is not None
    assert ht.grad is None


@theirs("two sizes of vocabulary", "TRL")
def _():
    h, W, ht, Wt = inputs(3, 5)
    more = torch.cat([Wt, Wt[:3]])
    loss_of = peer("TRL")["_chunked_divergence_loss"]
    loss, cut = (loss_of(h, ht, W, x, torch.ones(3, 5), beta=1.0)[0] for x in (more, more[:40]))
    assert torch.equal(loss, cut)


@theirs("two sizes of vocabulary", "Liger")
def _():
    h, W, ht, Wt = inputs(9)
    labels = torch.zeros(9, dtype=torch.long)
    more = torch.cat([Wt, Wt[:3]])
    loss = is_liger(beta=1.0)(h, W, ht, more, labels)
    padded = torch.cat([W, torch.zeros(3, 16)])
    close(loss, linear_reverse_kl(h, padded, ht, more))


@theirs("NaN in a masked row", "Liger")
def _():
    *tensors, labels = with_nan()
    loss, _, dW = gradients(lambda *x: is_liger(beta=1.0)(*x, labels), *tensors)
    assert loss.isfinite()
    assert dW.isnan().any()


@theirs("NaN in a masked row", "TRL, GKD")
def _():
    h, W, ht, Wt, labels = with_nan()
    loss, _, dW = gradients(
        lambda h, W: peer("TRL, GKD")["GKDTrainer"].generalized_jsd_loss(
            (h @ W.T)[None], (ht @ Wt.T)[None], labels[None], beta=1.0
        ),
        h,
        W,
    )
    assert loss.isfinite()
    assert dW.isnan().any()


@theirs("−∞ logits on both sides", "TRL")
def _():
    (h, W, ht, Wt), bias = without_a_column()
    biases = {"student_lm_head_bias": bias, "teacher_lm_head_bias": bias}
    loss = peer("TRL")["_chunked_divergence_loss"](
        h, ht, W, Wt, torch.ones(3, 5), beta=1.0, **biases
    )[0]
    assert loss.isnan()


@theirs("−∞ logits on both sides", "unsloth")
def _():
    (h, W, ht, Wt), bias = without_a_column()
    loss = peer("unsloth")["fused_linear_jsd"](
        h.flatten(0, 1), W, ht.flatten(0, 1), Wt, beta=1.0, student_bias=bias, teacher_bias=bias
    )
    assert loss.isnan()


@theirs("−∞ logits on both sides", "Liger")
def _():
    (h, W, ht, Wt), bias = without_a_column()
    labels = torch.zeros(15, dtype=torch.long)
    h, ht = h.flatten(0, 1), ht.flatten(0, 1)
    assert is_liger(beta=1.0)(h, W, ht, Wt, labels, bias, bias).isnan()


@theirs("teacher = student", "Liger")
def _():
    h, W, ht, Wt = near()
    one = torch.zeros(1, dtype=torch.long)
    rows = [is_liger(beta=1.0)(h[i : i + 1], W, ht[i : i + 1], Wt, one) for i in range(40)]
    assert min(map(float, rows)) < 0


def test_each_is_of_a_row():
    assert {topic for topic, _ in THEIRS} <= {row[0] for row in table("What means something else")}


@pytest.mark.parametrize(("topic", "library"), THEIRS)
def test_theirs(topic, library):
    THEIRS[topic, library]()
