"""Shipped Triton configurations compile for every target without spilling a register."""

import pytest

from opsdc_kernels.fused.audit import CASES, QUICK, TENSOR_INSTRUCTIONS, audit
from opsdc_kernels.fused.configs import Config
from opsdc_kernels.fused.cost import DEVICES


def check(report):
    assert report.spill_bytes == 0, report
    assert report.stack_bytes == 0, report
    assert 0 < report.registers <= 512, report
    assert report.shared_bytes <= report.shared_limit, report
    assert report.passed


@pytest.mark.parametrize("target", DEVICES)
def test_the_main_kernel_of_each_target(target):
    report = audit(QUICK[0], target)
    check(report)
    assert report.tensor_instruction == TENSOR_INSTRUCTIONS[target]
    assert report.tensor_count > 0


@pytest.mark.slow
@pytest.mark.parametrize("target", DEVICES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_kernel_of_each_target(case, target):
    check(audit(case, target))


def test_a_configuration_that_spills_fails():
    report = audit(QUICK[1], "sm_90", Config(256, 128, 32, 1, 16, 4, 2))
    assert report.spill_bytes > 0
    assert not report.passed


def test_refused_under_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        audit(QUICK[0], "sm_90")
