"""Row passes in C: statistics, rows left to torch, threads, and what is loaded from where."""

import itertools
import math

import pytest
import torch
from helpers.kernels import make_problem

from opsdc_kernels import linear_divergence, plan, testing
from opsdc_kernels.problem import DIVERGENCES, Stat
from opsdc_kernels.row_pass import build, threads
from opsdc_kernels.row_pass import compiled as rows

CPU, SOURCE = torch.device("cpu"), rows.SOURCE

pytestmark = pytest.mark.skipif(
    rows.native().dll is None, reason=f"row passes run in {rows.native().description}"
)


def inputs(n=6, d=8, v=3001, scale=1.0):
    g = torch.Generator().manual_seed(0)
    h, w = scale * torch.randn(n, d, generator=g), torch.randn(v, d, generator=g)
    return h, w, h + 0.1 * torch.randn(n, d, generator=g), w + 0.1 * torch.randn(v, d, generator=g)


def call(tensors, backend="chunked", **options):
    """Loss, statistics, dH, dW and the bias gradient."""
    h, w, ht, wt = tensors
    leaves = [h.clone().requires_grad_(), w.clone().requires_grad_()]
    if "student_bias" in options:
        options["student_bias"] = options["student_bias"].clone().requires_grad_()
        leaves.append(options["student_bias"])
    loss, stats = linear_divergence(*leaves[:2], ht, wt, return_stats=True, backend=backend,
                                    **options)  # fmt: skip
    loss.backward()
    found = [getattr(stats, name) for name in stats.__slots__]
    return [loss.detach(), *(x for x in found if x is not None), *(x.grad for x in leaves)]


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("shared", [True, False])
def test_options_and_statistics(divergence, shared):
    h, w, ht, wt = inputs()
    g = torch.Generator().manual_seed(1)
    biases = {f"{side}_bias": torch.randn(len(w), generator=g) for side in ("student", "teacher")}
    if shared:
        wt = None
        del biases["teacher_bias"]
    for bias, scale, cap, temperature in itertools.product(
        ({}, biases), (1.0, (1.2, 0.9)), (None, 4.0, (None, 3.0)), (1.0, 1.7)
    ):
        options = {
            "divergence": divergence, "beta": 0.3 if divergence == "jsd" else 0.5,
            "logit_scale": scale, "logit_softcap": cap, "temperature": temperature,
            "target_ids": torch.arange(len(h)) * 500, "vocab_size": 2999,
        }  # fmt: skip
        got = call((h, w, ht, wt), **options, **bias)
        wide = [None if x is None else x.double() for x in (h, w, ht, wt)]
        want = call(wide, "reference", **options, **{k: x.double() for k, x in bias.items()})
        for a, b in zip(got, want, strict=True):
            assert (a - b).norm() <= 1e-5 * b.norm(), options


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("kl", [1e-10, 1e-4, 1.0, 5.0])
def test_as_accurate_as_torch(monkeypatch, divergence, kl):
    """Long rows; neither falls behind the other by more than what rounding can explain."""
    case = testing.make_case(tokens=5, dim=48, vocab_size=20_000, entropy=0.3, kl=kl)
    true = testing.truth(case, divergence=divergence)
    found = {}
    for switch in "10":
        monkeypatch.setenv(build.SWITCH, switch)
        outcome = testing.run(case, backend="chunked", divergence=divergence)
        found[switch] = testing.errors(outcome, true)
    for name in ("loss", "hidden_gradient", "weight_gradient", "worst_row"):
        assert getattr(found["1"], name) <= 1.5 * getattr(found["0"], name) + 3e-6


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_rows_in_doubt_and_their_neighbours(divergence):
    """A log-ratio that overflows and a masked column in some rows: those alone take torch."""
    h, w, ht, wt = inputs()
    ht[1] = -40 * h[1]
    want = call([x.double() for x in (h, w, ht, wt)], "reference", divergence=divergence)
    got = call((h, w, ht, wt), divergence=divergence)
    for a, b in zip(got, want, strict=True):
        assert (a - b).norm() <= 3e-5 * b.norm()
    others = [0, 2, 3, 4, 5]
    alone = call((h[others], w, ht[others], wt), divergence=divergence)
    torch.testing.assert_close(got[1][others], alone[1])


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_rows_in_doubt_under_a_soft_cap(divergence):
    """Their gradient passes the cap's slope, which torch takes for them."""
    h, w, ht, wt = inputs(scale=4.0)
    ht[1] = -20 * h[1]
    options = {"divergence": divergence, "logit_softcap": 60.0, "reduction": "sum"}
    s, t = (60 * torch.tanh(x[1:2] @ y.T / 60) for x, y in ((h, w), (ht, wt)))
    assert (t - s).max() > 60
    want = call([x.double() for x in (h, w, ht, wt)], "reference", **options)
    got = call((h, w, ht, wt), **options)
    for a, b in zip(got, want, strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm()
    doubtful = [x[-2][1] for x in (got, want)]
    assert (doubtful[0] - doubtful[1]).norm() <= 1e-4 * doubtful[1].norm()


def test_the_first_of_equal_peaks_is_the_students_favourite():
    """In one block of columns and in two; the teacher agrees with it or with the other."""
    for first, second in ((3, 9), (3, 700)):
        s = torch.randn(2, 1000, generator=torch.Generator().manual_seed(0)).T.contiguous().T
        t = s.clone()
        s[:, [first, second]] = 8.0
        t[0, first] = t[1, second] = 9.0
        problem = make_problem(s[:, :1], torch.zeros(1000, 1), s[:, :1], torch.zeros(1000, 1),
                               return_stats=True)  # fmt: skip
        got = rows.divergence_rows_(s, t, problem, gradient=False)
        assert got.values[Stat.AGREEMENT].tolist() == [1, 0]


def test_no_gradient_is_small_enough_to_make_denormals():
    h, w, ht, wt = inputs(scale=8.0)
    s, t = (w @ h.T).T, (wt @ ht.T).T
    for divergence in DIVERGENCES:
        left = s.clone()
        problem = make_problem(h, w, ht, wt, divergence=divergence)
        rows.divergence_rows_(left, t.clone(), problem, gradient=True)
        small = left[left != 0].abs().min()
        assert (left == 0).any()
        assert small >= 2.0**-100


def test_threads_change_no_bit(monkeypatch):
    monkeypatch.setattr(threads, "THREAD_LOGITS", 1)
    h, w, ht, wt = inputs(n=71)
    found = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        s, t = (w @ h.T).T, (wt @ ht.T).T
        problem = make_problem(h, w, ht, wt, return_stats=True)
        got = rows.divergence_rows_(s, t, problem, gradient=True)
        found.append([got.values, s])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_the_plan_says_what_runs_and_counts_its_scratch(monkeypatch):
    given = {"tokens": 512, "vocab_size": 49152, "student_dim": 576}
    in_c = plan.estimate(**given)
    assert in_c.row_passes.startswith("compiled by /")
    assert plan.estimate(**given, dtype=torch.float64).row_passes == "torch (float64)"
    monkeypatch.setenv(build.SWITCH, "0")
    in_torch = plan.estimate(**given)
    assert in_torch.row_passes == "torch (OPSDC_NATIVE=0)"
    # Fewer rows fit, each of the same two logits and hidden states.
    blocks = [x.workspace_bytes / x.chunk_rows for x in (in_torch, in_c)]
    assert blocks[0] > blocks[1]


def test_kl_of_peaked_rows_is_finite_and_positive():
    h, w, ht, wt = inputs(scale=40.0)
    loss = linear_divergence(h, w, ht, wt, reduction="none")
    assert (loss > 0).all()
    assert all(math.isfinite(x) for x in loss.tolist())
