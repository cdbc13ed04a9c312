"""The gradient tile rounded to 16 bits, as on tensor cores, simulated on a CPU; layouts."""

import pytest
import torch
from helpers.kernels import make_problem

from opsdc_kernels import products, testing
from opsdc_kernels.chunked.run import Gradients, Result, run_chunks
from opsdc_kernels.problem import GradientsWanted
from opsdc_kernels.products import Tile, hidden_gradient, operand_scale, rounded_tile

N, D, V = 24, 32, 4096


def case_with_common_row(common_mode=6.0, kl=1e-3, entropy=2.0):
    return testing.make_case(tokens=N, dim=D, vocab_size=V, entropy=entropy, kl=kl,
                             common_mode=common_mode)  # fmt: skip


def gradients(case, tile_dtype, **options):
    problem = make_problem(case.student_hidden, case.student_weight, case.teacher_hidden, **options)
    wanted = GradientsWanted(True, True, False)
    found = run_chunks(problem, wanted, None, None, tile_dtype=tile_dtype)
    return found.hidden_gradient.double(), found.weight_gradient.double()


def relative(got, want):
    return float((got - want).norm() / want.norm())


def uncorrected(tile, weight, mean_row, kept=None):
    return hidden_gradient(Tile(tile.values, tile.row_scale, torch.zeros(N, 1)), weight, mean_row)


def sum_only(tile, weight, mean_row, kept=None):
    """The shorter form, without −dZ: right only where Σ_v dZ = 0."""
    total = tile.values.float().sum(1, keepdim=True)
    return hidden_gradient(Tile(tile.values, tile.row_scale, total), weight, mean_row)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("softcap", [None, 8.0])
def test_correction_removes_the_error_of_a_common_row(monkeypatch, dtype, softcap):
    case = case_with_common_row()
    options = {"logit_softcap": (softcap, softcap), "reduction": "sum"}
    exact, exact_dw = gradients(case, None, **options)
    corrected, dw = gradients(case, dtype, **options)
    errors = {"corrected": relative(corrected, exact)}
    for name, variant in (("uncorrected", uncorrected), ("sum only", sum_only)):
        monkeypatch.setattr("opsdc_kernels.products.hidden_gradient", variant)
        errors[name] = relative(gradients(case, dtype, **options)[0], exact)
    assert errors["corrected"] <= 3e-3
    assert errors["uncorrected"] >= 2 * errors["corrected"]
    if softcap:
        assert errors["sum only"] >= 0.01  # Σ_v dZ is not 0 there, and the short form removes it
    assert relative(dw, exact_dw) <= 4e-3


