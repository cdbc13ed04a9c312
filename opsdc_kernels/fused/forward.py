"""Forward kernels: both head GEMMs and the statistics of both distributions, no logit written.

The vocabulary is cut into PARTS; one program walks over the tiles of one part for one block of rows
and leaves FIELDS numbers per row. `combine_kernel` merges the parts from left to right, so the
result does not depend on how programs were scheduled. JSD needs both normalizers before its terms:
`jsd_kernel` is a second pass over the tiles (two more GEMM units).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from opsdc_kernels.fused.configs import Config
from opsdc_kernels.fused.heads import Heads
from opsdc_kernels.fused.logit_tiles import load_factor, product_tile, program_tile, slices
from opsdc_kernels.problem import Options, Stat
from opsdc_kernels.triton.launch import ENABLE_FP_FUSION
from opsdc_kernels.triton.logits import logits
from opsdc_kernels.triton.statistics import (
    FOR_GRADIENT,
    RESULTS,
    Mass,
    Statistics,
    at_target,
    empty_statistics,
    jsd_terms,
    merge,
    store_results,
    tile_statistics,
)

FIELDS = tl.constexpr(15)
"""`Statistics`, flat, then both logits of the target token."""
COMBINE_ROWS = 64


@triton.jit
def statistics_kernel(
    student, teacher, target_ptr, state_ptr, N, V, tiles_per_part, PARTS,
    SHARED: tl.constexpr, BASE_TEACHER: tl.constexpr, MASKED: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, SLICES: tl.constexpr, GROUP: tl.constexpr,
    EVEN: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Write state[part, field, row] of every part."""
    block, part = program_tile(N, BM, GROUP, PARTS)
    row0 = block * BM
    rows = row0 + tl.arange(0, BM)
    inside = rows < N
    stats = empty_statistics(BM)
    s_target = stats.student.peak
    t_target = stats.teacher.peak
    if target_ptr is not None:
        target = tl.load(target_ptr + rows, mask=inside, other=-1)
    begin = part * tiles_per_part
    factor = load_factor(teacher, row0, N, BM)
    for tile in range(begin, tl.minimum(begin + tiles_per_part, tl.cdiv(V, BN))):
        acc, acc_t = product_tile(
            student, teacher, row0, tile * BN, N, V, SHARED, BM, BN, BK, EVEN, UPCAST
        )
        acc, acc_t = slices(acc, SLICES), slices(acc_t, SLICES)
        for i in tl.static_range(SLICES):
            cols = tile * BN + i * (BN // SLICES) + tl.arange(0, BN // SLICES)
            s, t, d, _ = logits(student, teacher, acc[i], acc_t[i], factor, cols, V, SHARED)
            if target_ptr is not None:
                s_target = at_target(s_target, s, cols, target)
                t_target = at_target(t_target, t, cols, target)
            new = tile_statistics(s, t, d, cols, V, BASE_TEACHER, MASKED)
            stats = merge(stats, new, BASE_TEACHER, MASKED)
    out = state_ptr + tl.cast(part, tl.int64) * FIELDS * N + rows
    store_mass(out, N, stats.student, inside)
    store_mass(out + 5 * N, N, stats.teacher, inside)
    tl.store(out + 10 * N, stats.anchor, mask=inside)
    tl.store(out + 11 * N, stats.mean, mask=inside)
    tl.store(out + 12 * N, stats.kl, mask=inside)
    tl.store(out + 13 * N, s_target, mask=inside)
    tl.store(out + 14 * N, t_target, mask=inside)


@triton.jit
def store_mass(out, N, mass, inside):
    tl.store(out, mass.peak, mask=inside)
    tl.store(out + N, mass.joint, mask=inside)
    tl.store(out + 2 * N, mass.outside, mask=inside)
    tl.store(out + 3 * N, mass.moment, mask=inside)
    tl.store(out + 4 * N, mass.argmax.to(tl.float32), mask=inside)  # exact below 2**24


@triton.jit
def load_mass(state, N, inside):
    return Mass(
        tl.load(state, mask=inside, other=0.0),
        tl.load(state + N, mask=inside, other=0.0),
        tl.load(state + 2 * N, mask=inside, other=0.0),
        tl.load(state + 3 * N, mask=inside, other=0.0),
        tl.load(state + 4 * N, mask=inside, other=0.0).to(tl.int32),
    )


@triton.jit
def combine_kernel(state_ptr, out_ptr, N, PARTS, DIVERGENCE: tl.constexpr, BM: tl.constexpr):
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    inside = rows < N
    stats = empty_statistics(BM)
    s_target = stats.student.peak
    t_target = stats.teacher.peak
    for part in range(0, PARTS):
        state = state_ptr + tl.cast(part, tl.int64) * FIELDS * N + rows
        new = Statistics(
            load_mass(state, N, inside),
            load_mass(state + 5 * N, N, inside),
            tl.load(state + 10 * N, mask=inside, other=0.0),
            tl.load(state + 11 * N, mask=inside, other=0.0),
            tl.load(state + 12 * N, mask=inside, other=0.0),
        )
        stats = merge(stats, new, DIVERGENCE == 1, True)
        s_target = tl.maximum(s_target, tl.load(state + 13 * N, mask=inside, other=0.0))
        t_target = tl.maximum(t_target, tl.load(state + 14 * N, mask=inside, other=0.0))
    store_results(stats, s_target, t_target, out_ptr + rows, N, inside, DIVERGENCE)


@triton.jit
def jsd_kernel(
    student, teacher, lse_s_ptr, lse_t_ptr, anchor_ptr, offset_ptr, out_ptr, beta, N, V,
    tiles_per_part, PARTS,
    SHARED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    SLICES: tl.constexpr, GROUP: tl.constexpr, EVEN: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Write the sums of `jsd_terms` to out[0, part, row] and out[1, part, row]."""
    block, part = program_tile(N, BM, GROUP, PARTS)
    row0 = block * BM
    rows = row0 + tl.arange(0, BM)
    inside = rows < N
    beta = tl.cast(beta, tl.float32)
    lse_s = tl.load(lse_s_ptr + rows, mask=inside, other=0.0)
    lse_t = tl.load(lse_t_ptr + rows, mask=inside, other=0.0)
    anchor = tl.load(anchor_ptr + rows, mask=inside, other=0.0)
    offset = tl.load(offset_ptr + rows, mask=inside, other=0.0)
    value = tl.zeros([BM], tl.float32)
    mean = tl.zeros([BM], tl.float32)
    begin = part * tiles_per_part
    factor = load_factor(teacher, row0, N, BM)
    for tile in range(begin, tl.minimum(begin + tiles_per_part, tl.cdiv(V, BN))):
        acc, acc_t = product_tile(
            student, teacher, row0, tile * BN, N, V, SHARED, BM, BN, BK, EVEN, UPCAST
        )
        acc, acc_t = slices(acc, SLICES), slices(acc_t, SLICES)
        for i in tl.static_range(SLICES):
            cols = tile * BN + i * (BN // SLICES) + tl.arange(0, BN // SLICES)
            s, t, d, _ = logits(student, teacher, acc[i], acc_t[i], factor, cols, V, SHARED)
            more, more_mean = jsd_terms(s, t, d, lse_s, lse_t, anchor, offset, beta)
            value += more
            mean += more_mean
    out = out_ptr + tl.cast(part, tl.int64) * N + rows
    tl.store(out, value, mask=inside)
    tl.store(out + tl.cast(PARTS, tl.int64) * N, mean, mask=inside)


def forward(
    heads: Heads, target_ids_N: Tensor | None, options: Options, vocab_size: int
) -> tuple[Tensor, Tensor]:
    """Results [RESULTS, N] fp32 (see `store_results`) and, for JSD, the mean of `jsd_terms` [N]."""
    student, teacher, kind = heads.student, heads.teacher, options.kind
    n_rows, V = student.hidden.shape[0], vocab_size
    single = torch.empty((), dtype=torch.float32, device=student.hidden.device).new_empty
    by_teacher = options.divergence == "forward_kl"
    config = heads.config("statistics", extras=target_ids_N is not None, by_teacher=by_teacher)
    tiles_per_part, parts = vocabulary_parts(n_rows, V, config, heads.processors)
    state, results = single((parts, FIELDS.value, n_rows)), single((RESULTS, n_rows))
    statistics_kernel[(triton.cdiv(n_rows, config.BM) * parts,)](
        student, teacher, target_ids_N, state, n_rows, V, tiles_per_part, parts,
        BASE_TEACHER=by_teacher, MASKED=heads.masked,
        **heads.launch_options(config),
    )  # fmt: skip
    combine_kernel[(triton.cdiv(n_rows, COMBINE_ROWS),)](
        state, results, n_rows, parts,
        DIVERGENCE=kind, BM=COMBINE_ROWS, num_warps=1, enable_fp_fusion=ENABLE_FP_FUSION,
    )  # fmt: skip
    if options.divergence != "jsd":
        return results, torch.zeros_like(results[0])
    config = heads.config("jsd")
    tiles_per_part, parts = vocabulary_parts(n_rows, V, config, heads.processors)
    sums = single((2, parts, n_rows))
    normalizers = results[Stat.STUDENT_LOGSUMEXP], results[Stat.TEACHER_LOGSUMEXP]
    _, anchor, offset = results[FOR_GRADIENT]
    jsd_kernel[(triton.cdiv(n_rows, config.BM) * parts,)](
        student, teacher, *normalizers, anchor, offset, sums, options.beta,
        n_rows, V, tiles_per_part, parts, **heads.launch_options(config),
    )  # fmt: skip
    value, mean = sums.sum(1)
    results[Stat.DIVERGENCE] = value
    return results, mean


def vocabulary_parts(n_rows: int, V: int, config: Config, processors: int) -> tuple[int, int]:
    """Return (tiles per part, parts): enough parts to fill the device, in as few and full waves as
    can."""
    blocks = triton.cdiv(n_rows, config.BM)
    tiles = triton.cdiv(V, config.BN)
    least = triton.cdiv(processors, min(blocks, config.GROUP))

    def steps(parts: int) -> int:
        return triton.cdiv(blocks * parts, processors) * triton.cdiv(tiles, parts)

    parts = min(min(range(least, 4 * least), key=steps), tiles)
    tiles_per_part = triton.cdiv(tiles, parts)
    return tiles_per_part, triton.cdiv(tiles, tiles_per_part)
