"""The loss of some of the tokens: that of their rows alone, whatever columns are left out of it."""

import pytest
import torch

from opsdc.config.settings import LossConfig
from opsdc.method.loss import distillation_loss, select_tokens
from opsdc.models.head import Head

LENGTHS = (50, 20, 0, 30)
N, D, V = sum(LENGTHS), 32, 3000


def states():
    """(student, its head, teacher, its head): peaked rows over a Zipf-like head, one for both."""
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(V, D, generator=g) / D**0.5
    weight[:, -1] = -torch.arange(1.0, V + 1).log() * 1.5
    hidden = weight[torch.randint(200, (N, 3), generator=g)].sum(1) * 20
    hidden = hidden + torch.randn(N, D, generator=g)
    hidden[:, -1] = 2.5
    teacher = hidden + 0.7 * torch.randn(N, D, generator=g)
    head = Head(weight=weight.requires_grad_())
    return hidden.requires_grad_(), head, teacher, head


def gradients(states, weight, config):
    loss, stats = distillation_loss(*states, weight, config)
    return loss.detach(), torch.autograd.grad(loss, (states[0], states[1].weight)), stats


@pytest.mark.parametrize("criterion", ["divergence", "entropy"])
def test_the_loss_of_the_selected_tokens_is_that_of_their_rows(criterion):
    config = LossConfig(token_share=0.3, token_criterion=criterion)
    student, head, teacher, _ = states()
    weight = torch.rand(N, generator=torch.Generator().manual_seed(1)) + 0.1
    kept_weight, every = select_tokens(student, head, teacher, head, weight, LENGTHS, config)
    kept = kept_weight.nonzero()[:, 0]
    assert len(kept) == 15 + 6 + 9
    assert torch.equal(kept_weight[kept], weight[kept])
    value = every.divergence if criterion == "divergence" else every.student_entropy
    for own, flags in zip(value.split(LENGTHS), (kept_weight > 0).split(LENGTHS), strict=True):
        if len(own):
            assert own[flags].min() >= own[~flags].max()
    loss, (dh, dw), _ = gradients((student, head, teacher, head), kept_weight, config)
    rows = student.detach()[kept].requires_grad_()
    want, (dh_rows, dw_rows), _ = gradients(
        (rows, head, teacher[kept], head), weight[kept], LossConfig()
    )
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(dh[kept], dh_rows)
    torch.testing.assert_close(dw, dw_rows)
    assert int(dh.any(1).sum()) == len(kept)


def test_columns_left_out_of_the_selected_tokens_stay_within_the_tolerance():
    config = LossConfig(token_share=0.5, skip_tolerance=1e-2)
    given = states()
    weight, _ = select_tokens(*given, torch.ones(N), LENGTHS, config)
    _, exact, _ = gradients(given, weight, LossConfig())
    _, found, stats = gradients(given, weight, config)
    assert stats.kept_share.item() < 0.5
    for a, b in zip(found, exact, strict=True):
        assert 1e-6 < ((a - b).norm() / b.norm()).item() <= 1e-2


@pytest.mark.parametrize("tolerance", [0.1, 0.3])
def test_an_exact_value_is_of_all_columns_and_its_gradient_is_not(tolerance):
    config = LossConfig(skip_tolerance=tolerance)
    given, weight = states(), torch.full((N,), 1 / N)
    whole, exact, every = gradients(given, weight, LossConfig())
    bound, _, stats = gradients(given, weight, config)
    assert stats.kept_share.item() < 0.5
    assert bound < whole * (1 - 1e-4)
    assert bool((stats.divergence_error > 0).any())
    loss, stats = distillation_loss(*given, weight, config, exact_value=True)
    torch.testing.assert_close(loss.detach(), whole, rtol=1e-5, atol=0)
    torch.testing.assert_close(stats.divergence, every.divergence, rtol=1e-4, atol=1e-6)
    found = torch.autograd.grad(loss, (given[0], given[1].weight))
    for a, b in zip(found, exact, strict=True):
        assert 1e-6 < ((a - b).norm() / b.norm()).item() <= tolerance
    # A call that only scores has no columns to leave out.
    values, _ = distillation_loss(*given, None, config, reduction="none", exact_value=True)
    torch.testing.assert_close(values.mean().detach(), whole, rtol=1e-5, atol=0)
