"""The row pass over shards: 2 and 3 ranks against the whole head, and mutants that are seen."""

import contextlib
import dataclasses
import functools
import math

import pytest
import torch
from helpers.kernel_ranks import N, V, bound, call, differences, make_case, sharded, whole
from helpers.kernels import truth_of
from helpers.saturated import COLUMNS, failures, logits

from opsdc_kernels import linear_divergence, products, testing
from opsdc_kernels.chunked import op as chunked_op
from opsdc_kernels.chunked.run import run_chunks
from opsdc_kernels.vocab_parallel import rows, shards

pytestmark = pytest.mark.whole

DIVERGENCES = ("reverse_kl", "forward_kl", "jsd")


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_equals_the_whole_head(ranks, size, shared, divergence):
    """KL 1e-12 to 1, entropies from a peaked row to a flat one; and the truth's budget as well."""
    targets = torch.arange(N) * 41 % V
    for entropy in (0.01, 1.0, 5.0):
        for kl in (1e-12, 1e-6, 1e-3, 1.0):
            if (kl == 1.0 and entropy == 0.01) or (kl == 1e-12 and not shared):
                continue  # not representable
            case = make_case(entropy, kl, shared=shared)
            options = {"divergence": divergence, "target_ids": targets}
            want = call(case, **options)
            got = whole(ranks(sharded, size, case=case, **options))
            limit = bound(case, kl, torch.float32)
            assert max(differences(got, want)) <= limit, (entropy, kl, differences(got, want))
            true = truth_of(case, divergence=divergence)
            found, plain = (
                testing.errors(testing.Outcome(x[0], x[4], x[1], x[2]), true) for x in (got, want)
            )
            # What both owe to the same logits may exceed the budget in a single row.
            budget = testing.budget(case, true)
            if not testing.within(plain, budget):
                budget = testing.Budget(
                    *(1.1 * x + limit for x in (plain.loss, plain.weight_gradient, plain.rows))
                )
            assert not testing.excesses(found, budget), (entropy, kl, found, plain)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_float64(ranks, size, divergence):
    for shared in (True, False):
        for kl in (1e-12, 1e-6, 1.0) if shared else (1e-6, 1.0):
            case = make_case(1.0, kl, torch.float64, shared=shared)
            want = call(case, divergence=divergence)
            got = whole(ranks(sharded, size, case=case, divergence=divergence))
            limit = bound(case, kl, torch.float64)
            assert max(differences(got, want)) <= limit, (kl, differences(got, want))


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_every_option(ranks, divergence, reduction):
    weight = torch.linspace(0, 2, N, dtype=torch.float64)
    weight[5] = 0
    bias, other = torch.linspace(-1, 1, V).double(), torch.linspace(2, -1, V).double()
    for shared, cap, scale, vocab_size, train in (
        (True, None, 1.0, None, True),
        (True, 3.0, 1.1, V - 700, True),  # the last rank of three scores nothing, of two less
        (False, (4.0, 6.0), (1.1, 0.9), V - 1, True),
        (False, None, -1.0, 300, False),
    ):
        case = make_case(2.0, 0.1, torch.float64, shared=shared)
        options = {
            "divergence": divergence, "reduction": reduction, "logit_softcap": cap,
            "logit_scale": scale, "vocab_size": vocab_size, "temperature": 1.7,
            "token_weight": weight, "student_bias": bias, "trainable_head": train,
            "teacher_bias": other if not shared else None,
            "upstream": torch.linspace(0.5, -2, N).double() if reduction == "none" else 1.7,
            "target_ids": torch.arange(N) * 41 % (vocab_size or V),
        }  # fmt: skip
        want = call(case, **options)
        # A small workspace: several chunks.
        got = whole(ranks(sharded, 3, case=case, workspace_bytes=300_000, **options))
        assert (got[2] is None) == (not train)
        assert max(differences(got, want)) <= 1e-12, differences(got, want)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_equal_teacher_gives_exactly_zero(ranks, divergence):
    case = make_case(1.0, 1e-3, shared=False)
    for teacher in (None, case.student_weight.clone()):
        equal = dataclasses.replace(
            case, teacher_hidden=case.student_hidden, teacher_weight=teacher
        )
        loss, dh, dw, _, per_token, *_, agreement = whole(
            ranks(sharded, 3, case=equal, divergence=divergence)
        )[:10]
        for x in (loss, dh, dw, per_token):
            assert torch.equal(x, torch.zeros_like(x))
        assert torch.equal(agreement, torch.ones(N))


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("masks", [
    ([0, 5, 700], [0, 5, 700]), ([3, 400], []), ([], [1, 2, 999]), (range(335), range(335)),
    ([7], [7, 500]),
])  # fmt: skip
def test_infinite_logits(ranks, divergence, masks):
    """A masked vocabulary on both sides, on one, and a rank whose columns are all masked."""
    case = make_case(2.0, 0.1, torch.float64, shared=False)
    biases = [torch.zeros(V, dtype=torch.float64) for _ in masks]
    for bias, mask in zip(biases, masks, strict=True):
        bias[list(mask)] = -math.inf
    options = {"divergence": divergence, "student_bias": biases[0], "teacher_bias": biases[1]}
    want = call(case, **options)
    got = whole(ranks(sharded, 3, case=case, **options))
    for a, b in zip(got, want, strict=True):
        if b is not None:
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit(ranks, dtype):
    """The all-reduced dH is rounded once, like the unsharded one."""
    case = make_case(2.0, 1e-2, dtype, shared=True)
    got, want = whole(ranks(sharded, 2, case=case)), call(case)
    assert got[1].dtype == got[2].dtype == dtype
    limit = bound(case, 1e-2, dtype)
    found = differences(got, want)
    # The gradients differ where a last bit rounds the other way.
    assert max(found[:1] + found[4:]) <= limit
    assert max(found[1:3]) <= limit + torch.finfo(dtype).eps / 4


