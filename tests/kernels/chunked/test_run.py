"""`chunked` against the reference in float64: options, chunk sizes, memory, what is allocated."""

import itertools
import math

import pytest
import torch
from helpers.kernels import make_problem, results, sizes_of

from opsdc_kernels import linear_divergence, plan, products
from opsdc_kernels.chunked import run as chunked
from opsdc_kernels.memory import PeakMemory
from opsdc_kernels.problem import GradientsWanted
from opsdc_kernels.row_pass.result import block_rows

N, D, E, V = 11, 6, 5, 37


def inputs(shared, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    h, w = draw(N, D), draw(V, D)
    return (h, w, h + 0.3 * draw(N, D), None) if shared else (h, w, draw(N, E), draw(V, E))


def budget_of(rows, dims=(D, D)):
    return plan.scratch_bytes(rows, sizes_of(V, dims, torch.float64))


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "jsd"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shared", [True, False])
def test_equals_reference(divergence, reduction, shared):
    g = torch.Generator().manual_seed(3)
    weight = torch.rand(N, generator=g, dtype=torch.float64)
    weight[4] = 0
    upstream = torch.linspace(0.5, -2, N).double() if reduction == "none" else 1.7
    targets = torch.randint(V - 4, (N,), generator=g)
    for cap, scale, bias, size in itertools.product(
        (None, 3.0, (2.0, None)), (1.0, (1.1, 0.9)), (False, True), (None, V - 4)
    ):
        options = {
            "divergence": divergence,
            "reduction": reduction,
            "logit_softcap": cap,
            "logit_scale": scale,
            "temperature": 1.7,
            "vocab_size": size,
            "token_weight": weight,
            "target_ids": targets,
        }
        if bias:
            options["student_bias"] = torch.randn(V, generator=g, dtype=torch.float64)
            options["teacher_bias"] = torch.randn(V, generator=g, dtype=torch.float64)
        want = results(inputs(shared), upstream, backend="reference", **options)
        got = results(
            inputs(shared), upstream, backend="chunked", workspace_bytes=budget_of(3), **options
        )
        for a, b in zip(got, want, strict=True):
            if b is not None:
                torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 10, 11, 50])
def test_chunk_size_changes_nothing_beyond_rounding(rows):
    want = results(inputs(False), backend="reference")
    got = results(inputs(False), backend="chunked", workspace_bytes=budget_of(rows, (D, E)))
    assert plan.chunk_rows(N, sizes_of(V, (D, E), torch.float64), budget_of(rows, (D, E))) <= max(
        rows, 1
    )
    for a, b in zip(got, want, strict=True):
        if b is not None:
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("train", list(itertools.product((False, True), repeat=3))[1:])
def test_only_asked_gradients(reduction, train):
    bias = torch.linspace(0, 1, V).double()
    want = results(inputs(True), student_bias=bias, reduction=reduction, backend="reference")
    got = results(
        inputs(True), student_bias=bias, reduction=reduction, backend="chunked", train=train
    )
    for a, b, asked in zip(got[1:4], want[1:4], train, strict=True):
        if asked:
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)
        else:
            assert a is None


@pytest.mark.parametrize(("dtype", "loss_dtype"), [
    (torch.float64, torch.float64), (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32), (torch.float16, torch.float32),
])  # fmt: skip
@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_dtypes(backend, dtype, loss_dtype):
    loss, dh, dw, _, *stats = results(inputs(True, dtype), backend=backend)
    assert loss.dtype == loss_dtype
    assert {x.dtype for x in stats if x is not None} == {loss_dtype}
    assert (dh.dtype, dw.dtype) == (dtype, dtype)


def count_gemms(monkeypatch):
    """Head GEMM units by N·V·D of what `gemm` is asked for."""
    units = []
    original = {
        name: getattr(products, name)
        for name in ("logits_into", "hidden_gradient_into", "add_weight_gradient")
    }

    def counted(name, rows_of):
        def f(*args, **options):
            units.append(rows_of(args))
            return original[name](*args, **options)

        return f

    monkeypatch.setattr(products, "logits_into", counted("logits_into", lambda a: len(a[0])))
    for name in ("hidden_gradient_into", "add_weight_gradient"):
        monkeypatch.setattr(products, name, counted(name, lambda a: len(a[1])))
    return units


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "jsd"])
@pytest.mark.parametrize(("train", "reduction", "expected"), [
    ((True, True, True), "mean", 4), ((True, False, False), "mean", 3),
    ((True, False, False), "none", 3), ((True, True, True), "none", 6),
])  # fmt: skip
def test_gemm_units(monkeypatch, divergence, train, reduction, expected):
    units = count_gemms(monkeypatch)
    for shared in (True, False):
        units.clear()
        results(inputs(shared), train=train, reduction=reduction, divergence=divergence,
            backend="chunked")  # fmt: skip
        assert sum(units) == expected * N
        p = plan.estimate(tokens=N, vocab_size=V, student_dim=D, reduction=reduction,
                          trainable_head=train[1])  # fmt: skip
        assert p.gemm_units == expected


