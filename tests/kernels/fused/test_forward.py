"""The fused kernels against the float64 reference, in Triton's interpreter (tiny shapes)."""

import math
import os

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from opsdc_kernels import linear_divergence

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("run by test_interpreter.py", allow_module_level=True)

# The interpreter computes both branches of a `where`, as a GPU does, and numpy remarks on it.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
DIVERGENCES = ("reverse_kl", "forward_kl", "jsd")
EPS = 3e-7


def inputs(N=5, V=70, D=33, E=None, shared=False, near=0.3, scale=1.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    h = torch.randn(N, D, generator=g)
    w = torch.randn(V, D, generator=g) * scale / math.sqrt(D)
    if shared:
        return h, w, h + near * torch.randn(N, D, generator=g), None
    if E is None:
        return (
            h,
            w,
            h + near * torch.randn(N, D, generator=g),
            w + near * scale * torch.randn(V, D, generator=g) / math.sqrt(D),
        )
    return h, w, torch.randn(N, E, generator=g), torch.randn(V, E, generator=g) * scale / E**0.5


def run(backend, tensors, upstream=None, **options):
    """(loss, dH, dW, db, statistics); the reference runs in float64."""

    def cast(x):
        wide = backend == "reference" and isinstance(x, torch.Tensor) and x.is_floating_point()
        return x.double() if wide else x

    h, w, ht, wt = (cast(x) for x in tensors)
    options = {name: cast(x) for name, x in options.items()}
    h, w = h.clone().requires_grad_(), w.clone().requires_grad_()
    bias = options.get("student_bias")
    if bias is not None:
        options["student_bias"] = bias = bias.clone().requires_grad_()
    loss, stats = linear_divergence(h, w, ht, wt, backend=backend, return_stats=True, **options)
    total = loss.sum() if upstream is None else (loss * upstream).sum()
    total.backward()
    return loss.detach(), h.grad, w.grad, None if bias is None else bias.grad, stats


def relative(got, truth):
    assert torch.isfinite(got).all()
    size = truth.norm().item()
    error = (got.double() - truth.double()).norm().item()
    return error / size if size > 0 else error


def conditioning(tensors, truth_stats, largest_logit):
    """What fp32 logits, subtracted, add to every relative error."""
    if tensors[3] is None:
        return 0.0
    kl = truth_stats.divergence
    kl = kl[kl > 0]
    return EPS * largest_logit / math.sqrt(2 * kl.min().item()) if kl.numel() else 0.0


def check(tensors, upstream=None, loss_limit=1e-5, gradient_limit=3e-5, **options):
    got = run("fused", tensors, upstream, **options)
    truth = run("reference", tensors, upstream, **options)
    h, w, ht, wt = (None if x is None else x.double() for x in tensors)
    largest = max(
        (h @ w.T).abs().max().item(), (ht @ (w if wt is None else wt).T).abs().max().item()
    )
    slack = conditioning(tensors, truth[4], max(largest, 1.0))
    assert (got[0] >= 0).all()
    assert relative(got[0], truth[0]) <= loss_limit + 2 * slack
    for mine, other in zip(got[1:4], truth[1:4]):
        assert (mine is None) == (other is None)
        if mine is not None:
            assert mine.shape == other.shape
            assert relative(mine, other) <= gradient_limit + 2 * slack
    for field in truth[4].__dataclass_fields__:
        mine, other = getattr(got[4], field), getattr(truth[4], field)
        assert (mine is None) == (other is None), field
        if mine is not None:
            assert mine.dtype == torch.float32
            torch.testing.assert_close(
                mine.double(), other.double(), rtol=1e-5 + 2 * slack, atol=2e-6, msg=field
            )


EDGES = [
    (1, 1, 16, False),
    (2, 2, 16, False),
    (17, 31, 16, False),
    (2, 33, 65, True),
    (1, 127, 65, False),
    (17, 129, 16, True),
    (2, 129, 65, False),
]


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(("N", "V", "D", "shared"), EDGES)
def test_edge_shapes_with_peaked_logits(N, V, D, shared, divergence):
    h, w, ht, wt = inputs(N, V, D, shared=shared, scale=4.0)
    w[-1] += 2 * h[0] / D**0.5  # the last column, beside the padding of its tile, is the peak
    wt = None if wt is None else wt.clone()
    check((h, w, ht, wt), divergence=divergence, target_ids=torch.arange(N) % V)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("slices", [2, 4])
def test_small_tiles_cut_into_slices(slices, divergence, monkeypatch):
    """Several row blocks, tiles per part and slices per tile, at the edges of each."""
    from opsdc_kernels.fused import heads
    from opsdc_kernels.fused.configs import Config

    monkeypatch.setattr(heads, "INTERPRETER", Config(16, 16, 16, slices, 2, 1, 1))
    tensors = inputs(N=37, V=52, D=20, shared=slices == 2, scale=3.0)
    check(tensors, divergence=divergence, target_ids=torch.arange(37) % 52)


@pytest.mark.parametrize("shared", [False, True])
def test_wide_tiles(shared, monkeypatch):
    """The widest tiles that ship, student's and teacher's accumulators cut into slices, over
    several blocks and tiles, the last ones cut short."""
    from opsdc_kernels.fused import configs, heads

    table = configs.SHARED_GRADIENT if shared else configs.WIDE_STATISTICS
    wide = table["sm_90"]._replace(num_warps=1, num_stages=1)
    assert (wide.BM, wide.BN, wide.SLICES) == (128, 128, 2)
    monkeypatch.setattr(heads, "INTERPRETER", wide)
    check(inputs(N=131, V=270, D=70, shared=shared, scale=3.0))


def test_statistics_of_the_forward_kl_have_tiles_of_their_own(monkeypatch):
    from opsdc_kernels.fused.heads import Heads

    original, asked = Heads.config, []

    def config(self, kernel, extras=False, by_teacher=False):
        asked.append((kernel, by_teacher))
        return original(self, kernel, extras, by_teacher)

    monkeypatch.setattr(Heads, "config", config)
    for divergence in DIVERGENCES:
        linear_divergence(*inputs(), divergence=divergence, backend="fused")
    assert asked == [
        ("statistics", False), ("statistics", True), ("statistics", False), ("jsd", False)
    ]  # fmt: skip


OPTIONS = {
    "temperature": {"temperature": 0.6},
    "scale": {"logit_scale": (1.7, 0.4)},
    "softcap": {"logit_softcap": 2.0, "temperature": 1.3},
    "softcap of one side": {"logit_softcap": (None, 1.5)},
    "bias": {"student_bias": torch.linspace(-2, 1, 70), "teacher_bias": torch.linspace(1, -2, 70)},
    "padded head": {"vocab_size": 37},
    "sum": {"reduction": "sum"},
    "weights": {"token_weight": torch.tensor([0.0, 2.0, 0.5, 0.0, 1.0])},
    "weights, none": {"token_weight": torch.tensor([1.0, 0, 0.5, 1, 0]), "reduction": "none"},
    "targets": {"target_ids": torch.tensor([0, 69, 31, 32, 5])},
}


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option(name, divergence):
    # The fuzzed problems combine all options with both kinds of head.
    shared = (list(OPTIONS).index(name) + DIVERGENCES.index(divergence)) % 2 == 1
    options = {"divergence": divergence, **OPTIONS[name]}
    upstream = torch.tensor([3.0, -1, 2, 0.5, 1]) if options.get("reduction") == "none" else None
    check(inputs(shared=shared), upstream, **options)


@pytest.mark.parametrize("beta", [0.02, 0.5, 0.9])
def test_jsd_of_any_beta(beta):
    check(inputs(scale=3.0), divergence="jsd", beta=beta)


def test_teacher_of_another_size():
    check(inputs(E=18), divergence="reverse_kl")


def test_shared_head_bias_is_shared():
    check(inputs(shared=True), student_bias=torch.linspace(-1, 1, 70), logit_softcap=3.0)
    check(
        inputs(shared=True),
        student_bias=torch.linspace(-1, 1, 70),
        teacher_bias=torch.linspace(1, -1, 70),
    )


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("near", [1e-5, 1e-3])
def test_teacher_near_student(near, divergence):
    """A shared head keeps full accuracy at any distance; other heads lose what logits lose."""
    check(inputs(shared=True, near=near), divergence=divergence)
    check(inputs(near=near), divergence=divergence)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("shared", [False, True])
def test_equal_teacher_gives_exact_zeros(divergence, shared):
    h, w, _, _ = inputs()
    tensors = (h, w, h.clone(), None if shared else w.clone())
    for options in ({}, {"logit_softcap": 2.0}, {"logit_scale": 1.7, "temperature": 0.7}):
        loss, dh, dw, _, _ = run("fused", tensors, divergence=divergence, **options)
        assert loss == 0
        assert not dh.any()
        assert not dw.any()


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("size", [30.0, 1e4])
def test_huge_logits(size, divergence):
    """KLs up to thousands of nats: nothing overflows. Where a distribution is one column, the true
    gradient of the JSD vanishes and what is left is the rounding of probabilities near 1."""
    h, w, ht, wt = inputs(N=4, V=70, D=16)
    tensors = (h, w * size, ht, wt.flip(0) * size)
    got = run("fused", tensors, divergence=divergence)
    truth = run("reference", tensors, divergence=divergence)
    assert relative(got[0], truth[0]) <= 1e-5
    limit = 1e-3 + EPS * (h @ tensors[1].T).abs().max()  # of probabilities from fp32 logits
    for mine, other, scale in zip(got[1:3], truth[1:3], (tensors[1].norm(), h.norm())):
        error = (mine.double() - other).norm()
        assert error <= limit * other.norm() + 1e-6 * scale


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_columns_masked_on_both_sides_do_not_exist(divergence):
    h, w, ht, wt = inputs()
    kept = torch.arange(70) % 3 != 1
    kept[32:66] = False  # a whole tile of masked columns
    bias = torch.zeros(70).masked_fill(~kept, -math.inf)
    masked = run(
        "fused", (h, w, ht, wt), divergence=divergence, student_bias=bias, teacher_bias=bias
    )
    cut = run("reference", (h, w[kept], ht, wt[kept]), divergence=divergence)
    assert relative(masked[0], cut[0]) <= 1e-5
    assert relative(masked[1], cut[1]) <= 3e-5
    assert relative(masked[2][kept], cut[2]) <= 3e-5
    assert not masked[2][~kept].any()


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("side", ["student_bias", "teacher_bias"])
@pytest.mark.parametrize("columns", [slice(3, 5), slice(32, 64), slice(0, 32)])
def test_columns_masked_on_one_side(columns, side, divergence):
    bias = torch.zeros(70)
    bias[columns] = -math.inf
    tensors = inputs(scale=2.0)
    got = run("fused", tensors, divergence=divergence, **{side: bias})
    truth = run("reference", tensors, divergence=divergence, **{side: bias})
    assert torch.isfinite(got[1]).all()
    assert torch.isfinite(got[2]).all()
    if torch.isinf(truth[0]):
        assert got[0] == math.inf
        return
    assert relative(got[0], truth[0]) <= 1e-5
    assert relative(got[1], truth[1]) <= 3e-5
    assert relative(got[2], truth[2]) <= 3e-5


def test_infinite_reverse_kl_has_the_gradient_of_the_joint_columns():
    bias = torch.zeros(70)
    bias[30:40] = -math.inf
    got = run("fused", inputs(), teacher_bias=bias)
    truth = run("reference", inputs(), teacher_bias=bias)
    assert got[0] == math.inf == truth[0]
    assert relative(got[1], truth[1]) <= 3e-5
    assert relative(got[2], truth[2]) <= 3e-5


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_no_tokens(divergence):
    h, w, ht, wt = inputs()
    for tensors, options in (
        ((h[:0], w, ht[:0], wt), {}),
        ((h, w, ht, wt), {"token_weight": torch.zeros(5)}),
    ):
        loss, dh, dw, _, stats = run("fused", tensors, divergence=divergence, **options)
        assert loss == 0
        assert not dh.any()
        assert not dw.any()
        assert not stats.divergence.any()


def test_rows_of_weight_zero_may_hold_anything():
    h, w, ht, wt = inputs()
    weight = torch.tensor([1.0, 0, 2, 0, 1])
    clean = run("fused", (h, w, ht, wt), token_weight=weight)
    h[1], ht[1], h[3] = math.nan, math.inf, -math.inf
    dirty = run("fused", (h, w, ht, wt), token_weight=weight)
    for a, b in zip(clean[:3], dirty[:3]):
        assert torch.equal(a, b)
    assert torch.equal(clean[4].student_entropy, dirty[4].student_entropy)


@st.composite
def problems(draw):
    N, V = draw(st.integers(1, 6)), draw(st.integers(1, 100))
    D = draw(st.integers(1, 40))
    shared = draw(st.booleans())
    E = None if shared or draw(st.booleans()) else draw(st.integers(1, 40))
    scale = draw(st.sampled_from([0.3, 1.0, 5.0]))
    near = draw(st.sampled_from([0.03, 0.3, 2.0]))
    tensors = inputs(N, V, D, E, shared, near, scale, seed=draw(st.integers(0, 2**20)))
    options = {"divergence": draw(st.sampled_from(DIVERGENCES))}
    if options["divergence"] == "jsd":
        options["beta"] = draw(st.sampled_from([0.1, 0.5, 0.8]))
    options["reduction"] = draw(st.sampled_from(["mean", "sum", "none"]))
    options["temperature"] = draw(st.sampled_from([0.7, 1.0, 2.0]))
    options["logit_scale"] = draw(st.sampled_from([1.0, 0.5, (1.5, 1.0)]))
    options["logit_softcap"] = draw(st.sampled_from([None, None, 4.0, (4.0, None)]))
    if draw(st.booleans()):
        options["vocab_size"] = draw(st.integers(1, V))
    if draw(st.booleans()):
        weights = draw(st.lists(st.sampled_from([0.0, 0.5, 1.0, 3.0]), min_size=N, max_size=N))
        options["token_weight"] = torch.tensor(weights)
    if draw(st.booleans()):
        g = torch.Generator().manual_seed(draw(st.integers(0, 100)))
        options["student_bias"] = torch.randn(V, generator=g)
        if not shared or draw(st.booleans()):
            options["teacher_bias"] = torch.randn(V, generator=g)
    if draw(st.booleans()):
        size = options.get("vocab_size", V)
        ids = draw(st.lists(st.integers(0, size - 1), min_size=N, max_size=N))
        options["target_ids"] = torch.tensor(ids)
    return tensors, options


@settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    phases=(Phase.explicit, Phase.generate),  # shrinking takes minutes in the interpreter
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(problems())
def test_fuzzed_shapes_and_options(problem):
    tensors, options = problem
    check(tensors, **options)
