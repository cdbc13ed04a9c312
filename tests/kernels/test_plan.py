"""The planner: what fits, what it costs, what `auto` picks."""

import itertools
import json

import pytest
import torch
from helpers.kernels import CPU, sizes_of

from opsdc_kernels import memory, plan
from opsdc_kernels.row_pass.threads import PANEL


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("v", [31, 1000, 49152, 151936])
def test_chunks_fit_the_workspace(dtype, v):
    for tokens, megabytes in itertools.product((1, 7, 513, 4096), (16, 64, 256, 1024)):
        budget = megabytes << 20
        of = sizes_of(v, (576, 576), dtype)
        if plan.scratch_bytes(1, of) > budget:
            continue
        rows = plan.chunk_rows(tokens, of, budget)
        assert 1 <= rows <= tokens
        assert plan.scratch_bytes(rows, of) <= budget


def test_chunks_are_about_equal():
    rows = plan.chunk_rows(1000, sizes_of(49152, (576, 576)), 320 << 20)
    chunks = -(-1000 // rows)
    assert 0 <= rows - 1000 // chunks <= PANEL  # full panels, but for the last chunk


def test_scratch_is_eight_bytes_per_logit_of_a_chunk():
    of = sizes_of(151936, (1024, 1024))
    more, less = plan.scratch_bytes(1024, of), plan.scratch_bytes(512, of)
    assert (more - less) / (512 * 151936) < 8.2


def test_a_workspace_too_small_for_a_row_names_the_need():
    of = sizes_of(5000, (64, 64))
    need = plan.scratch_bytes(1, of)
    with pytest.raises(ValueError, match=str(need)):
        plan.chunk_rows(9, of, need - 1)
    assert plan.chunk_rows(9, of, need) == 1


def test_default_is_from_total_memory_and_repeats():
    assert memory.default_workspace_bytes(CPU) == memory.default_workspace_bytes(CPU)
    assert 0 < memory.default_workspace_bytes(CPU) <= memory.CPU_WORKSPACE_CAP_BYTES


def test_auto_is_chunked_on_a_cpu_and_says_so():
    p = plan.estimate(tokens=2048, vocab_size=49152, student_dim=576)
    assert p.backend == "chunked"
    assert p.reason == "auto: chunked on a CPU"
    assert p.gemm_units == 4
    json.dumps(p.as_dict())
    for word in ("chunked", str(p.chunk_rows), "MiB", "4 GEMM units"):
        assert word in str(p)


@pytest.mark.parametrize(("options", "units"), [
    ({}, 4), ({"trainable_head": False}, 3), ({"gradient": False}, 2), ({"reduction": "none"}, 6),
    ({"reduction": "none", "trainable_head": False}, 3), ({"backend": "fused"}, 6),
    ({"backend": "fused", "trainable_head": False}, 5),
    ({"backend": "fused", "gradient": False}, 2), ({"backend": "reference"}, 4),
    ({"divergence": "jsd"}, 4), ({"backend": "fused", "divergence": "jsd"}, 8),
    ({"backend": "fused", "shared_head": True}, 6),
    ({"backend": "fused", "shared_head": True, "dtype": torch.bfloat16}, 8),
])  # fmt: skip
def test_cost_model(options, units):
    p = plan.estimate(tokens=100, vocab_size=1000, student_dim=64, **options)
    assert p.gemm_units == units


def test_frozen_head_saves_the_weight_gradient():
    given = {"tokens": 512, "vocab_size": 49152, "student_dim": 576}
    full = plan.estimate(**given)
    frozen = plan.estimate(**given, trainable_head=False)
    assert full.peak_bytes - frozen.peak_bytes == 4 * 49152 * 576
    half = [
        plan.estimate(**given, trainable_head=train, dtype=torch.bfloat16)
        for train in (True, False)
    ]
    assert half[0].peak_bytes - half[1].peak_bytes == (4 + 2) * 49152 * 576


def test_scratch_of_fused_is_its_gradient_tile():
    given = {"tokens": 4096, "vocab_size": 151936, "student_dim": 64, "dtype": torch.bfloat16,
             "backend": "fused", "trainable_head": False}  # fmt: skip
    tile = plan.estimate(**given, workspace_bytes=1 << 30)
    assert tile.chunk_rows == (1 << 30) // (2 * 151936)
    assert tile.workspace_bytes == 2 * 151936 * tile.chunk_rows
    assert plan.estimate(**given, gradient=False).workspace_bytes == 0
