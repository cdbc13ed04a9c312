"""Wrong variants of the row passes and chunk code, each of which the gate must reject.

A tolerance is worth what it refuses. The gate is `opsdc_kernels.testing`'s budget in the regimes of
self-distillation, plus three laws; it passes on the code as it is, and fails on every mutant.
"""

import math
from dataclasses import replace

import pytest
import torch

from opsdc_kernels import linear_divergence, products, testing
from opsdc_kernels.chunked import op as chunked_op
from opsdc_kernels.chunked.run import run_chunks
from opsdc_kernels.problem import Problem, Stat, mean_factor
from opsdc_kernels.row_pass import build, exact
from opsdc_kernels.row_pass import compiled as compiled_rows
from opsdc_kernels.row_pass import eager as rows

N, D, V = 9, 24, 205
WEIGHT = torch.tensor([1.0, 0.0, 0.5, 2.0, 1.0, 0.0, 0.3, 1.0, 0.0])
OPTIONS = (
    {}, {"reduction": "sum"}, {"reduction": "none"}, {"token_weight": WEIGHT},
    {"temperature": 2.0, "logit_softcap": 15.0, "logit_scale": 1.5}, {"vocab_size": V - 5},
    {"divergence": "forward_kl"}, {"divergence": "jsd", "beta": 0.3},
    {"divergence": "jsd", "beta": 0.3, "temperature": 1.5},
)  # fmt: skip


def gate():
    """Raises AssertionError unless `chunked` is right."""
    budget = 4 * 8 * V * 12  # a few rows per chunk, so that chunks have to add up
    for kl, shared, common_mode in ((1e-2, True, 0.0), (1e-6, True, 2.0), (1e-1, False, 0.0)):
        case = testing.make_case(tokens=N, dim=D, vocab_size=V, entropy=1.0, kl=kl,
                                 shared_head=shared, common_mode=common_mode)  # fmt: skip
        for options in OPTIONS:
            testing.assert_accurate(case, backend="chunked", workspace_bytes=budget, **options)
    backward_twice(case)
    per_token_upstream(case)
    bias_gradient(case)
    rounded_tile_gradient()


def backward_twice(case):
    h = case.student_hidden.clone().requires_grad_()
    loss = linear_divergence(h, case.student_weight, case.teacher_hidden)
    first = torch.autograd.grad(loss, h, retain_graph=True)[0].clone()
    torch.autograd.grad(loss, h, torch.tensor(3.0), retain_graph=True)
    assert torch.equal(torch.autograd.grad(loss, h)[0], first)


