"""Sums of the student's probabilities: against float64, in torch and in C, and wrong C refused."""

import pytest
import torch
from helpers.kernels import make_problem, mutate_c

from opsdc_kernels.columns import bound as column_bound
from opsdc_kernels.columns import compiled
from opsdc_kernels.columns import sums as column_sums
from opsdc_kernels.row_pass import build, threads

C, D, V = 23, 12, 2500
"""Two panels of the passes in C, and many blocks; neither full."""
OPTIONS = (
    {}, {"temperature": 0.7, "logit_scale": (1.3, 1.3)}, {"student_bias": torch.linspace(-2, 3, V)},
    {"student_bias": torch.linspace(-1, 1, V), "temperature": 2.0},
    {"logit_softcap": (30.0, 30.0)},
)  # fmt: skip


def gate():
    """Raises AssertionError unless fp32 sums are those of float64."""
    g = torch.Generator().manual_seed(0)
    h, w = torch.randn(C, D, generator=g), torch.randn(V, D, generator=g)
    square, along, apart = (torch.rand(size, generator=g) for size in (V, C, C))
    keeps = torch.rand(V, generator=g) < 0.1
    for options in OPTIONS:
        problem = make_problem(h, w, h, **options)
        x = (w @ h.T).T
        wide = {k: x.double() if isinstance(x, torch.Tensor) else x for k, x in options.items()}
        q, lse, entropy = probabilities(make_problem(h, w, h, **wide), x)
        spread = q @ square.double()
        around = along * spread.sqrt() + apart
        left = q * ~keeps
        want = (lse, entropy, spread, q.amax(0), along.double() @ q, around @ q)
        got = column_sums.student_sums(problem, x.clone(), square, along, apart)
        sums = column_sums.dropped_sums(problem, x, lse.float(), keeps, square)
        for a, b in zip((*got, *sums), (*want, left.sum(1), left @ square.double()), strict=True):
            torch.testing.assert_close(a.double(), b, rtol=3e-5, atol=1e-25)
        found = column_sums.probabilities_(problem, x.clone(), lse.float())
        torch.testing.assert_close(found.double(), q, rtol=3e-5, atol=1e-25)
    radius = column_bound._radius(w, torch.float32, True)
    true = (w.double() - w[:: column_bound.CENTRE_STEP].double().mean(0)).norm(dim=1)
    assert bool((radius >= true).all())
    torch.testing.assert_close(radius.double(), true, rtol=3e-3, atol=0)


def probabilities(problem, x):
    """Of float64, with log-normalizer and entropy; logits have a floor as those of the code."""
    z = x.double() * problem.options.logit_scale[0]
    if problem.student_bias is not None:
        z = z + problem.student_bias * problem.options.logit_scale[0]
    cap = problem.options.logit_softcap[0]
    z = (z if cap is None else cap * torch.tanh(z / cap)) / problem.options.temperature
    log_q = z.log_softmax(1)
    return log_q.exp(), z.logsumexp(1), -(log_q.exp() * log_q).sum(1)


def test_sums_are_those_of_float64(row_passes):
    gate()


def test_masked_columns_have_no_mass(row_passes):
    bias = torch.zeros(V)
    bias[::3] = -torch.inf
    h, w = torch.randn(C, D), torch.randn(V, D)
    problem = make_problem(h, w, h, student_bias=bias)
    one = torch.ones(V)
    sums = column_sums.student_sums(problem, (w @ h.T).T, one, torch.ones(C), torch.ones(C))
    assert float(sums.peak_V[::3].max()) < 1e-30
    assert all(bool(torch.isfinite(x).all()) for x in sums)


def test_threads_agree(monkeypatch):
    monkeypatch.setenv(build.SWITCH, "1")
    if compiled.native().dll is None:
        pytest.skip(f"row passes run in {compiled.native().description}")
    monkeypatch.setattr(threads, "THREAD_LOGITS", 1)
    h, w = torch.randn(C, D), torch.randn(V, D)
    problem, some = make_problem(h, w, h), torch.rand(V)
    found = []
    for count in (1, 3):
        torch.set_num_threads(count)
        found.append(
            compiled.student_sums(problem, (w @ h.T).T, some, torch.ones(C), torch.ones(C))
        )
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


# (what is in columns.c or common.h, what stands there in the mutant)
COMPILED = {
    "last columns dropped": ("start < job->columns;", "start + BLOCK <= job->columns;"),
    "last rows dropped": ("token < job->rows;", "token + W <= job->rows;"),
    "no bias": ("(x[j] + bias) * factor", "x[j] * factor"),
    "bias after the factor": ("(x[j] + bias) * factor", "x[j] * factor + bias"),
    "no factor": ("(x[j] + bias) * factor", "(x[j] + bias)"),
    "soft-cap without its range": ("job->student.range * tanh_of", "tanh_of"),
    "peak of the last row": ("q > all->peak[v][j] ? q : all->peak[v][j]", "q"),
    "peak of masses": ("all->peak[v][j] = q >", "all->peak[v][j] = q / p->share[j] >"),
    "peak of one lane": ("peak = all.peak[v][j] > peak ?", "peak = j == 0 ?"),
    "sums of the last row": ("slope[v][j] += p->along[j] * q", "slope[v][j] = p->along[j] * q"),
    "rest without apart": ("+ job->apart[i]", ""),
    "rest by the squared spread": ("(float)sqrt(spread)", "(float)spread"),
    "spread of another peak": ("p->spread[j] *= shrink;", ""),
    "kept columns counted": ("if (job->keeps[start + v]) continue;", ""),
    "kept for dropped": ("if (job->keeps[start + v])", "if (!job->keeps[start + v])"),
    "products without the feature": ("squares[j] += q * square", "squares[j] += q"),
    "entropy of unnormalized masses": ("p->below[j] / total", "p->below[j]"),
    "last block alone": ("p->mass[j] += sum[j]", "p->mass[j] = sum[j]"),
    "norms for distances": ("row[v] - centre[v]", "row[v]"),
}  # fmt: skip


@pytest.mark.whole
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_mutant_is_killed(monkeypatch, tmp_path, name):
    mutate_c(monkeypatch, tmp_path, compiled, *COMPILED[name])
    with pytest.raises(AssertionError):
        gate()