def saturated(group, **options):
    """This rank's columns of the gradient of saturated rows' logits."""
    size, rank = group.size(), group.rank()
    rows = slice(COLUMNS * rank // size, COLUMNS * (rank + 1) // size)
    s, t = logits()
    weight = torch.eye(COLUMNS)[rows]
    hidden = s.requires_grad_()
    loss = linear_divergence(hidden, weight, t, weight.clone(), reduction="sum",
                             process_group=group, **options)  # fmt: skip
    loss.backward()
    return hidden.grad


@pytest.mark.parametrize("size", [2, 3])
def test_saturated_rows(ranks, size):
    assert not failures(lambda **options: ranks(saturated, size, **options)[0])


def with_rounded_tile(group, case, correct):
    rounded = functools.partial(run_chunks, tile_dtype=torch.bfloat16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked_op, "run_chunks", rounded)
        if not correct:
            right = products.hidden_gradient
            patch.setattr(
                products, "hidden_gradient",
                lambda t, w, mean, kept=None: right(
                    dataclasses.replace(t, residual=torch.zeros_like(t.residual)), w, mean
                ),
            )  # fmt: skip
        return sharded(group, case, logit_softcap=8.0)


def test_rounded_tile_is_corrected_on_shards(ranks):
    """A component common to all rows of W, soft-cap and shards: Σ dZ of a shard is not 0."""
    case = make_case(2.0, 1e-2, shared=True, common_mode=3.0)
    want = call(case, logit_softcap=8.0)[1]
    errors = [
        float((whole(ranks(with_rounded_tile, 2, case=case, correct=x))[1] - want).norm())
        / float(want.norm())
        for x in (True, False)
    ]
    assert errors[0] <= 3e-3
    assert errors[1] >= 2 * errors[0]


@contextlib.contextmanager
def mutated(name):
    merge, gather, scalars = rows._merge, shards._gather, rows._row_scalars

    def without_last(parts, problem):
        gone = torch.full_like(parts.inside[-1:], -math.inf)
        return merge(parts._replace(inside=torch.cat([parts.inside[:-1], gone])), problem)

    def only_own_sums(ours, group):
        found = gather(ours, group)
        if ours.shape[0] == 3:  # the JSD's sums
            found.zero_()[group.rank()] = ours
        return found

    mutants = {
        "a shard is dropped": ("rows._merge", without_last),
        "dH is not added up": ("shards.Shard.add_up_", lambda shard, gradient: None),
        "each shard has its own mean": (
            "rows._row_scalars", lambda *a: (r := scalars(*a))._replace(to_mean=0 * r.to_mean)
        ),
        "each shard has its own normalizers": (
            "rows._row_scalars",
            lambda *a: (r := scalars(*a))._replace(log_ratio=0 * r.log_ratio),
        ),
        "the JSD's sums are local": ("shards._gather", only_own_sums),
        "the divergence within shards is dropped": (
            "rows._merge", lambda p, problem: merge(
                p._replace(mean=p.mean + p.reverse, reverse=0 * p.reverse, forward=0 * p.forward),
                problem,
            )
        ),
        "targets are not shifted": (
            "shards.Shard.localize",
            lambda shard, problem: dataclasses.replace(
                problem, options=dataclasses.replace(problem.options, vocab_size=shard.size)
            ),
        ),
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        where, mutant = mutants[name]
        patch.setattr(f"opsdc_kernels.vocab_parallel.{where}", mutant)
        yield


def sharded_mutant(group, case, mutant, **options):
    with mutated(mutant):
        return sharded(group, case, **options)


@pytest.mark.parametrize(("mutant", "divergence"), [
    ("a shard is dropped", "reverse_kl"),
    ("a shard is dropped", "forward_kl"),
    ("dH is not added up", "reverse_kl"),
    ("each shard has its own mean", "reverse_kl"),
    ("each shard has its own normalizers", "forward_kl"),
    ("the JSD's sums are local", "jsd"),
    ("the divergence within shards is dropped", "reverse_kl"),
    ("targets are not shifted", "reverse_kl"),
])  # fmt: skip
def test_mutants_are_seen(ranks, mutant, divergence):
    """What `test_equals_the_whole_head` compares differs far beyond its bound."""
    case = make_case(1.0, 1e-3, shared=True)
    options = {"divergence": divergence, "target_ids": torch.arange(N) * 41 % V}
    want = call(case, **options)
    results = ranks(sharded_mutant, 2, case=case, mutant=mutant, **options)
    limit = bound(case, 1e-3, torch.float32)
    assert max(max(differences(x[:2] + x[4:], want[:2] + want[4:])) for x in results) > 30 * limit
