"""What autograd, `torch.compile` and a user's mistakes see of the fused backend."""

import os
import subprocess
import sys
import warnings

import pytest
import torch
from helpers.kernels import make_problem
from torch import library
from torch.utils._python_dispatch import TorchDispatchMode

from opsdc_kernels import linear_divergence
from opsdc_kernels.problem import GradientsWanted

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("run by test_interpreter.py", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
N, V, D = 5, 40, 20


@pytest.fixture
def tensors():
    g = torch.Generator().manual_seed(3)
    h, w = torch.randn(N, D, generator=g), torch.randn(V, D, generator=g)
    ht = h + 0.3 * torch.randn(N, D, generator=g)
    wt = w + 0.1 * torch.randn(V, D, generator=g)
    return h.requires_grad_(), w.requires_grad_(), ht, wt


def fused(*tensors, **options):
    return linear_divergence(*tensors, backend="fused", **options)


def test_backward_twice_gives_the_same_numbers(tensors):
    h, w, ht, wt = tensors
    loss = fused(h, w, ht, wt)
    first = torch.autograd.grad(loss, (h, w), torch.tensor(3.0), retain_graph=True)
    second = torch.autograd.grad(loss, (h, w), torch.tensor(3.0), retain_graph=True)
    unit = torch.autograd.grad(loss, (h, w))
    for a, b, c in zip(first, second, unit):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, 3 * c, rtol=1e-6, atol=0)


@pytest.mark.parametrize("upstream", [0.0, 1.0, -1.0, 1e-6])
def test_gradients_are_linear_in_the_upstream_gradient(tensors, upstream):
    h, w, ht, wt = tensors
    for dtype in (torch.float32, torch.float16):
        half = [x.detach().to(dtype).requires_grad_() for x in (h, w)]
        loss = fused(*half, ht.to(dtype), wt.to(dtype), reduction="sum")
        unit = torch.autograd.grad(loss, half, retain_graph=True)
        scaled = torch.autograd.grad(loss, half, torch.tensor(upstream))
        for a, b in zip(scaled, unit):
            exact = b.float() * upstream
            limit = 2e-3 * exact.norm() + (0 if dtype == torch.float32 else 6e-8 * b.numel() ** 0.5)
            assert (a.float() - exact).norm() <= limit


def test_a_batch_of_upstream_gradients(tensors):
    h, w, ht, wt = tensors
    upstream = torch.randn(2, N, generator=torch.Generator().manual_seed(0))
    loss = fused(h, w, ht, wt, reduction="none")
    got = torch.autograd.grad(loss, (h, w), upstream, is_grads_batched=True, retain_graph=True)
    each = [torch.autograd.grad(loss, (h, w), row, retain_graph=True) for row in upstream]
    for a, b in zip(got, zip(*each)):
        torch.testing.assert_close(a, torch.stack(b))


def test_results_repeat_bit_for_bit(tensors):
    h, w, ht, wt = tensors
    for divergence in ("reverse_kl", "jsd"):
        runs = []
        for _ in range(3):
            loss = fused(h, w, ht, wt, divergence=divergence)
            runs.append((loss.detach(), *torch.autograd.grad(loss, (h, w))))
        assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run))


def test_chunks_of_the_backward_add_up():
    g = torch.Generator().manual_seed(0)
    h = torch.randn(50, D, generator=g).requires_grad_()
    w = torch.randn(V, D, generator=g).requires_grad_()
    ht = h.detach() + 0.2 * torch.randn(50, D, generator=g)
    whole, cut = (
        torch.autograd.grad(fused(h, w, ht, workspace_bytes=size), (h, w))
        for size in (1 << 20, 8000)
    )
    for a, b in zip(whole, cut):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)


class Allocations(TorchDispatchMode):
    """The sizes of all tensors that are newly allocated (the interpreter itself copies)."""

    def __init__(self):
        super().__init__()
        self.sizes = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if "empty" in str(function) or "zeros" in str(function):
            self.sizes.add(out.numel())
        return out


@pytest.mark.parametrize("frozen", [True, False])
def test_frozen_head_allocates_no_weight_gradient(tensors, frozen):
    from opsdc_kernels.fused.backward import backward
    from opsdc_kernels.fused.heads import Heads

    h, w, ht, wt = (x.detach() for x in tensors)
    problem = make_problem(h, w, ht, wt)
    heads, wanted = Heads.of(problem, None), GradientsWanted(True, not frozen, False)
    with Allocations() as seen:
        out = backward(heads, torch.ones(5, N), torch.ones(N), problem.options, V, wanted, 1 << 20)
    assert (out[1] is None) == frozen
    assert (V * D in seen.sizes) != frozen
    loss = fused(tensors[0], w, ht, wt)
    loss.backward()
    assert w.grad is None


