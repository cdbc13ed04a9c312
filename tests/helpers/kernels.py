"""Problems, cases and mutants for the tests of `opsdc_kernels`."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path

import pytest
import torch

import opsdc_kernels
from opsdc_kernels import linear_divergence, plan, testing
from opsdc_kernels.problem import OPTIONS, Options, Problem
from opsdc_kernels.row_pass import build, compiled
from opsdc_kernels.row_pass.choose import choose

CPU = torch.device("cpu")
OPTIONAL = ("student_bias", "teacher_bias", "token_weight", "target_ids")


def make_problem(hidden, weight, teacher_hidden, teacher_weight=None, **given):
    """A `Problem` of reduction "sum" from tensors and the options that differ."""
    options = {name: given.pop(name) for name in OPTIONS if name in given}
    return Problem(
        student_hidden=hidden,
        student_weight=weight,
        teacher_hidden=teacher_hidden,
        teacher_weight=teacher_weight,
        **{**dict.fromkeys(OPTIONAL), **given},
        options=Options(**{"reduction": "sum", **options}),
    )


def sizes_of(vocab_size, dims, dtype=torch.float32):
    """What `plan` asks of a chunk on a CPU."""
    row_pass = choose(CPU, dtype)
    return plan.Sizes(vocab_size=vocab_size, dims=dims, dtype=dtype, device=CPU, row_pass=row_pass)


def results(tensors, upstream=1.0, train=(True, True, True), **options):
    """[loss, dH, dW, db, *statistics], None where there is none."""
    hidden, weight, *teacher = tensors
    hidden = hidden.clone().requires_grad_(train[0])
    weight = weight.clone().requires_grad_(train[1])
    bias = options.get("student_bias")
    if bias is not None:
        options["student_bias"] = bias = bias.clone().requires_grad_(train[2])
    loss, stats = linear_divergence(hidden, weight, *teacher, return_stats=True, **options)
    (loss * upstream).sum().backward()
    statistics = [getattr(stats, name) for name in stats.__slots__]
    bias_gradient = None if bias is None else bias.grad
    return [loss.detach(), hidden.grad, weight.grad, bias_gradient, *statistics]


@functools.cache
def case_of(**sizes):
    """`testing.make_case`, made once: several row passes and mutants meet the same case. None where
    no inputs are such."""
    try:
        return testing.make_case(**sizes)
    except testing.Unrepresentable:
        return None


_TRUTHS = {}


def truth_of(case, **options):
    """`testing.truth` of a case of `case_of`, computed once for the same options."""
    return _truth_and_budget(case, options)[0]


def errors_and_budget(case, **options):
    """(errors, budget) of a call, as `testing.assert_accurate` compares them; truth and budget of
    a case of `case_of` are computed once."""
    of_truth = {k: v for k, v in options.items() if k not in ("backend", "workspace_bytes")}
    true, budget = _truth_and_budget(case, of_truth)
    return testing.errors(testing.run(case, **options), true), budget


def _truth_and_budget(case, options):
    named = (
        (k, tuple(v.tolist()) if isinstance(v, torch.Tensor) else v) for k, v in options.items()
    )
    key = id(case), *sorted(named)
    if key not in _TRUTHS:
        true = testing.truth(case, **options)
        _TRUTHS[key] = true, testing.budget(case, true), case  # which keeps its id
    return _TRUTHS[key][:2]


def mutate_c(monkeypatch, folder, owner, old, new):
    """From now on `owner` runs its C with `old` replaced by `new`, also in the header. Skips the
    test where nothing is compiled."""
    monkeypatch.setenv(build.SWITCH, "1")
    if owner.native().dll is None:
        pytest.skip(f"row passes run in {owner.native().description}")
    package, occurrences = Path(opsdc_kernels.__file__).parent, 0
    for path in (compiled.SOURCE.with_name("common.h"), owner.SOURCE):
        text = path.read_text("utf-8")
        occurrences += text.count(old)
        copy = folder / path.relative_to(package)
        copy.parent.mkdir(exist_ok=True)
        copy.write_text(text.replace(old, new))
    assert occurrences, f"{old!r} stands nowhere"
    library = build.load(shutil.which("cc"), folder / owner.SOURCE.relative_to(package), folder)
    monkeypatch.setattr(owner, "native", lambda: build.Build(library, "mutant"))
