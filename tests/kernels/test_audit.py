"""`python -m opsdc_kernels.audit`: the fused kernels and those of the row pass, on every target."""

import json

import pytest

from opsdc_kernels.audit import CASES, QUICK, audit, main
from opsdc_kernels.fused import audit as fused
from opsdc_kernels.fused.cost import DEVICES, SIZES

ROW_PASS = [case for case in CASES if case not in fused.CASES]


def test_a_row_pass_is_audited_too():
    report = audit(ROW_PASS[0], "sm_90")
    assert report.case.startswith("rows_statistics")
    assert report.passed
    # Two fp32 logits are read per column.
    logits = SIZES[0].tokens * SIZES[0].vocab_size
    assert report.forecast_ms[0] == pytest.approx(8 * logits / (0.9 * 3.35e12) * 1e3, rel=0.02)
    assert report.bound_by == "memory"


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
    assert [tuple(size.values()) for size in record["sizes"]] == [tuple(size) for size in SIZES]
    assert len(record["calls"]) == 3 * len(SIZES)
    for call in record["calls"]:
        assert call["products_ms"] < call["chunked_ms"]
        # A pass of wide tiles may be bound by its products alone.
        assert call["products_ms"] <= call["fused_ms"]
    for report in record["reports"]:
        assert len(report["forecast_ms"]) == len(SIZES)
        assert report["of_products"] >= 1
