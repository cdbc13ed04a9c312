"""The same bits again: over repeats, over processes, and wherever the inputs lie in memory.

The promise is for one machine, one build of torch and one number of threads. The `fused` kernels
repeat in fused/test_op.py, in Triton's interpreter.
"""

import hashlib
import itertools
import os
import subprocess
import sys

import pytest
import torch
from helpers.kernels import sizes_of

from opsdc_kernels import linear_divergence
from opsdc_kernels.plan import estimate, scratch_bytes

pytestmark = pytest.mark.whole

N, D, V = 48, 72, 4099
# Three chunks, so that sums across chunks are among what repeats, whatever the row passes take.
ROWS = N // 3
CASES = list(itertools.product(("float32", "bfloat16"), ("mean", "none"), (False, True)))


def inputs(dtype, shared):
    g = torch.Generator().manual_seed(0)
    h, w = torch.randn(N, D, generator=g), torch.randn(V, D, generator=g)
    ht = h + 0.1 * torch.randn(N, D, generator=g)
    wt = w + 0.1 * torch.randn(V, D, generator=g)
    tensors = (h, w, ht) if shared else (h, w, ht, wt)
    return [x.to(getattr(torch, dtype)) for x in tensors]


def workspace(dtype):
    return scratch_bytes(ROWS, sizes_of(V, (D, D), dtype))


def results(tensors, reduction):
    """Loss, dH and dW of one call."""
    h, w, *teacher = tensors
    h, w = h.detach().requires_grad_(), w.detach().requires_grad_()
    loss = linear_divergence(
        h, w, *teacher,
        reduction=reduction, backend="chunked", workspace_bytes=workspace(h.dtype),
    )  # fmt: skip
    loss.sum().backward()
    return loss.detach(), h.grad, w.grad


def digest(parts):
    data = b"".join(x.flatten().view(torch.uint8).numpy().tobytes() for x in parts)
    return hashlib.sha256(data).hexdigest()


def digests():
    """One line per case, from two calls each."""
    for dtype, reduction, shared in CASES:
        tensors = inputs(dtype, shared)
        found = {digest(results(tensors, reduction)) for _ in range(2)}
        yield f"{dtype} {reduction} {shared} {' '.join(sorted(found))}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_several_chunks_are_what_repeats(dtype):
    plan = estimate(
        tokens=N, vocab_size=V, student_dim=D, dtype=dtype, workspace_bytes=workspace(dtype)
    )
    assert plan.chunk_rows == ROWS


@pytest.mark.parametrize(("dtype", "reduction", "shared"), CASES)
def test_fifty_repeats(dtype, reduction, shared):
    tensors = inputs(dtype, shared)
    found = {digest(results(tensors, reduction)) for _ in range(50)}
    assert len(found) == 1


def test_three_processes():
    command = [sys.executable, __file__]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    running = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    found = [process.communicate()[0].splitlines() for process in running]
    assert not any(process.returncode for process in running)
    # This process is the fourth. Two digests on a line would be a case that did not repeat.
    assert found == [list(digests())] * 3
    assert all(len(line.split()) == 4 for line in found[0])
    assert len({line.split()[-1] for line in found[0]}) == len(CASES)


def moved(x, elements):
    """The same values at another address, `elements` behind the start of an allocation."""
    there = torch.empty(x.numel() + elements, dtype=x.dtype)[elements:].view(x.shape)
    return there.copy_(x)


@pytest.mark.parametrize(("dtype", "reduction", "shared"), CASES)
def test_another_address(dtype, reduction, shared):
    tensors = inputs(dtype, shared)
    want = results(tensors, reduction)
    cache_line = 64 // tensors[0].element_size()
    again = results([moved(x, cache_line) for x in tensors], reduction)
    assert all(torch.equal(a, b) for a, b in zip(want, again))
    # Off a cache line, or with other strides, the CPU's GEMM sums in another order: equal to
    # rounding (of the returned bfloat16, too), and no promise of bits.
    rounding = 1e-5 if dtype == "float32" else 1e-3
    for odd in ([moved(x, 1) for x in tensors], [x.T.contiguous().T for x in tensors]):
        for a, b in zip(want, results(odd, reduction)):
            assert (a - b).norm() <= rounding * a.norm()


if __name__ == "__main__":
    torch.set_num_threads(1)
    print("\n".join(digests()))
