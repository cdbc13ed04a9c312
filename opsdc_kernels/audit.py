"""Compile the shipped Triton kernels for five targets, on any machine, and print what came out.

    python -m opsdc_kernels.audit [--quick] [--json] [--target sm_90 ...]

No GPU is needed: the kernels are compiled ahead of time with the divisibility hints of aligned
tensors, and registers, stack, spills and tensor-core instructions are read from the machine code
(NVIDIA: cuobjdump of the triton wheel; AMD: the metadata of the assembly). Exit status 1 if a
kernel spills, exceeds the target's shared memory, or lacks the tensor-core instruction expected of
16-bit inputs. About 10 minutes on two cores the first time, afterwards from triton's cache.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict

import torch

from opsdc_kernels.fused import audit as fused
from opsdc_kernels.fused.audit import DEVICES, QUICK, QWEN3_8B_HEAD, Case, Report, Work
from opsdc_kernels.fused.configs import Config
from opsdc_kernels.triton.launch import ROWS

CASES = (
    *fused.CASES,
    Case("rows_statistics", "fp32", targets=True),
    Case("rows_statistics", "fp32", divergence=2, biased=True),
    Case("rows_statistics", "fp32", divergence=2, shared=True, capped=True),
    Case("rows_gradient", "fp32", divergence=2, shared=True, capped=True),
)
ASSUMPTIONS = (
    "Roofline: one pass of the kernel over a Qwen3-8B head (N 8192, D 4096, V 151936) at the "
    "larger of FLOP / peak and bytes / bandwidth; weights are read from memory once per group of "
    "row blocks, hidden states once per group, the gradient tile is written once. FLOP and bytes "
    "per tile are those of one step of BK hidden units, bytes being what the tile loads from L2. "
    "Row passes have no GEMM: their bytes are two fp32 logits per column and pass."
)


def audit(case: Case, target: str, config: Config | None = None) -> Report:
    """Compile one case for one target, with its shipped configuration unless another is given."""
    if not case.kernel.startswith("rows"):
        return fused.audit(case, target, config)
    from opsdc_kernels.row_pass import kernels

    kernel = {
        "rows_statistics": kernels.rows_statistics_kernel,
        "rows_gradient": kernels.rows_gradient_kernel,
    }[case.kernel]
    reads = 2 if case.kernel == "rows_statistics" and case.divergence == 2 else 1
    logits = QWEN3_8B_HEAD["N"] * QWEN3_8B_HEAD["V"]
    moved = 4 * logits * (2 * reads + (case.kernel == "rows_gradient"))
    work = Work(0, 2 * 4 * ROWS.BV, moved / (1e9 * DEVICES[target][-1]))
    return fused.compiled_report(kernel, case, target, ROWS._asdict(), work)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m opsdc_kernels.audit", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--target", nargs="+", choices=list(DEVICES), default=list(DEVICES))
    parser.add_argument("--quick", action="store_true", help="two representative kernels only")
    parser.add_argument("--json", action="store_true", help="one JSON document, no table")
    options = parser.parse_args(arguments)
    reports = []
    for target in options.target:
        for case in QUICK if options.quick else CASES:
            report = audit(case, target)
            reports.append(report)
            if not options.json:
                print(_line(report, header=len(reports) == 1), flush=True)
    if options.json:
        devices = {target: DEVICES[target] for target in options.target}
        record = {"assumptions": ASSUMPTIONS, "devices": devices, "torch": torch.__version__}
        print(json.dumps({**record, "reports": [asdict(x) for x in reports]}, indent=1))
    else:
        print(f"\n{ASSUMPTIONS}")
        for target in options.target:
            name, half, single, bandwidth = DEVICES[target]
            print(f"{target}: {name}, {half} TFLOP/s 16-bit, {single} fp32, {bandwidth} TB/s")
        failed = sum(not report.passed for report in reports)
        print(f"{len(reports)} kernels compiled, {failed} failed")
    return 0 if all(report.passed for report in reports) else 1


def _line(report: Report, header: bool) -> str:
    columns = {
        "target": f"{report.target:7}",
        "case": f"{report.case:40}",
        "BMxBNxBKxSLxGxWxST": f"{report.config:20}",
        "regs": f"{report.registers:5}",
        "spill": f"{report.spill_bytes:6}",
        "stack": f"{report.stack_bytes:6}",
        "shared/limit": f"{report.shared_bytes:7}/{report.shared_limit:<7}",
        "tensor": f"{report.tensor_instruction:>8} {report.tensor_count:4}",
        "MFLOP": f"{report.flop_per_tile / 1e6:6.2f}",
        "KiB": f"{report.bytes_per_tile / 1024:6.1f}",
        "FLOP/B": f"{report.intensity:7.1f}",
        "ms": f"{report.roofline_ms:8.2f}",
        "": "ok" if report.passed else "FAILED",
    }
    line = "  ".join(columns.values())
    if not header:
        return line
    return "  ".join(f"{name:{len(x)}}" for name, x in columns.items()) + "\n" + line


if __name__ == "__main__":
    sys.exit(main())
