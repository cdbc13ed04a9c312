"""Columns left to chance: right on average, with an error that is known, and as wanted."""

import itertools

import pytest
import torch
from helpers.kernels import make_problem, mutate_c

from opsdc_kernels import linear_divergence, plan, testing
from opsdc_kernels.columns import compiled, draw, sums, unbiased
from opsdc_kernels.memory import PeakMemory
from opsdc_kernels.row_pass import build
from opsdc_kernels.testing import Case

N, D, V = 300, 32, 3000
WEIGHT = torch.rand(N, generator=torch.Generator().manual_seed(1)).mul(2).round()


def language_case(
    *, temperature=0.6, drift=0.0, tokens=N, seed=0, dtype=torch.float64, dims=(D, D)
):
    """Peaked rows over a Zipf-like head: its last column is a bias that the hidden states see as
    1. `drift`: the teacher's head is this far from the student's, else one head serves both."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(V, dims[0], generator=g, dtype=torch.float64) / dims[0] ** 0.5
    weight[:, -1] = -torch.arange(1, V + 1).double().log() * 1.5
    favourites = weight[torch.randint(200, (tokens, 3), generator=g)]
    hidden = (favourites * torch.tensor([9.0, 8.0, 7.0])[:, None]).sum(1)
    hidden = (hidden + torch.randn(tokens, dims[0], generator=g)) / temperature
    hidden[:, -1] = 1 / temperature
    teacher = hidden + 0.3 * torch.randn(tokens, dims[0], generator=g).double() / temperature
    other = None if not drift else weight + drift * torch.randn(V, dims[0], generator=g)
    if dims[1] > dims[0]:  # a wider teacher, of nearly the same logits
        more = dims[1] - dims[0]
        teacher = torch.cat([teacher, 0.1 * torch.randn(tokens, more, generator=g).double()], 1)
        other = torch.cat([weight, 0.5 * torch.randn(V, more, generator=g).double()], 1)
    return Case(hidden, weight, teacher, other).to(dtype)


def gradients(case, **options):
    hidden, weight = (
        x.clone().requires_grad_() for x in (case.student_hidden, case.student_weight)
    )
    leaves = [hidden, weight]
    if options.get("student_bias") is not None:
        options["student_bias"] = options["student_bias"].to(hidden.dtype).clone().requires_grad_()
        leaves.append(options["student_bias"])
    loss, stats = linear_divergence(
        hidden, weight, case.teacher_hidden, case.teacher_weight, return_stats=True, **options
    )
    return loss.detach(), stats, torch.autograd.grad(loss, leaves)


def drawn(case, target=1e-2, **options):
    return gradients(case, columns="unbiased", skip_tolerance=target, **options)


def relative(a, b):
    return float(((a.double() - b.double()).norm() / b.double().norm()).detach())


# The estimator, by enumeration: every sample with its probability.

FEW = 9
SURE = 4


def samples(probability_K):
    """(columns, probability) of every sample of some columns."""
    for inside in itertools.product((False, True), repeat=len(probability_K)):
        inside = torch.tensor(inside)
        chance = torch.where(inside, probability_K, 1 - probability_K).prod()
        if chance > 0:
            yield inside.nonzero().squeeze(1), float(chance)


def enumerated(dtype, **options):
    """Means over all samples of dZ, of δ and of what estimates their variance; and the truth."""
    g = torch.Generator().manual_seed(2)
    hidden, weight = torch.randn(3, 5, generator=g), torch.randn(FEW, 5, generator=g)
    teacher = hidden + torch.randn(3, 5, generator=g)
    hidden, weight, teacher = (x.double() for x in (hidden, weight, teacher))
    other = None if options.pop("shared", True) else weight + 0.3
    probability = torch.rand(FEW, generator=g).double().mul(0.8).add(0.1)
    probability[:SURE] = 1
    problem = make_problem(hidden, weight, teacher, other, **options)
    # The truth: dZ of all columns by autograd, in float64.
    x = (hidden @ weight.T).requires_grad_()
    cap, scale, t = (options.get(k) for k in ("logit_softcap", "logit_scale", "temperature"))
    cap, scale, t = (cap or (None,))[0], (scale or (1.0,))[0], t or 1.0

    def logits(x, bias):
        x = (x if bias is None else x + bias) * scale
        return (x if cap is None else cap * torch.tanh(x / cap)) / t

    bias = options.get("student_bias")
    head = weight if other is None else other
    s = logits(x, bias).log_softmax(1)
    p = logits(teacher @ head.T, bias if other is None else None).log_softmax(1)
    divergence = (s.exp() * (s - p)).sum(1)
    (truth,) = torch.autograd.grad(divergence.sum(), x)
    truth = truth / (scale / t)
    lse = logits(x.detach(), bias).logsumexp(1)
    q, d = s.detach().exp(), (p - s).detach()
    whole = logits(teacher @ head.T, bias if other is None else None) - logits(x.detach(), bias)
    base = (q * whole)[:, :SURE].sum(1) / q[:, :SURE].sum(1)
    mean = torch.zeros_like(truth)
    shift, shifts = torch.zeros(3).double(), []
    for columns, chance in samples(probability):
        part = unbiased.restricted(problem, columns)
        sample = draw.Sample(columns, probability[columns])
        other_x = teacher @ head[columns].T
        if other is None:
            other_x = (teacher - hidden) @ weight[columns].T
        tiles = [y.T.contiguous().T.to(dtype) for y in (x.detach()[:, columns], other_x)]
        factors = torch.stack([sample.weight_K, sample.doubt_K]).to(dtype)
        found = sums.sample_sums_(part, *tiles, factors, lse.to(dtype), base.to(dtype), None)
        mean[:, columns] += chance * tiles[0].double()
        shift += chance * found.shift.double()
        shifts.append((chance, found.shift.double(), found.c_square.double()))
    true_shift = (q * d).sum(1) - (q[:, :SURE] * d[:, :SURE]).sum(1) / q[:, :SURE].sum(1)
    variance = sum(chance * (x - true_shift) ** 2 for chance, x, _ in shifts)
    estimate = sum(chance * x for chance, _, x in shifts)
    return mean, truth, shift, true_shift, estimate, variance


OPTIONS = (
    {}, {"shared": False}, {"temperature": 0.7, "logit_scale": (1.3, 1.3)},
    {"logit_softcap": (2.0, 2.0)}, {"logit_softcap": (2.0, 2.0), "shared": False},
    {"student_bias": torch.linspace(-1, 1, FEW).double(), "shared": True},
)  # fmt: skip


def gate(dtype=torch.float64, rtol=1e-10):
    for options in OPTIONS:
        given = dict(options)
        if dtype == torch.float32 and given.get("student_bias") is not None:
            given["student_bias"] = given["student_bias"].float()
        mean, truth, shift, true_shift, estimate, variance = enumerated(dtype, **given)
        scale = truth.norm()
        assert (mean - truth).norm() <= rtol * scale, options
        torch.testing.assert_close(shift, true_shift, rtol=10 * rtol, atol=rtol)
        torch.testing.assert_close(estimate, variance, rtol=100 * rtol, atol=rtol)


def test_the_mean_over_all_samples_is_the_gradient():
    """To the rounding of float64: no bias of second order is left."""
    gate()


@pytest.mark.skipif(compiled.native().dll is None, reason="no C compiler")
def test_the_mean_over_all_samples_is_the_gradient_in_c():
    gate(torch.float32, 3e-6)
    # And the sums are those of torch.
    case = language_case(dtype=torch.float32)
    found = [
        drawn(case, target_ids=torch.arange(N) % 50, seed=4, **o)
        for o in ({}, {"logit_softcap": 20.0})
    ]
    wide = [
        drawn(case.to(torch.float64), target_ids=torch.arange(N) % 50, seed=4, **o)
        for o in ({}, {"logit_softcap": 20.0})
    ]
    for (loss, stats, got), (true_loss, true, want) in zip(found, wide, strict=True):
        if float(stats.kept_share) != float(true.kept_share):
            continue  # another sample: a probability rounded across its number
        torch.testing.assert_close(loss.double(), true_loss, rtol=1e-4, atol=0)
        for a, b in zip(got, want, strict=True):
            assert relative(a, b) < 1e-4
        for name in ("teacher_logsumexp", "teacher_entropy", "agreement", "student_logprob",
                     "teacher_logprob", "divergence_error", "gradient_error"):  # fmt: skip
            a, b = getattr(stats, name), getattr(true, name)
            torch.testing.assert_close(a.double(), b, rtol=2e-3, atol=1e-4, msg=name)


# Whole calls.


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"token_weight": WEIGHT, "reduction": "sum"},
        {"temperature": 0.7, "logit_scale": 1.3},
        {"logit_softcap": 20.0},
        {"logit_softcap": (20.0, 30.0)},
        {"student_bias": torch.linspace(-1, 1, V)},
        {"drift": 1e-2},
        {"dims": (D, D + 8)},
        {"exact_value": True},
        {"target_ids": torch.arange(N) % 50},
    ],
    ids=lambda o: next(iter(o), "plain"),
)
def test_the_error_is_the_one_that_is_told_and_about_the_one_wanted(options):
    shape = {k: options[k] for k in ("drift", "dims") if k in options}
    given = {k: v for k, v in options.items() if k not in shape}
    case = language_case(**shape)
    exact = {k: v for k, v in given.items() if k != "exact_value"}
    true_loss, _, want = gradients(case, **exact)
    square, told = torch.zeros(2), torch.zeros(2)
    repeats = 12
    for seed in range(repeats):
        loss, stats, got = drawn(case, 2e-2, seed=seed, **given)
        square += torch.tensor([relative(a, b) ** 2 for a, b in zip(got, want)][:2])
        told += torch.tensor(
            [float(stats.hidden_gradient_error) ** 2, float(stats.weight_gradient_error) ** 2]
        )
        assert 0 < float(stats.kept_share) < 0.45
        if "exact_value" in options:
            assert float(loss) == float(true_loss)
    ratio = (told / square).sqrt()
    assert bool(((ratio > 1 / 1.6) & (ratio < 1.6)).all()), (square.sqrt(), told.sqrt())
    assert float((square / repeats).sqrt().max()) < 2 * 2e-2
    assert float((square / repeats).sqrt()[0]) > 0.2 * 2e-2  # no more columns than needed


def assert_unbiased(case, target, repeats):
    """The mean of many draws is within three standard errors of the truth."""
    true_loss, _, want = gradients(case)
    totals, loss, told = [torch.zeros_like(x) for x in want], 0.0, 0.0
    square = [0.0, 0.0]
    for seed in range(repeats):
        one_loss, stats, got = drawn(case, target, seed=seed)
        loss += float(one_loss) / repeats
        told += float(stats.divergence_error.square().sum()) ** 0.5 / len(case.student_hidden)
        for i, (total, x) in enumerate(zip(totals, got, strict=True)):
            total += x / repeats
            square[i] += relative(x, want[i]) ** 2 / repeats
    for total, exact, one in zip(totals, want, square, strict=True):
        assert relative(total, exact) < 3 * (one / repeats) ** 0.5 + 1e-10
    # The loss has a bias of third order.
    assert abs(loss - float(true_loss)) < 4 * told / repeats**1.5 + 2e-2 * float(true_loss)


@pytest.mark.whole
@pytest.mark.parametrize("temperature", [0.7, 0.5])
def test_the_mean_of_many_draws_is_the_gradient(temperature):
    assert_unbiased(language_case(temperature=temperature, tokens=60), 5e-2, 300)


@pytest.mark.slow
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("kl", [1e-6, 1e-2, 0.3])
@pytest.mark.parametrize("entropy", [0.05, 0.5, 3.0])
def test_the_mean_of_4096_draws_over_the_accuracy_grid(entropy, kl, shared):
    case = testing.make_case(
        tokens=40, dim=16, vocab_size=1000, entropy=entropy, kl=kl, shared_head=shared
    ).to(torch.float64)
    assert_unbiased(case, 0.2, 4096)


@pytest.mark.whole
def test_the_told_error_is_within_half_of_the_true_one_nearly_always():
    within = []
    for temperature, seed in itertools.product((0.8, 0.6), range(40)):
        case = language_case(temperature=temperature, seed=seed % 4)
        _, _, want = gradients(case)
        _, stats, got = drawn(case, 2e-2, seed=seed)
        told = (stats.hidden_gradient_error, stats.weight_gradient_error)
        within += [1 / 1.5 < float(e) / relative(a, b) < 1.5 for e, a, b in zip(told, got, want)]
    assert sum(within) / len(within) >= 0.95


def test_a_seed_decides():
    case = language_case(dtype=torch.float32)
    first, again, other = (drawn(case, seed=seed)[2] for seed in (5, 5, 6))
    for a, b, c in zip(first, again, other, strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)


def test_chunks_draw_for_themselves_whatever_the_scratch():
    """Numbers belong to the place of a token and not to a chunk: no two chunks draw alike."""
    first, second = (draw.uniforms(1, place, V, torch.device("cpu")) for place in (0, 128))
    assert not torch.equal(first, second)
    assert float(torch.corrcoef(torch.stack([first, second]))[0, 1]) < 0.06
    places = [draw.uniforms(seed, 0, 1, torch.device("cpu")).item() for seed in range(2000)]
    histogram = torch.histc(torch.tensor(places), 10, 0, 1)
    assert float(((histogram - 200) ** 2 / 200).sum()) < 28  # χ² of 9: one in a thousand
    case = language_case(dtype=torch.float32, tokens=4 * 128)
    ample, less = (drawn(case, seed=3, workspace_bytes=b)[2] for b in (None, 24 << 20))
    for a, b in zip(ample, less, strict=True):
        assert torch.equal(a, b)


def test_numbers_are_those_of_torch(monkeypatch):
    fast = draw.uniforms(7, 300, 500, torch.device("cpu"))
    monkeypatch.setenv(build.SWITCH, "0")
    assert torch.equal(fast, draw.uniforms(7, 300, 500, torch.device("cpu")))
    assert 0 <= float(fast.min()) < 0.02 < 0.98 < float(fast.max()) < 1


def test_the_threshold_allows_what_it_is_given():
    mass = torch.rand(5000, generator=torch.Generator().manual_seed(0)).double().pow(8)
    for most in (1e-3, 1e-1, 10.0):
        probability = draw.probabilities(mass, torch.tensor(most).double())
        got = float(((1 / probability - 1) * mass.square()).sum())
        assert 0.98 * most < got <= most
    assert bool((draw.probabilities(mass, torch.tensor(0.0).double()) == 1).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes(dtype):
    case = language_case(dtype=dtype)
    _, _, want = gradients(case.to(torch.float64))
    _, stats, got = drawn(case)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == dtype
        assert relative(a, b) < 2e-2 + 4 * torch.finfo(dtype).eps
    assert float(stats.kept_share) < 0.45


@pytest.mark.parametrize(("hidden", "weight"), [(True, False), (False, True)])
def test_one_gradient_alone(hidden, weight):
    case = language_case(dtype=torch.float32)
    h, w = case.student_hidden.clone(), case.student_weight.clone()
    h.requires_grad_(hidden), w.requires_grad_(weight)
    loss = linear_divergence(h, w, case.teacher_hidden, columns="unbiased")
    loss.backward()
    _, _, want = gradients(case)
    assert (h.grad is not None, w.grad is not None) == (hidden, weight)
    got, true = (h.grad, want[0]) if hidden else (w.grad, want[1])
    assert relative(got, true) < 3e-2


def test_flat_rows_take_all_columns_and_are_exact():
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(200, D, generator=g) / 20, torch.randn(V, D, generator=g)
    case = Case(hidden, weight, hidden + 0.01 * torch.randn(200, D, generator=g), None)
    _, stats, got = drawn(case, 1e-4)
    _, _, want = gradients(case)
    assert float(stats.kept_share) == 1
    assert float(stats.gemm_units) < 4.05 + 3 / 8  # one chunk was asked about its columns
    assert float(stats.hidden_gradient_error) == float(stats.weight_gradient_error) == 0
    for a, b in zip(got, want, strict=True):
        assert relative(a, b) < 1e-5


@pytest.mark.parametrize("shared", [True, False])
def test_columns_that_biases_take_away(shared):
    case = language_case(drift=0.0 if shared else 1e-2)
    bias = torch.zeros(V, dtype=torch.float64)
    bias[::7] = -torch.inf
    biases = {"student_bias": bias} if shared else {"student_bias": bias, "teacher_bias": bias}
    _, stats, got = drawn(case, **biases)
    _, _, want = gradients(case, **biases)
    assert float(stats.kept_share) < 0.45
    for a, b in zip(got, want, strict=True):
        assert bool(a.isfinite().all())
        assert relative(a, b) < 3e-2
    assert float(got[1][::7].abs().max()) == 0
    # Of one side alone: nothing is left to chance.
    _, stats, got = drawn(case, student_bias=bias, teacher_bias=torch.zeros_like(bias))
    _, _, want = gradients(case, student_bias=bias, teacher_bias=torch.zeros_like(bias))
    assert float(stats.kept_share) == 1
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def test_without_gradients_nothing_is_drawn():
    case = language_case()
    exact = linear_divergence(case.student_hidden, case.student_weight, case.teacher_hidden)
    loss, stats = linear_divergence(
        case.student_hidden, case.student_weight, case.teacher_hidden, columns="unbiased",
        return_stats=True,
    )  # fmt: skip
    assert torch.equal(loss, exact)
    assert float(stats.kept_share) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"columns": "some"}, "columns='some' is none of exact, unbiased, bounded"),
        ({"columns": "bounded"}, "wants skip_tolerance"),
        ({"columns": "exact", "skip_tolerance": 1e-3}, "has no effect"),
        ({"columns": "unbiased", "divergence": "jsd"}, "does not apply"),
        ({"columns": "unbiased", "divergence": "forward_kl"}, "does not apply"),
        ({"columns": "unbiased", "reduction": "none"}, 'reduction="sum"'),
        ({"columns": "unbiased", "backend": "reference"}, "chunked"),
        ({"columns": "unbiased", "skip_tolerance": 0.0}, "between 0 and 1"),
        ({"columns": "unbiased", "seed": -1}, "seed=-1"),
        ({"columns": "unbiased", "seed": 1.5}, "seed=1.5"),
        ({"exact_value": True}, "no effect"),
    ],
)
def test_refusals(options, message):
    case = language_case()
    with pytest.raises(ValueError, match=message):
        linear_divergence(case.student_hidden, case.student_weight, case.teacher_hidden, **options)


@pytest.mark.parametrize("exact_value", [False, True])
def test_peak_memory_is_the_planned_scratch_and_gradients(exact_value):
    n, d, v = 512, 64, 24576
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(v, d, generator=g) / d**0.5
    weight[:, -1] = -1.5 * torch.arange(1, v + 1).log()
    hidden = 9 * weight[torch.randint(200, (n,), generator=g)] + torch.randn(n, d, generator=g)
    hidden[:, -1] = 2
    teacher = hidden + 0.3 * torch.randn(n, d, generator=g)
    hidden.requires_grad_()
    weight.requires_grad_()
    budget = 48 << 20

    def call():
        loss = linear_divergence(
            hidden, weight, teacher, columns="unbiased", workspace_bytes=budget,
            exact_value=exact_value,
        )  # fmt: skip
        loss.backward()

    call()
    hidden.grad = weight.grad = None
    with PeakMemory() as memory:
        call()
    planned = plan.estimate(tokens=n, vocab_size=v, student_dim=d, workspace_bytes=budget,
                            kept_share=0.1)  # fmt: skip
    assert memory.peak_mib * 2**20 <= planned.peak_bytes + (4 << 20)


# Wrong variants.


def changed(owner, name, change):
    original = getattr(owner, name)
    return {(owner, name): lambda *args, **kwargs: change(original(*args, **kwargs))}


MUTANTS = {
    "weights not inverted": lambda: {(draw.Sample, "weight_K"): property(
        lambda self: torch.ones_like(self.probability_K))},
    "weights squared": lambda: {(draw.Sample, "weight_K"): property(
        lambda self: self.probability_K.reciprocal() ** 2)},
    "doubt of one factor": lambda: {(draw.Sample, "doubt_K"): property(
        lambda self: (1 - self.probability_K) / self.probability_K)},
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_killed(monkeypatch, name):
    for (owner, attribute), mutant in MUTANTS[name]().items():
        monkeypatch.setattr(owner, attribute, mutant)
    with pytest.raises(AssertionError):
        gate()


C_MUTANTS = {
    "own part counted from the others": ("(apart + (a - 1) * q * c)", "apart"),
    "own part once too often": ("(apart + (a - 1) * q * c)", "(apart + a * q * c)"),
    "weights missing in the shift": ("shift[j] += a * qc;", "shift[j] += qc;"),
    "weights missing in dZ": ("-(a * q) * (apart", "-q * (apart"),
    "no base": ("c = b->d[v][j] - p->base[j], apart", "c = b->d[v][j], apart"),
    "no slope": ("if (job->student.range) EACH_COLUMN(b) LANES b->s[v][j] *= b->slope[v][j];\n"
                 "    EACH_COLUMN(b) {\n        float *x = job->student.x", "EACH_COLUMN(b) {\n"
                 "        float *x = job->student.x"),
    "variance by the weights": ("only_c[j] += doubt * (qc * qc);", "only_c[j] += a * (qc * qc);"),
}  # fmt: skip


@pytest.mark.parametrize("name", C_MUTANTS)
def test_compiled_mutant_is_killed(monkeypatch, name, tmp_path):
    mutate_c(monkeypatch, tmp_path, compiled, *C_MUTANTS[name])
    with pytest.raises(AssertionError):
        gate(torch.float32, 3e-6)


def test_numbers_shared_by_all_chunks_are_noticed(monkeypatch):
    """With the same numbers in every chunk the errors of chunks add up instead of averaging."""
    original = draw.uniforms
    case = language_case(tokens=1024, temperature=0.6)
    row = torch.zeros(8).long()
    case = Case(case.student_hidden[:128].repeat(8, 1), case.student_weight,
                case.teacher_hidden[:128].repeat(8, 1), None)  # fmt: skip
    assert len(row) == 8

    def ratio():
        _, _, want = gradients(case)
        found = [drawn(case, 5e-2, seed=seed) for seed in range(6)]
        true = sum(relative(got[1], want[1]) ** 2 for _, _, got in found)
        told = sum(float(stats.weight_gradient_error) ** 2 for _, stats, _ in found)
        return (true / told) ** 0.5

    assert ratio() < 1.5
    monkeypatch.setattr(draw, "uniforms", lambda seed, place, *a: original(seed, 0, *a))
    assert ratio() > 2