def test_only_inputs_that_ask_get_gradients(tensors):
    h, w, ht, wt = tensors
    bias = torch.zeros(V, requires_grad=True)
    for asked in ((h,), (w,), (bias,), (h, bias)):
        inputs = [x if any(x is a for a in asked) else x.detach() for x in (h, w, bias)]
        loss = fused(inputs[0], inputs[1], ht, wt, student_bias=inputs[2])
        found = torch.autograd.grad(loss, asked)
        assert all(x.any() for x in found)
    assert ht.grad is None
    assert wt.grad is None


def test_no_graph_without_gradients(tensors):
    h, w, ht, wt = tensors
    with torch.no_grad():
        assert not fused(h, w, ht, wt).requires_grad


def test_double_backward_is_refused_by_name(tensors):
    h, w, ht, wt = tensors
    (dh,) = torch.autograd.grad(fused(h, w, ht, wt), h, create_graph=True)
    with pytest.raises(RuntimeError, match="fused backend"):
        dh.sum().backward()


@pytest.mark.parametrize("heads", [1, 2])
def test_non_contiguous_inputs(tensors, heads):
    def run(*inputs):
        inputs = inputs[: 2 + heads]
        h, w = (x.detach().requires_grad_() for x in inputs[:2])
        loss = fused(h, w, *inputs[2:])
        return loss, *torch.autograd.grad(loss, (h, w))

    dense = [x.detach() for x in tensors]
    expected = run(*dense)
    strided = [torch.stack([x, x], 1)[:, 0] for x in dense]
    columns = [x.T.contiguous().T for x in dense]
    assert not any(x.is_contiguous() for x in strided + columns)
    for layout in (strided, columns):
        for a, b in zip(run(*layout), expected):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=0)


def test_batch_of_sequences(tensors):
    h, w, ht, wt = (x.detach() for x in tensors)
    flat = fused(h[:4], w, ht[:4], wt, reduction="none")
    batch = fused(h[:4].view(2, 2, D), w, ht[:4].view(2, 2, D), wt, reduction="none")
    assert torch.equal(batch, flat.view(2, 2))


@pytest.mark.parametrize("weighted", [False, True])
def test_opcheck(tensors, weighted):
    from opsdc_kernels.fused import op as module

    h, w, ht, wt = tensors
    weight = torch.tensor([0.0, 1, 1, 0, 2]) if weighted else None
    problem = make_problem(h, w, ht, wt, token_weight=weight, divergence="jsd", beta=0.4)
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
    utilities += ("test_aot_dispatch_dynamic",) if weighted else ()
    library.opcheck(module._forward, problem.arguments, test_utils=utilities)


def test_compiles_in_one_graph(tensors):
    h, w, ht, wt = tensors
    weight = torch.tensor([0.0, 1, 1, 0, 2])

    def loss_of(h, w):
        return fused(h * 1.5, w, ht, wt, token_weight=weight, divergence="forward_kl")

    expected = torch.autograd.grad(loss_of(h, w), (h, w))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
        found = torch.autograd.grad(compiled(h, w), (h, w))
    for a, b in zip(found, expected):
        assert torch.equal(a, b)


def test_checkpointing(tensors):
    from torch.utils.checkpoint import checkpoint

    h, w, ht, wt = tensors
    expected = torch.autograd.grad(fused(h, w, ht, wt), (h, w))
    loss = checkpoint(lambda a, b: fused(a, b, ht, wt), h, w, use_reentrant=False)
    for a, b in zip(torch.autograd.grad(loss, (h, w)), expected):
        assert torch.equal(a, b)


def test_float64_is_refused(tensors):
    with pytest.raises(TypeError, match="float64"):
        fused(*(x.detach().double() for x in tensors))


def test_cpu_without_interpreter_is_refused():
    code = (
        "import torch; from opsdc_kernels import linear_divergence as f; x = torch.ones(2, 4);"
        "f(x, x, x, backend='fused')"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert "ValueError: backend='fused' needs a GPU" in result.stderr
    assert "chunked" in result.stderr