def test_two_shards_of_the_vocabulary_add_up():
    """Each shard corrects with its own mean row; its Σ_v dZ is far from 0."""
    case = case_with_common_row()
    exact, _ = gradients(case, None)
    s = case.student_hidden @ case.student_weight.T
    d = (case.teacher_hidden - case.student_hidden) @ case.student_weight.T
    q = s.softmax(1)
    dz = -q * (d - (q * d).sum(1, keepdim=True))
    total = {"corrected": 0, "sum only": 0}
    for shard in (slice(0, V // 3), slice(V // 3, V)):
        part, weight = dz[:, shard].contiguous(), case.student_weight[shard]
        tile = rounded_tile(part.clone(), torch.empty_like(part), torch.bfloat16)
        mean_row = weight.mean(0)
        total["corrected"] += hidden_gradient(tile, weight, mean_row).double()
        total["sum only"] += sum_only(tile, weight, mean_row).double()
    assert relative(total["corrected"], exact) <= 3e-3
    assert relative(total["sum only"], exact) >= 5 * relative(total["corrected"], exact)


def test_fp32_tiles_are_not_rounded_nor_corrected():
    dz = torch.randn(3, 50)
    tile = rounded_tile(dz, torch.empty_like(dz), torch.float32)
    assert tile.values is dz
    assert tile.residual is None


@pytest.mark.parametrize("kl", [1e-2, 1e-6, 1e-10])
def test_fp16_tiles_do_not_underflow(kl):
    """Without row scales an fp16 tile of KL 1e-10 is all zeros or subnormals."""
    case = case_with_common_row(common_mode=0.0, kl=kl, entropy=6.0)
    exact, exact_dw = gradients(case, None)
    dh, dw = gradients(case, torch.float16)
    assert relative(dh, exact) <= 1e-3
    assert relative(dw, exact_dw) <= 1e-3


def test_fp16_tiles_with_tokens_of_very_different_size():
    near, far = (case_with_common_row(0.0, kl, 3.0) for kl in (1e-9, 1.0))
    mixed = testing.Case(
        torch.cat([near.student_hidden, far.student_hidden]),
        far.student_weight,
        torch.cat([near.teacher_hidden, far.teacher_hidden]),
    )
    exact, _ = gradients(mixed, None)
    dh, _ = gradients(mixed, torch.float16)
    rows = (dh - exact).norm(dim=1) / exact.norm(dim=1)
    assert rows.max() <= 2e-3


@pytest.mark.parametrize("size", [1e-6, 1.0, 3e4])
def test_operand_scale_is_a_power_of_two_that_fits_fp16(size):
    hidden, weight = torch.randn(9, 4) * size, torch.linspace(0, 1e-4, 9)
    scale = operand_scale(hidden, weight, -0.5)
    assert torch.equal(torch.log2(scale), torch.log2(scale).round())
    largest = (hidden.abs().amax() * weight.amax() * 0.5 * scale).item()
    assert 2.0**12 <= largest <= 2.0**15


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 5])
def test_products_of_some_columns(dtype, tokens):
    """Of no column at all, too: a gradient that nothing is added to is 0, not what was there."""
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(40, D, generator=g).to(dtype)
    for kept in (torch.arange(3, 40, 5), torch.arange(0)):
        tile, rows = torch.randn(tokens, len(kept), generator=g), weight[kept].float()
        out = torch.full((tokens, D), torch.nan)
        products.hidden_gradient_into(out, tile, weight, kept)
        torch.testing.assert_close(out, tile @ rows, rtol=1e-4, atol=1e-5)
        mean = products.mean_row(weight, torch.float32, kept)
        want = rows.mean(0) if len(kept) else torch.zeros(D)
        torch.testing.assert_close(mean, want, rtol=1e-5, atol=1e-6)


def test_the_correction_is_by_the_mean_row_of_the_columns_of_the_tile():
    """What these rows have in common, the others have not."""
    case = case_with_common_row(common_mode=0.0)
    weight = case.student_weight.clone()
    kept = torch.arange(0, V, 9)
    weight[kept] += 20 * torch.randn(1, D, generator=torch.Generator().manual_seed(1))
    problem = make_problem(case.student_hidden, weight, case.teacher_hidden)
    wanted, tokens = GradientsWanted(True, False, False), slice(0, N)
    dz = torch.randn(N, len(kept), generator=torch.Generator().manual_seed(2))
    dz -= dz.mean(1, keepdim=True)
    result = Result.empty(problem, wanted)
    gradients = Gradients(problem, wanted, result, None, None, torch.bfloat16)
    gradients.add(tokens, dz.clone(), torch.empty_like(dz), torch.ones(N, 1), first=True,
                  columns=kept)  # fmt: skip
    want = dz.double() @ weight[kept].double()
    assert relative(result.hidden_gradient.double(), want) <= 4e-3


@pytest.mark.parametrize("size", [1e-9, 1.0, 1e7])
@pytest.mark.parametrize("onto", [False, True])
def test_fp16_operands_of_any_weight(size, onto):
    """dW, whose hidden states carry the weights: lifted into fp16's range, added to, put back."""
    case = case_with_common_row(common_mode=0.0, entropy=3.0)
    problem = make_problem(case.student_hidden, case.student_weight, case.teacher_hidden)
    wanted, weight = GradientsWanted(False, True, False), size * torch.linspace(0.5, 1, N)
    parts = [torch.arange(0, N // 2), torch.arange(N // 2, N)] if onto else [None]
    found = []
    for dtype in (torch.float16, None):
        result = None
        for kept in parts:
            result = run_chunks(problem, wanted, weight, kept, tile_dtype=dtype, onto=result)
        found.append(result.weight_gradient.double())
    assert relative(*found) <= 1e-3
