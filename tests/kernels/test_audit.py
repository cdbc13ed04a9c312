"""`python -m opsdc_kernels.audit`: the fused kernels and those of the row pass, on every target."""

import json

import pytest

from opsdc_kernels.audit import CASES, DEVICES, QUICK, audit, main
from opsdc_kernels.fused import audit as fused

ROW_PASS = [case for case in CASES if case not in fused.CASES]


def test_a_row_pass_is_audited_too():
    report = audit(ROW_PASS[0], "sm_90")
    assert report.case.startswith("rows_statistics")
    assert report.passed


@pytest.mark.slow
@pytest.mark.parametrize("target", DEVICES)
@pytest.mark.parametrize("case", ROW_PASS, ids=str)
def test_every_kernel_of_the_row_pass(case, target):
    report = audit(case, target)
    assert report.spill_bytes == report.stack_bytes == 0
    assert 0 < report.registers <= 512
    assert report.passed


def test_command_line_writes_json(capsys):
    assert main(["--quick", "--json", "--target", "gfx942"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert [x["target"] for x in record["reports"]] == ["gfx942"] * len(QUICK)
    assert "8192" in record["assumptions"]