def per_token_upstream(case):
    found = []
    for backend in ("chunked", "reference"):
        leaves = [x.clone().requires_grad_() for x in (case.student_hidden, case.student_weight)]
        loss = linear_divergence(*leaves, case.teacher_hidden, case.teacher_weight,
                                 reduction="none", backend=backend)  # fmt: skip
        found.append(torch.autograd.grad(loss, leaves, torch.linspace(-1, 2, N)))
    for a, b in zip(*found, strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm()


def bias_gradient(case):
    found = []
    for backend in ("chunked", "reference"):
        b = torch.linspace(-1, 1, V).requires_grad_()
        loss = linear_divergence(
            case.student_hidden, case.student_weight, case.teacher_hidden,
            case.teacher_weight, student_bias=b, token_weight=WEIGHT, backend=backend,
        )  # fmt: skip
        loss.backward()
        found.append(b.grad)
    assert (found[0] - found[1]).norm() <= 1e-4 * found[1].norm()


def rounded_tile_gradient():
    """dH of a bf16 tile whose rows do not sum to 0, as under a soft-cap, and a common row of W."""
    g = torch.Generator().manual_seed(0)
    dz = torch.randn(N, 2000, generator=g)
    dz = dz - dz.mean(1, keepdim=True) + 1e-3
    weight = torch.randn(2000, D, generator=g) + 20 * torch.randn(1, D, generator=g)
    found = products.rounded_tile(dz.clone(), torch.empty_like(dz), torch.bfloat16)
    got = products.hidden_gradient(found, weight, weight.mean(0)).double()
    want = dz.double() @ weight.double()
    assert (got - want).norm() <= 3e-3 * want.norm()


@pytest.mark.usefixtures("row_passes")
def test_the_gate_passes_on_the_code_as_it_is():
    gate()


# Row passes. Each wrapper gets (s, other, problem, **options) as `divergence_rows_` does.


def on_rows(after=None, before=None):
    original = rows.divergence_rows_

    def mutant(s, other, problem, **options):
        if before:
            problem = before(s, other, problem) or problem
        found = original(s, other, problem, **options)
        return (after(s, found, problem) if after else None) or found

    return {(rows, "divergence_rows_"): mutant}


def with_options(problem, **changed):
    return replace(problem, options=replace(problem.options, **changed))


def scaled(factor):
    return on_rows(lambda s, found, problem: found._replace(factor=found.factor * factor))


def zero_gradient():
    def after(s, found, problem):
        s.zero_()

    return on_rows(after)


def on_exact_rows(change):
    """Changes dz after `divergence_and_gradient`, which then serves every row."""
    original = exact.divergence_and_gradient

    def mutant(s, t, d, divergence, beta, dz):
        s_t_d = s.clone(), t.clone(), d.clone()
        value = original(s, t, d, divergence, beta, dz)
        if dz is not None:
            change(dz, *s_t_d, divergence, beta)
        return value

    return {
        (exact, "divergence_and_gradient"): mutant,
        (rows, "fast_rows_"): lambda *_, **__: None,
    }


def uncentred_gradient():
    """Drops −E_q[d]: q·d."""

    def change(dz, s, t, d, divergence, beta):
        if divergence == "reverse_kl":
            torch.mul(torch.softmax(s, 1), d, out=dz).neg_()

    return on_exact_rows(change)


def other_divergence(wanted, given):
    """Gradient of another divergence."""
    original = exact.divergence_and_gradient

    def change(dz, s, t, d, divergence, beta):
        original(s, t, d, given if divergence == wanted else divergence, beta, dz)

    return on_exact_rows(change)


def jsd_gradient_of_a_published_example():
    """(1−β)·(q − m) in place of (1−β)·q·(log(q/m) − KL(q‖m))."""

    def change(dz, s, t, d, divergence, beta):
        if divergence == "jsd":
            torch.mul(torch.softmax(s, 1) - torch.softmax(t, 1), beta * (1 - beta), out=dz)

    return on_exact_rows(change)


def on_fast_rows(wanted, formula=None, gradient=None):
    """Another value, or another gradient, from (s, d) of the pass for a CPU's cache."""
    original = rows.fast_rows_

    def mutant(s, d, problem, **options):
        s_d = s.clone(), d.clone()
        result = original(s, d, problem, **options)
        if problem.options.divergence != wanted:
            return result
        if gradient:
            s.copy_(gradient(*s_d))
        if formula:
            result.values[Stat.DIVERGENCE] = formula(*s_d)
        return result

    return {(rows, "fast_rows_"): mutant}


def textbook_value():
    """Σ q·(log q − log p) in fp32."""

    def formula(s, d):
        log_q, log_p = s.log_softmax(1), (s + d).log_softmax(1)
        return (log_q.exp() * (log_q - log_p)).sum(1)

    return on_fast_rows("reverse_kl", formula)


def second_order_value():
    """½·Var_q(d): right only as KL → 0."""

    def formula(s, d):
        q = s.softmax(1)
        c = d - (q * d).sum(1, keepdim=True)
        return (q * c * c).sum(1) / 2

    return on_fast_rows("reverse_kl", formula)


def subtracted_probabilities():
    """Forward KL's p − q from two rounded softmaxes."""
    return on_fast_rows("forward_kl", gradient=lambda s, d: (s + d).softmax(1) - s.softmax(1))


def bf16_logits():
    def before(s, other, problem):
        s.copy_(s.bfloat16())
        other.copy_(other.bfloat16())

    return on_rows(before=before)


def subtracted_logits():
    """t − s of rounded logits where the head is shared, in place of the difference GEMM."""

    def before(s, other, problem):
        if problem.shared_logits:
            other.add_(s).sub_(s)

    return on_rows(before=before)


def no_temperature():
    return on_rows(before=lambda s, other, problem: with_options(problem, temperature=1.0))


def no_softcap_slope():
    original = rows.transform_

    def mutant(*args):
        return *original(*args)[:3], None

    return {(rows, "transform_"): mutant}


def no_temperature_in_backward():
    return {(Problem, "logit_factor"): property(lambda self: self.options.logit_scale[0])}


def phantom_vocabulary_tail():
    def mutant(problem, *args, **options):
        return run_chunks(with_options(problem, vocab_size=None), *args, **options)

    return {(chunked_op, "run_chunks"): mutant}


def on_result(change):
    def mutant(problem, *args, **options):
        result = run_chunks(problem, *args, **options)
        change(result, problem, *args)
        return result

    return {(chunked_op, "run_chunks"): mutant}


def zero_weight_gradient():
    def change(result, *_):
        if result.weight_gradient is not None:
            result.weight_gradient.zero_()

    return on_result(change)


def last_column_dropped():
    def change(result, *_):
        if result.weight_gradient is not None:
            result.weight_gradient[-8:] = 0

    return on_result(change)


def last_chunk_dropped_in_dw():
    original, calls = products.add_weight_gradient, []

    def mutant(out, values, hidden, *, first):
        calls.append(len(values))
        if sum(calls) % N:
            original(out, values, hidden, first=first)

    return {(products, "add_weight_gradient"): mutant}


def bf16_weight_gradient():
    """dW summed in bf16 over the chunks."""
    original = products.add_weight_gradient

    def mutant(out, values, hidden, *, first):
        original(out, values, hidden, first=first)
        out.copy_(out.bfloat16())

    return {(products, "add_weight_gradient"): mutant}


def mask_off_by_one():
    def mutant(problem, needs, row_weight, kept, **options):
        if kept is not None:
            kept = (kept + 1) % problem.student_hidden.shape[0]
        return run_chunks(problem, needs, row_weight, kept, **options)

    return {(chunked_op, "run_chunks"): mutant}


def mean_over_all_tokens():
    def mutant(weight):
        return torch.ones_like(weight.sum()) / len(weight)

    return {(chunked_op, "mean_factor"): mutant}


def weights_ignored_in_the_gradient():
    def mutant(problem, needs, row_weight, kept, **options):
        return run_chunks(problem, needs, None, kept, **options)

    return {(chunked_op, "run_chunks"): mutant}


def saved_gradients_scaled_in_place():
    def mutant(saved, upstream, dtype):
        return saved.mul_(upstream)

    return {(chunked_op, "_times_upstream"): mutant}


def upstream_ignored():
    def mutant(upstream, *args):
        return ORIGINAL_RECOMPUTE(torch.ones_like(upstream), *args)

    return {(chunked_op, "_recompute"): mutant}


def bias_gradient_without_weights():
    def change(result, problem, needs, row_weight, kept):
        if result.bias_gradient is not None and row_weight is not None:
            result.bias_gradient.div_(row_weight.mean())

    return on_result(change)


def no_rounding_correction():
    original = products.rounded_tile

    def mutant(*args):
        found = original(*args)
        if found.residual is None:  # not rounded
            return found
        return replace(found, residual=torch.zeros_like(found.residual))

    return {(products, "rounded_tile"): mutant}


def rounding_correction_without_dz():
    original = products.rounded_tile

    def mutant(*args):
        found = original(*args)
        if found.residual is None:
            return found
        return replace(found, residual=found.values.float().sum(1, keepdim=True))

    return {(products, "rounded_tile"): mutant}


ORIGINAL_RECOMPUTE = chunked_op._recompute
MUTANTS = {
    "zero gradient": zero_gradient,
    "negated gradient": lambda: scaled(-1),
    "halved gradient": lambda: scaled(0.5),
    "1 % off": lambda: scaled(1.01),
    "zero dW": zero_weight_gradient,
    "gradient without the −KL term": uncentred_gradient,
    "forward KL's gradient": lambda: other_divergence("reverse_kl", "forward_kl"),
    "reverse KL's gradient for forward": lambda: other_divergence("forward_kl", "reverse_kl"),
    "JSD gradient of an example": jsd_gradient_of_a_published_example,
    "textbook value": textbook_value,
    "p − q from rounded softmaxes": subtracted_probabilities,
    "second-order value": second_order_value,
    "bf16 logits": bf16_logits,
    "subtracted logits": subtracted_logits,
    "no temperature": no_temperature,
    "no 1/T in backward": no_temperature_in_backward,
    "no slope of the soft-cap": no_softcap_slope,
    "phantom vocabulary tail": phantom_vocabulary_tail,
    "last columns of dW dropped": last_column_dropped,
    "last chunk of dW dropped": last_chunk_dropped_in_dw,
    "dW summed in bf16": bf16_weight_gradient,
    "mask off by one": mask_off_by_one,
    "mean over all tokens": mean_over_all_tokens,
    "token weights ignored in gradients": weights_ignored_in_the_gradient,
    "saved gradients scaled in place": saved_gradients_scaled_in_place,
    "per-token upstream ignored": upstream_ignored,
    "bias gradient unweighted": bias_gradient_without_weights,
    "no rounding correction": no_rounding_correction,
    "rounding correction without dZ": rounding_correction_without_dz,
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_killed(monkeypatch, name):
    monkeypatch.setenv(build.SWITCH, "0")
    for (owner, attribute), mutant in MUTANTS[name]().items():
        monkeypatch.setattr(owner, attribute, mutant)
    with pytest.raises((AssertionError, ValueError, RuntimeError)):
        gate()


# (what is in rows.c or common.h, what stands there in the mutant); each occurrence is replaced.
COMPILED = {
    "second-order value": ("sum[j] += q * excess(c)", "sum[j] += q * c * c / 2"),
    "e^x − 1 − x by subtraction": (
        "scale * (r * r * p) + (scale * (1 + r) - (1 + x))", "exponential(x) - 1 - x",
    ),
    "gradient without the −KL term": ("s[v][j] = q * c;", "s[v][j] = q * (c + p->mean[j]);"),
    "zero gradient": ("s[v][j] = q * c;", "s[v][j] = 0;"),
    "tail of the vocabulary dropped": ("start < job->columns;", "start + BLOCK <= job->columns;"),
    "last block alone": ("p->value[j] += sum[j]", "p->value[j] = sum[j]"),
    "last token dropped": (
        "b.lanes = job->rows - token < W ? job->rows - token", "b.lanes = job->rows - token < W ? 1"
    ),
    "peak that moves alone": ("p->total[j] * shift)", "0)"),
    "peak that shrinks nothing": ("p->total[j] *= shrink;", ""),
    "mean of sums that did not shrink": ("shift) * shrink;", "shift);"),
    "no temperature": ("(x[j] + bias) * factor", "(x[j] + bias)"),
    "no bias": ("(x[j] + bias) * factor", "x[j] * factor"),
    "no slope of the soft-cap": ("s[v][j] *= b->slope[v][j]", "s[v][j] *= 1"),
    "half the slope of the soft-cap": ("*slope = 4 *", "*slope = 2 *"),
    "forward KL's gradient uncentred": (
        "s[v][j] = q * minus_one;", "s[v][j] = q * (minus_one + p->log_ratio[j]);",
    ),
    "forward KL's terms of the reverse": ("sum[j] += q * (fabsf(r) < 1 ? near : far)",
                                          "sum[j] += q * excess(r)"),
    "JSD with β and 1 − β exchanged": (
        "(1 - job->beta) * p->other[j] + job->beta", "job->beta * p->other[j] + (1 - job->beta)",
    ),
    "JSD gradient without its mean": ("b->d[v][j] + p->middle[j]", "b->d[v][j]"),
    "log(1 + y) of a rounded sum": ("n ? m - 1 : y", "m - 1"),
}  # fmt: skip


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_mutant_is_killed(compiled_mutant, name):
    compiled_mutant(compiled_rows, *COMPILED[name])
    with pytest.raises(AssertionError):
        gate()


def test_there_are_enough_mutants():
    assert len(MUTANTS) >= 15
    assert math.isclose(float(mean_factor(WEIGHT)), 1 / float(WEIGHT.sum()), rel_tol=1e-6)