def test_loss_only_takes_two_units(monkeypatch):
    units = count_gemms(monkeypatch)
    h, w, ht, wt = inputs(False)
    with torch.no_grad():
        linear_divergence(h.requires_grad_(), w.requires_grad_(), ht, wt, backend="chunked")
    assert sum(units) == 2 * N


def test_rows_of_weight_zero_reach_no_gemm(monkeypatch):
    units = count_gemms(monkeypatch)
    weight = torch.ones(N)
    weight[[0, 3, 7]] = 0
    results(inputs(True), token_weight=weight, backend="chunked")
    assert sum(units) == 4 * (N - 3)


def test_frozen_head_allocates_no_weight_gradient():
    h, w, ht, wt = inputs(False)
    seen = []
    original = chunked.run_chunks

    def spy(*args, **options):
        seen.append(original(*args, **options))
        return seen[-1]

    from opsdc_kernels.chunked import op as chunked_op

    patch = pytest.MonkeyPatch()
    with patch.context() as m:
        m.setattr(chunked_op, "run_chunks", spy)
        linear_divergence(h.requires_grad_(), w, ht, wt, backend="chunked").backward()
    assert seen[0].weight_gradient is None
    assert w.grad is None


def test_16_bit_heads_are_upcast_in_blocks_on_a_cpu(monkeypatch):
    """No 16-bit product on a CPU, and the blocks' seams are right."""
    monkeypatch.setattr(products, "UPCAST_BLOCK_BYTES", 7 * 4 * D)
    tensors = inputs(True, torch.bfloat16)
    wide = tuple(None if x is None else x.double() for x in tensors)
    _, dh, dw, _, per_token, *_ = results(wide, reduction="sum", backend="reference")
    seen = set()

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "mm" in func.__name__:
                seen.update(x.dtype for x in args if isinstance(x, torch.Tensor))
            return func(*args, **(kwargs or {}))

    with Spy():
        got = chunked.run_chunks(
            make_problem(*tensors), GradientsWanted(True, True, False), None, None
        )
    assert seen == {torch.float32}
    for a, b in (
        (got.per_token, per_token), (got.hidden_gradient, dh), (got.weight_gradient, dw)
    ):  # fmt: skip
        assert (a.double() - b).norm() < 1e-5 * b.norm()


@pytest.mark.parametrize("train_head", [False, True])
def test_peak_memory_is_workspace_plus_gradients(train_head):
    n, d, v = 512, 64, 24576
    h, ht = torch.randn(n, d), torch.randn(n, d)
    w = (torch.randn(v, d) * 0.1).requires_grad_(train_head)
    budget = 24 << 20
    h.requires_grad_()

    def call():
        linear_divergence(h, w, ht, backend="chunked", workspace_bytes=budget).backward()

    call()
    h.grad = w.grad = None
    with PeakMemory() as memory:
        call()
    gradients = 4 * (n * d + (v * d if train_head else 0))
    predicted = plan.estimate(
        tokens=n, vocab_size=v, student_dim=d, trainable_head=train_head, workspace_bytes=budget
    )
    assert predicted.workspace_bytes <= budget
    # 4 MiB for what the sampled figure adds: stacks, allocator slack.
    assert memory.peak_mib * 2**20 <= budget + gradients + (4 << 20)
    assert memory.peak_mib * 2**20 <= predicted.peak_bytes + (4 << 20)
    naive = 24 * n * v
    assert memory.peak_mib * 2**20 < 0.12 * naive


def test_scratch_grows_by_the_rows_of_a_chunk_alone():
    """The slope between two heights: what a row of a chunk takes, whatever else is held."""
    n, d, v = 1024, 16, 16_384
    h, w, ht = torch.randn(n, d), torch.randn(v, d) * 0.1, torch.randn(n, d)
    h.requires_grad_()
    peaks, planned = [], []
    for budget in (24 << 20, 120 << 20):

        def call(budget=budget):
            linear_divergence(h, w, ht, backend="chunked", workspace_bytes=budget).backward()

        call()
        h.grad = None
        with PeakMemory() as memory:
            call()
        h.grad = None
        peaks.append(memory.peak_mib * 2**20)
        planned.append(plan.estimate(tokens=n, vocab_size=v, student_dim=d, trainable_head=False,
                                     workspace_bytes=budget))  # fmt: skip
    rows = planned[1].chunk_rows - planned[0].chunk_rows
    assert rows > 300
    slope = (peaks[1] - peaks[0]) / rows
    assert slope <= 1.1 * 8 * v  # two logits of fp32 per column
    assert slope >= 0.8 * 8 * v


def test_long_rows_in_short_blocks():
    """V above a block's size: one row at a time."""
    v = 500_000
    h, ht = torch.randn(3, 4), torch.randn(3, 4)
    w = torch.randn(v, 4)
    assert block_rows(v, torch.device("cpu")) == 1
    got = linear_divergence(h, w, ht, backend="chunked")
    want = linear_divergence(h.double(), w.double(), ht.double(), backend="reference")
    assert math.isclose(float(got), float(want), rel_tol=1e-5)
