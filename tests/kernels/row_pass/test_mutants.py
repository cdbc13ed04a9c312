"""Wrong variants of the row passes in torch and in C, each of which the gate must reject."""

from dataclasses import replace

import pytest
import torch
from helpers.kernel_gate import gate, prepare
from helpers.kernels import mutate_c

from opsdc_kernels.problem import Problem, Stat
from opsdc_kernels.row_pass import build, compiled, eager, exact


@pytest.fixture(scope="module", autouse=True)
def truths():
    prepare()


@pytest.mark.usefixtures("row_passes")
def test_the_gate_passes_on_the_code_as_it_is():
    gate()


# Row passes. Each wrapper gets (s, other, problem, **options) as `divergence_rows_` does.


def on_rows(after=None, before=None):
    original = eager.divergence_rows_

    def mutant(s, other, problem, **options):
        if before:
            problem = before(s, other, problem) or problem
        found = original(s, other, problem, **options)
        return (after(s, found, problem) if after else None) or found

    return {(eager, "divergence_rows_"): mutant}


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
        (eager, "fast_rows_"): lambda *_, **__: None,
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
    original = eager.fast_rows_

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

    return {(eager, "fast_rows_"): mutant}


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
    original = eager.transform_

    def mutant(*args):
        return *original(*args)[:3], None

    return {(eager, "transform_"): mutant}


def no_temperature_in_backward():
    return {(Problem, "logit_factor"): property(lambda self: self.options.logit_scale[0])}


MUTANTS = {
    "zero gradient": zero_gradient,
    "negated gradient": lambda: scaled(-1),
    "halved gradient": lambda: scaled(0.5),
    "1 % off": lambda: scaled(1.01),
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
    "JSD gradient without its mean": ("b->d[v][j] - p->middle[j]", "b->d[v][j]"),
    "log(1 + y) of a rounded sum": ("n ? m - 1 : y", "m - 1"),
}  # fmt: skip


@pytest.mark.whole
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_mutant_is_killed(monkeypatch, tmp_path, name):
    mutate_c(monkeypatch, tmp_path, compiled, *COMPILED[name])
    with pytest.raises(AssertionError):
        gate()


def test_there_are_enough_mutants():
    assert len(MUTANTS) >= 15
    assert len(COMPILED) >= 15
