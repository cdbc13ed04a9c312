"""`columns` as a custom operator: that of `chunked`, and what leaving columns out did."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, library

from opsdc_kernels.chunked.op import RESULTS, fake_outputs, outputs, register_backward, row_weight
from opsdc_kernels.chunked.run import run_chunks
from opsdc_kernels.columns.bounded import Realised, run_bounded
from opsdc_kernels.columns.unbiased import Estimated, run_unbiased
from opsdc_kernels.problem import SCHEMA, GradientsWanted, Problem, named


def columns_divergence(problem: Problem) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and, if asked for, the tensors of `DivergenceStats`."""
    loss, values, _, _, _, *realised = _forward(*problem.arguments, problem.wanted)
    if not problem.options.return_stats:
        return loss, {}
    fields = Realised._fields if problem.options.columns == "bounded" else Estimated._fields
    return loss, named(values) | {
        name: x.detach() for name, x in zip(fields, realised, strict=True)
    }


@library.custom_op(
    "opsdc_kernels::columns_forward",
    mutates_args=(),
    schema=f"({SCHEMA}, bool[] wanted) -> ({RESULTS}{', Tensor' * len(Realised._fields)})",
)
def _forward(*inputs: Any) -> tuple[Tensor, ...]:
    problem, wanted = Problem.of(inputs[:-1]), GradientsWanted(*inputs[-1])
    call = (problem, wanted, row_weight(problem), problem.kept_tokens())
    with torch.autocast(problem.student_hidden.device.type, enabled=False):
        realised: Realised | Estimated
        if wanted:
            run = run_bounded if problem.options.columns == "bounded" else run_unbiased
            result, realised = run(*call)
        else:  # nothing that a tolerance of the gradients could save
            result = run_chunks(*call)
            realised = Realised.exact(result, gemm_units=2)
        return *outputs(problem, result), *realised


@_forward.register_fake
def _forward_fake(*inputs: Any) -> tuple[Tensor, ...]:
    problem = Problem.of(inputs[:-1])
    new = problem.student_hidden.new_empty(0, dtype=problem.dtype)
    tokens = problem.student_hidden.shape[0]
    shapes = [tokens] * 2 + [()] * 4
    return (*fake_outputs(problem, inputs[-1]), *(new.new_empty(shape) for shape in shapes))


register_backward(_forward)
