"""The Triton row passes against the torch ones, in Triton's interpreter."""

import math
import os

import pytest
import torch
from helpers.kernels import make_problem
from helpers.saturated import COLUMNS, LIMIT, errors, logits

from opsdc_kernels.problem import Options, Problem, Stat
from opsdc_kernels.row_pass.eager import divergence_rows_ as torch_rows_

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("run by test_interpreter.py", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
DIVERGENCES = ("reverse_kl", "forward_kl", "jsd")
VARIANTS = {
    "plain": {},
    "transformed": {"logit_scale": (1.5, 0.7), "temperature": 0.6, "logit_softcap": (4.0, None)},
    "shared": {"shared": True},
    "shared, capped": {"shared": True, "logit_softcap": (3.0, 3.0), "temperature": 1.7},
    "bias": {"bias": True},
    "infinite": {"bias": True, "infinite": True},
}


def problem_of(B, V, divergence, variant, dtype):
    options = {k: v for k, v in variant.items() if k not in ("shared", "bias", "infinite")}
    g = torch.Generator().manual_seed(7)
    biases = [None, None]
    if variant.get("bias"):
        biases = [torch.randn(V, generator=g), torch.randn(V, generator=g)]
        if variant.get("infinite") and V > 2:
            biases[0][V // 2] = -math.inf
            biases[1][V // 2] = -math.inf
            biases[0 if divergence == "reverse_kl" else 1][V // 3] = -math.inf
    empty = torch.zeros(0, 1, dtype=dtype)
    return Problem(
        student_hidden=empty,
        student_weight=empty,
        teacher_hidden=empty,
        teacher_weight=None if variant.get("shared") else empty,
        student_bias=None if biases[0] is None else biases[0].to(dtype),
        teacher_bias=None if biases[1] is None else biases[1].to(dtype),
        token_weight=None,
        target_ids=torch.arange(B) % V,
        options=Options(
            divergence=divergence, beta=0.3, vocab_size=V, return_stats=True, **options
        ),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(("B", "V"), [(1, 1), (3, 130)])
def test_equal_to_the_torch_rows(B, V, divergence, variant, dtype):
    from opsdc_kernels.row_pass.kernels import divergence_rows_

    options = VARIANTS[variant]
    g = torch.Generator().manual_seed(B)
    s = 3 * torch.randn(B, V, generator=g)
    d = 0.2 * torch.randn(B, V, generator=g)
    other = d if options.get("shared") else s + d
    target = torch.arange(B) % V
    mine, mine_other = s.clone(), other.clone()
    problem = problem_of(B, V, divergence, options, torch.float32)
    got = divergence_rows_(
        mine, mine_other, problem, gradient=True, target_ids_B=target, tile_dtype=dtype
    )
    truth, truth_other = s.double(), other.double()
    problem = problem_of(B, V, divergence, options, torch.float64)
    want = torch_rows_(truth, truth_other, problem, gradient=True, target_ids_B=target)
    for stat, a, b in zip(Stat, got.values, want.values, strict=True):
        atol = 1e-9 if stat == Stat.DIVERGENCE else 2e-6
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=atol)
    gradient = mine.double() * got.factor.double()[:, None]
    expected = truth * want.factor[:, None]
    assert (gradient - expected).norm() <= 3e-5 * expected.norm() + 1e-12
    if dtype == torch.float16:
        assert mine.abs().max() <= 2**14


def hard_rows():
    """(s, t) whose parts differ by more than exponentials hold: peaks apart, peaks that rise and
    fall by 300 over the columns, equal peaks in a tile and in two, mass in the last column."""
    g = torch.Generator().manual_seed(0)
    s, t = torch.randn(8, 200, generator=g), torch.randn(8, 200, generator=g)
    s[0, 150], t[0, 20] = 30.0, 30.0
    s[1] += torch.linspace(0, 300, 200)
    s[2] -= torch.linspace(0, 300, 200)
    t[1:3] += s[1:3]
    s[3:5, [10, 130]] = 8.0
    t[3, 10] = t[4, 130] = 9.0
    s[5, [10, 20]] = 8.0
    t[5, 20] = 9.0
    s[6, -1] = t[6, -1] = 90.0
    t[7] = s[7]
    t[7, 3] += 12.0
    return s, t


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_rows_of_hard_parts(divergence, masked):
    """Masked: a tile without columns, the first, and one column of a mass that underflows, which
    only one side has: where that makes the divergence infinite, it is."""
    from opsdc_kernels.row_pass.kernels import divergence_rows_

    s, t = hard_rows()
    biases = [None, None]
    if masked:
        biases = [torch.zeros(200), torch.zeros(200)]
        for bias in biases:
            bias[:64] = bias[100] = -math.inf
        biases[0 if divergence == "forward_kl" else 1][180] = -math.inf
        s[:, 180] -= 400.0 if divergence == "reverse_kl" else 0.0
        t[:, 180] -= 400.0 if divergence == "forward_kl" else 0.0

    def problem(dtype):
        empty = torch.zeros(0, 1, dtype=dtype)
        student, teacher = (None if x is None else x.to(dtype) for x in biases)
        return make_problem(
            empty, empty, empty, empty, divergence=divergence, beta=0.3, vocab_size=200,
            return_stats=True, student_bias=student, teacher_bias=teacher,
        )  # fmt: skip

    truth, mine = s.double(), s.clone()
    want = torch_rows_(truth, t.double(), problem(torch.float64), gradient=True)
    got = divergence_rows_(mine, t.clone(), problem(torch.float32), gradient=True)
    if masked and divergence != "jsd":
        assert torch.isinf(want.values[Stat.DIVERGENCE]).all()
    for stat, a, b in zip(list(Stat)[:6], got.values, want.values, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-5, atol=2e-6, msg=stat.name)
    gradient = mine.double() * got.factor.double()[:, None]
    expected = truth * want.factor[:, None]
    assert ((gradient - expected).norm(dim=1) <= 5e-5 * expected.norm(dim=1) + 1e-12).all()


def test_saturated_rows():
    from opsdc_kernels.row_pass.kernels import divergence_rows_

    options, empty = {"divergence": "jsd", "beta": 0.1}, torch.zeros(0, 1)
    problem = make_problem(empty, empty, empty, empty, vocab_size=COLUMNS, **options)
    s, t = (x[:18] for x in logits())
    gradient = s * divergence_rows_(s, t, problem, gradient=True).factor[:, None]
    assert errors(gradient, **options).max() <= LIMIT


def test_loss_only_leaves_the_logits():
    from opsdc_kernels.row_pass.kernels import divergence_rows_

    s = torch.randn(2, 70, generator=torch.Generator().manual_seed(0))
    kept = s.clone()
    divergence_rows_(s, s + 1, problem_of(2, 70, "jsd", {}, torch.float32), gradient=False)
    assert torch.equal(s, kept)
