"""Sums of the student's probabilities: against float64, in torch and in C, and wrong C refused."""

import shutil

import pytest
import torch

from opsdc_kernels import column_bound, column_sums
from opsdc_kernels.native import build, columns, threads

C, D, V = 7, 12, 2500
"""More columns than two blocks of the passes in C."""
OPTIONS = (
    {}, {"temperature": 0.7, "logit_scale": (1.3, 1.3)}, {"student_bias": torch.linspace(-2, 3, V)},
    {"student_bias": torch.linspace(-1, 1, V), "temperature": 2.0},
    {"logit_softcap": (30.0, 30.0)},
)  # fmt: skip


def gate(make_problem):
    """Raises AssertionError unless fp32 sums are those of float64."""
    g = torch.Generator().manual_seed(0)
    h, w = torch.randn(C, D, generator=g), torch.randn(V, D, generator=g)
    square, along, apart = (torch.rand(size, generator=g) for size in (V, C, C))
    keeps = torch.rand(V, generator=g) < 0.1
    for options in OPTIONS:
        problem = make_problem(h, w, h, **options)
        x = h @ w.T
        wide = {k: x.double() if isinstance(x, torch.Tensor) else x for k, x in options.items()}
        q, lse, entropy = probabilities(make_problem(h, w, h, **wide), x)
        spread = q @ square.double()
        around = along * spread.sqrt() + apart
        left = q * ~keeps
        want = (lse, entropy, spread, q.amax(0), along.double() @ q, around @ q)
        got = column_sums.student(problem, x.clone(), square, along, apart)
        sums = column_sums.dropped(problem, x, lse.float(), keeps, square)
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
    z = x.double() * problem.logit_scale[0]
    if problem.student_bias is not None:
        z = z + problem.student_bias * problem.logit_scale[0]
    cap = problem.logit_softcap[0]
    z = (z if cap is None else cap * torch.tanh(z / cap)) / problem.temperature
    log_q = z.log_softmax(1)
    return log_q.exp(), z.logsumexp(1), -(log_q.exp() * log_q).sum(1)


def test_sums_are_those_of_float64(row_passes, make_problem):
    gate(make_problem)


def test_masked_columns_have_no_mass(row_passes, make_problem):
    bias = torch.zeros(V)
    bias[::3] = -torch.inf
    h, w = torch.randn(C, D), torch.randn(V, D)
    problem = make_problem(h, w, h, student_bias=bias)
    one = torch.ones(V)
    found = column_sums.student(problem, h @ w.T, one, torch.ones(C), torch.ones(C))
    assert float(found.peak_V[::3].max()) < 1e-30
    assert all(bool(torch.isfinite(x).all()) for x in found)


def test_threads_agree(monkeypatch, make_problem):
    monkeypatch.setenv(build.SWITCH, "1")
    if build.native().dll is None:
        pytest.skip(f"row passes run in {build.native().description}")
    monkeypatch.setattr(threads, "THREAD_LOGITS", 1)
    h, w = torch.randn(C, D), torch.randn(V, D)
    problem, some = make_problem(h, w, h), torch.rand(V)
    found = []
    for count in (1, 3):
        torch.set_num_threads(count)
        found.append(columns.student(problem, h @ w.T, some, torch.ones(C), torch.ones(C)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


# (what is in rows.c, what stands there in the mutant)
COMPILED = {
    "last column dropped": ("v < size; v++) {", "v < size - 1; v++) {"),
    "last row dropped": ("i < job->rows; i++) \\\n", "i < job->rows - 1; i++) \\\n"),
    "no bias": ("(bias ? x[v] + bias[v] : x[v])", "x[v]"),
    "bias after the factor": (
        "((bias ? x[v] + bias[v] : x[v]) * factor)", "((bias ? bias[v] : 0) + x[v] * factor)",
    ),
    "no factor": (": x[v]) * factor)", ": x[v]))"),
    "peak of the last row": ("q > peak[v] ? q : peak[v]", "q"),
    "peak of masses": ("peak[v] = q >", "peak[v] = q / share >"),
    "sums of the last row": ("slope[v] += along * q", "slope[v] = along * q"),
    "rest without apart": ("+ job->apart[i]", ""),
    "rest by the squared spread": ("(float)sqrt(spread / total)", "(float)(spread / total)"),
    "kept columns counted": ("(1 - keeps[v])", "(1 + 0 * keeps[v])"),
    "kept for dropped": ("(1 - keeps[v])", "keeps[v]"),
    "products without the feature": ("squares += q * square[v]", "squares += q"),
    "entropy of unnormalized masses": ("log(total) - moment / total", "log(total) - moment"),
    "last block alone": ("mass += sum", "mass = sum"),
    "norms for distances": ("row[v] - centre[v]", "row[v]"),
}  # fmt: skip


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_mutant_is_killed(monkeypatch, tmp_path, name, make_problem):
    monkeypatch.setenv(build.SWITCH, "1")
    if build.native().dll is None:
        pytest.skip(f"row passes run in {build.native().description}")
    old, new = COMPILED[name]
    text = build.SOURCE.read_text("utf-8")
    start = text.index("ColumnJob;")
    assert old in text[start:]
    source = tmp_path / "rows.c"
    source.write_text(text[:start] + text[start:].replace(old, new))
    library = build.load(shutil.which("cc"), source, tmp_path)
    monkeypatch.setattr(columns, "native", lambda: build.Build(library, "mutant"))
    with pytest.raises(AssertionError):
        gate(make_problem)
