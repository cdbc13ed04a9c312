"""Wrong variants of the chunks, their products and the operator, each of which the gate rejects."""

from dataclasses import replace

import pytest
import torch
from helpers.kernel_gate import N, gate, prepare

from opsdc_kernels import products
from opsdc_kernels.chunked import op as chunked_op
from opsdc_kernels.chunked.run import run_chunks
from opsdc_kernels.row_pass import build


@pytest.fixture(scope="module", autouse=True)
def truths():
    prepare()


def phantom_vocabulary_tail():
    def mutant(problem, *args, **options):
        whole = replace(problem, options=replace(problem.options, vocab_size=None))
        return run_chunks(whole, *args, **options)

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
    "zero dW": zero_weight_gradient,
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
