"""The speed contest as a pytest-benchmark suite, with a gate that holds on a busy machine too.

    pytest benchmarks --benchmark-autosave
    pytest benchmarks --benchmark-compare

The gate holds our time in units of the bare GEMM measured in the same test, so a slower machine
does not fail it; a lost GEMM or a doubled row pass does.
"""

from __future__ import annotations

import statistics

import pytest

from benchmarks.contenders import contenders, default_device
from benchmarks.inputs import Shape, inputs
from benchmarks.speed import MODES, bare_gemm, call_of, seconds

SHAPE = Shape(tokens=256, dim=512, vocab_size=16384)
LARGEST_UNITS = {"trainable head": 6.5, "frozen head": 5.5, "forward only": 4.5}
"""About 1.4 times what a quiet two-core machine needs at this small size."""

DEVICE = default_device()
RUNNING = [c for c in contenders(DEVICE)[0] if not c.compiled]


@pytest.fixture(scope="module")
def case():
    return inputs(SHAPE, device=DEVICE)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("contender", RUNNING, ids=lambda c: c.name)
def test_time(benchmark, case, contender, mode):
    if contender.other_loss and mode != MODES[0]:
        pytest.skip("a cross entropy is a point of reference in one mode")
    call = call_of(contender, case, mode)
    benchmark.group = mode
    benchmark.pedantic(call, rounds=5, warmup_rounds=1)


@pytest.mark.parametrize("mode", MODES)
def test_our_units_have_not_grown(case, mode):
    gemm, call = bare_gemm(case), call_of(RUNNING[0], case, mode)
    gemm()
    call()
    ratios = []
    for _ in range(9):
        before = seconds(gemm, DEVICE)
        spent = seconds(call, DEVICE)
        ratios.append(2 * spent / (before + seconds(gemm, DEVICE)))
    # The quarter of the runs that was least disturbed.
    assert statistics.quantiles(ratios)[0] < LARGEST_UNITS[mode]
