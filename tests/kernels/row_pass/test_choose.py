"""Which row pass a call takes, and that all rows of a chunk go through it."""

import pytest
import torch
from helpers.kernels import CPU, make_problem

from opsdc_kernels.problem import Stat
from opsdc_kernels.products import Layout
from opsdc_kernels.row_pass import build, choose, compiled, eager

N, D, V = 11, 6, 700
g = torch.Generator().manual_seed(0)
h, w, ht = (torch.randn(n, D, generator=g) for n in (N, V, N))


def test_c_where_it_is_compiled_and_torch_elsewhere(monkeypatch):
    if compiled.native().dll is None:
        pytest.skip(f"row passes run in {compiled.native().description}")
    in_c = choose.choose(CPU, torch.bfloat16)
    assert in_c.run is compiled.divergence_rows_
    assert in_c.layout is Layout.BY_COLUMN
    for dtype, device in ((torch.float64, CPU), (torch.float32, torch.device("meta"))):
        assert choose.choose(device, dtype).run is eager.divergence_rows_
    monkeypatch.setenv(build.SWITCH, "0")
    in_torch = choose.choose(CPU, torch.float32)
    assert in_torch.run is eager.divergence_rows_
    assert in_torch.layout is Layout.BY_ROW
    assert build.SWITCH in in_torch.name


def test_triton_on_a_gpu(monkeypatch):
    pytest.importorskip("triton")
    from opsdc_kernels.row_pass import kernels

    gpu = torch.device("cuda")
    assert choose.choose(gpu, torch.float32).run is kernels.divergence_rows_
    assert choose.choose(gpu, torch.float64).run is eager.divergence_rows_
    monkeypatch.setattr(choose, "find_spec", lambda name: None)
    assert choose.choose(gpu, torch.float32).name == "torch (no triton)"


@pytest.mark.parametrize("rows", [1, 4, N, 50])
def test_blocks_cover_every_row_once(rows):
    """Whatever a pass takes at once: the same values, factors and gradients."""
    problem = make_problem(h, w, ht, return_stats=True, target_ids=torch.arange(N))
    whole = choose.in_torch(CPU)
    cut = choose.RowPass(
        name="cut", layout=Layout.BY_ROW, run=eager.divergence_rows_,
        rows_at_once=lambda columns: rows, buffers=whole.buffers,
    )  # fmt: skip
    found = []
    for row_pass in (whole, cut):
        s, d = h @ w.T, (ht - h) @ w.T
        result = row_pass.over(s, d, problem, gradient=True, target_ids_C=problem.target_ids)
        assert result.values.shape == (len(Stat), N)
        found.append((*result, s))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
