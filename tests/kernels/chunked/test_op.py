"""The autograd contract: operators, compile, autocast, checkpointing, upstream."""

import pytest
import torch
from helpers.kernels import make_problem
from torch import library
from torch.utils.checkpoint import checkpoint

from opsdc_kernels import linear_divergence
from opsdc_kernels.chunked import op as chunked_op
from opsdc_kernels.columns import op as columns_op

N, D, V = 9, 8, 33


def leaves(dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    h, ht, w = (torch.randn(n, D, generator=g).to(dtype) for n in (N, N, V))
    return h.requires_grad_(), w.requires_grad_(), ht


def arguments(reduction, stats, weight, divergence="reverse_kl", wanted=(True, True, True),
              **options):  # fmt: skip
    h, w, ht = leaves()
    problem = make_problem(
        h, w, ht, student_bias=torch.randn(V, requires_grad=True), token_weight=weight,
        target_ids=torch.randint(0, V, (N,)) if stats else None,
        divergence=divergence, reduction=reduction, return_stats=stats, **options,
    )  # fmt: skip
    return *problem.arguments, list(wanted)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("stats", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_opcheck_forward(reduction, stats, weighted):
    weight = torch.rand(N) if weighted else None
    library.opcheck(chunked_op._forward, arguments(reduction, stats, weight))


def test_opcheck_forward_without_gradients():
    library.opcheck(
        chunked_op._forward, arguments("mean", True, None, "jsd", (False, False, False))
    )


@pytest.mark.parametrize("stats", [False, True])
def test_opcheck_forward_that_leaves_columns_out(stats):
    call = arguments("mean", stats, torch.rand(N), skip_tolerance=1e-2)
    library.opcheck(columns_op._forward, call)


def test_opcheck_backward():
    detached = [x.detach() if isinstance(x, torch.Tensor) else x
                for x in arguments("none", False, torch.rand(N), "jsd")]  # fmt: skip
    library.opcheck(chunked_op._recompute, (torch.rand(N), *detached))
    library.opcheck(
        chunked_op._times_upstream, (torch.randn(3, 4), torch.tensor(2.0), torch.bfloat16)
    )


def results(f):
    h, w, ht = leaves()
    loss = f(h, w, ht)
    loss.sum().backward()
    return loss.detach(), h.grad, w.grad


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_as_one_graph(reduction):
    weight = torch.linspace(0, 1, N)

    def f(h, w, ht):
        loss, stats = linear_divergence(
            h * 2, w, ht, token_weight=weight, reduction=reduction, return_stats=True
        )
        return loss * 3 + stats.student_entropy.mean()

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for a, b in zip(results(compiled), results(f), strict=True):
        assert torch.equal(a, b)


def test_compiles_with_a_workspace_and_refuses_one_too_small():
    f = torch.compile(linear_divergence, fullgraph=True, backend="aot_eager")
    h, w, ht = (x.detach() for x in leaves())
    loss = f(h, w, ht, workspace_bytes=1 << 20)
    assert torch.equal(loss, linear_divergence(h, w, ht, workspace_bytes=1 << 20))
    with pytest.raises(ValueError, match="workspace_bytes=100"):
        f(h, w, ht, workspace_bytes=100)


def test_compiles_with_a_changing_number_of_tokens():
    f = torch.compile(linear_divergence, fullgraph=True, backend="aot_eager", dynamic=True)
    _, w, _ = leaves()
    for n in (5, 7, 12):
        h, ht = torch.randn(n, D, requires_grad=True), torch.randn(n, D)
        loss = f(h, w, ht)
        loss.backward()
        assert torch.equal(loss, linear_divergence(h, w, ht))
        assert h.grad.shape == (n, D)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    def f(h, w, ht):
        return checkpoint(linear_divergence, h, w, ht, use_reentrant=reentrant)

    for a, b in zip(results(f), results(linear_divergence), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_like_a_linear_layer(dtype):
    h, w, ht = leaves()
    with torch.autocast("cpu", dtype=dtype):
        hidden = torch.nn.functional.linear(h, torch.eye(D))
        assert hidden.dtype == dtype
        loss = linear_divergence(hidden, w, ht)
        loss.backward()
    assert (loss.dtype, h.grad.dtype, w.grad.dtype) == (torch.float32,) * 3
    rounded = [x.detach().to(dtype).double() for x in (h, w, ht)]
    want = linear_divergence(*rounded, backend="reference")
    # Inside the operator autocast is off: only the casts of the inputs are seen.
    assert abs(loss.item() / want.item() - 1) < 1e-6


def test_autocast_leaves_equal_dtypes_alone():
    h, w, ht = leaves()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_divergence(h, w, ht)
    assert torch.equal(loss, linear_divergence(h, w, ht))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("frozen", [False, True])
def test_backward_twice_gives_the_same_bits(reduction, frozen):
    h, w, ht = leaves()
    inputs = (h,) if frozen else (h, w)
    w = w.detach() if frozen else w
    loss = linear_divergence(h, w, ht, reduction=reduction)
    one = torch.ones_like(loss)
    first = torch.autograd.grad(loss, inputs, one, retain_graph=True)
    kept = [x.clone() for x in first]
    torch.autograd.grad(loss, inputs, 3 * one, retain_graph=True)
    for x in first:
        x.zero_()
    again = torch.autograd.grad(loss, inputs, one, retain_graph=True)
    for a, b in zip(kept, again, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("upstream", [0.0, 1.0, 3.0, -1.0, 65536.0, 1e-6])
def test_gradients_are_linear_in_the_upstream(backend, reduction, upstream):
    found = []
    for factor in (1.0, upstream):
        h, w, ht = leaves()
        loss = linear_divergence(h, w, ht, reduction=reduction, backend=backend)
        torch.autograd.backward(loss, torch.full_like(loss, factor))
        found.append((h.grad, w.grad))
    for one, other in zip(*found, strict=True):
        assert (one * upstream - other).norm() <= 1e-6 * other.norm()


def test_fp16_with_a_tiny_or_a_scaled_upstream():
    """What GradScaler does: 2^16 up must not overflow, and 1e-6 must lose only fp16's own bits."""
    reference = [x.grad for x in _backward_fp16(1.0)]
    scaled = [x.grad for x in _backward_fp16(2.0**10)]
    for a, b in zip(reference, scaled, strict=True):
        error = (a.double() * 2**10 - b.double()).norm() / b.double().norm()
        assert error < 2e-3
    h, w, ht = leaves(torch.float16)
    loss = linear_divergence(h, w, ht)
    scaler_up, scaler_down = 2.0**16, 2.0**-16
    (loss * scaler_up * scaler_down).backward()
    for a, b in zip((h.grad, w.grad), reference, strict=True):
        assert torch.equal(a, b)


def _backward_fp16(upstream):
    h, w, ht = leaves(torch.float16)
    linear_divergence(h, w, ht).backward(torch.tensor(upstream))
    return h, w


def test_grad_scaler_step():
    h, w, ht = leaves()
    optimizer = torch.optim.SGD([w], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14)
    want = w.detach() - 0.1 * results(linear_divergence)[2]
    scaler.scale(linear_divergence(h, w, ht)).backward()
    scaler.step(optimizer)
    scaler.update()
    torch.testing.assert_close(w.detach(), want)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_double_backward_says_what_to_do(reduction):
    h, w, ht = leaves()
    loss = linear_divergence(h, w, ht, reduction=reduction, backend="chunked").sum()
    (g,) = torch.autograd.grad(loss, h, create_graph=True)
    with pytest.raises(RuntimeError, match='use backend="reference"'):
        torch.autograd.grad(g.sum(), h)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_strides_do_not_matter(backend):
    h, w, ht = (x.detach() for x in leaves())
    want = results(lambda *x: linear_divergence(*x, backend=backend))
    spread = torch.empty(D, N, 2).permute(1, 0, 2)[..., 0].copy_(h).requires_grad_()
    column_major = w.T.contiguous().T.requires_grad_()
    teacher = torch.stack([ht, ht], 1)[:, 0]
    assert not spread.is_contiguous()
    assert not column_major.is_contiguous()
    loss = linear_divergence(spread, column_major, teacher, backend=backend)
    loss.backward()
    for a, b in zip((loss.detach(), spread.grad, column_major.grad), want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_no_gradient_needed_no_graph():
    h, w, ht = (x.detach() for x in leaves())
    loss, _ = linear_divergence(h, w, ht, return_stats=True)
    assert not loss.requires_grad
    with torch.inference_mode():
        assert torch.equal(linear_divergence(h, w, ht), loss)


def test_teacher_gets_no_graph_and_no_gradient():
    h, w, ht = leaves()
    linear_divergence(h, w, ht).backward()
    assert ht.grad is None


@pytest.mark.parametrize("call", [
    {}, {"reduction": "none"}, {"skip_tolerance": 1e-3}, {"backend": "reference"},
    {"reduction": "none", "frozen": True},
], ids=str)  # fmt: skip
def test_two_live_graphs_over_one_head(call):
    """One joint backward, or two: neither graph may use up what the other has saved."""
    call = dict(call)
    frozen = call.pop("frozen", False)

    def graphs():
        (h, w, ht), (other, _, other_ht) = leaves(), leaves(seed=1)
        w = w.detach() if frozen else w
        calls = ((h, w, ht), (other, w, other_ht))
        losses = [linear_divergence(*tensors, **call).sum() for tensors in calls]
        return losses, [x for x in (h, other, w) if x.requires_grad]

    (first, second), inputs = graphs()
    joint = torch.autograd.grad(first + 3 * second, inputs)
    (first, second), inputs = graphs()
    later = torch.autograd.grad(3 * second, inputs, allow_unused=True)
    sooner = torch.autograd.grad(first, inputs, allow_unused=True)
    for whole, a, b in zip(joint, sooner, later, strict=True):
        parts = [x for x in (a, b) if x is not None]
        torch.testing.assert_close(whole, sum(parts), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_weights_and_an_upstream_gradient(reduction, frozen):
    """With "none" a token's weight decides whether it counts, and scales nothing."""
    weight = torch.linspace(0, 3, N)
    upstream = torch.linspace(-1, 2, N) if reduction == "none" else torch.tensor(0.7)
    found = []
    for backend in ("chunked", "reference"):
        h, w, ht = leaves()
        inputs = (h,) if frozen else (h, w)
        w = w.detach() if frozen else w
        loss = linear_divergence(h, w, ht, token_weight=weight, reduction=reduction,
                                 backend=backend)  # fmt: skip
        found.append(torch.autograd.grad(loss, inputs, upstream))
    for a, b in zip(*found, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()


@pytest.mark.parametrize("call", [{}, {"reduction": "none"}, {"skip_tolerance": 1e-3}], ids=str)
def test_backward_fills_nothing_of_the_size_of_the_head(call):
    """Outputs that nobody uses need no gradient of zeros, and dW is written, not added to."""
    h, w, ht = leaves()
    loss = linear_divergence(h, w, ht, return_stats=True, **call)[0].sum()
    with torch.profiler.profile(record_shapes=True) as profile:
        loss.backward()
    filled = [
        event.input_shapes[0]
        for event in profile.events()
        if event.name in ("aten::zero_", "aten::fill_") and event.input_shapes
    ]
    assert not [shape for shape in filled if torch.Size(shape).numel() >= V * D]
