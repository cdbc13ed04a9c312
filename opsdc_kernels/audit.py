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
from importlib.metadata import version
from typing import Any

import torch

from opsdc_kernels import auto
from opsdc_kernels.fused import audit as fused
from opsdc_kernels.fused.audit import QUICK, Case, Report, Work
from opsdc_kernels.fused.configs import Config
from opsdc_kernels.fused.cost import (
    DEVICES,
    SIZES,
    STREAMED,
    SUSTAINED,
    product_cost,
    streaming_cost,
)
from opsdc_kernels.triton.launch import ROWS

CASES = (
    *fused.CASES,
    Case("rows_statistics", "fp32", targets=True),
    Case("rows_statistics", "fp32", divergence=2, biased=True),
    Case("rows_statistics", "fp32", divergence=2, shared=True, capped=True),
    Case("rows_gradient", "fp32", divergence=2, shared=True, capped=True),
)
MODES = {
    "trainable head": (True, True),
    "frozen head": (False, True),
    "forward only": (False, False),
}
"""(trainable, with gradient)."""
SCRATCH = 2 << 30
"""Bytes: about the default of a GPU of 141 GB."""
ASSUMPTIONS = (
    "Milliseconds are forecasts of one pass of the kernel, by bf16, at "
    + "; ".join(map(str, SIZES))
    + f": the largest of its products at {SUSTAINED:.0%} of the vendor's TFLOP/s (what a library's "
    f"large products reach), its bytes from memory at {STREAMED:.0%} of the vendor's TB/s, and its "
    "bytes from L2 at the rate measured for that. Weights are read from memory once per group of "
    "row blocks, hidden states once, and every tile reads both from L2. 'bound by' names the "
    "largest, 'of GEMM' is the first forecast over that of the products alone. What a tile does "
    "with its logits after its products is not counted. MFLOP and KiB are of one step of BK hidden "
    "units. Row passes have no product: their bytes are two fp32 logits per column and pass."
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
    per_logit = 4 * (2 * reads + (case.kernel == "rows_gradient"))
    costs = tuple(
        streaming_cost(DEVICES[target], per_logit * size.tokens * size.vocab_size) for size in SIZES
    )
    work = Work(0, 2 * 4 * ROWS.BV, costs)
    return fused.compiled_report(kernel, case, target, ROWS._asdict(), work)


def calls(target: str) -> list[dict[str, Any]]:
    """Forecasts of whole calls, forward and backward, by both backends: bf16, two heads, 2 GiB of
    scratch."""
    found = []
    for size in SIZES:
        for mode, (trainable, gradient) in MODES.items():
            call = auto.Call(
                tokens=size.tokens, vocab_size=size.vocab_size, dims=(size.dim, size.dim),
                dtype=torch.bfloat16, device=torch.device("cuda"), trainable=trainable,
                gradient=gradient, divergence="reverse_kl", shared_head=False, recomputes=False,
                extras=False, rows=min(SCRATCH // (8 * size.vocab_size), size.tokens),
                workspace_bytes=SCRATCH,
            )  # fmt: skip
            products = 2 + gradient + trainable
            floor = products * product_cost(DEVICES[target], size, 2).milliseconds
            times = {
                "chunked": auto.chunked_ms(call, DEVICES[target]),
                "fused": auto.fused_ms(call, DEVICES[target], target),
            }
            found.append({
                "target": target, "size": str(size), "mode": mode, "products_ms": round(floor, 1),
                **{f"{name}_ms": round(ms, 1) for name, ms in times.items()},
                **{f"{name}_of_products": round(ms / floor, 2) for name, ms in times.items()},
            })  # fmt: skip
    return found


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
        record = {
            "assumptions": ASSUMPTIONS,
            "devices": {target: DEVICES[target]._asdict() for target in options.target},
            "sizes": [size._asdict() for size in SIZES],
            "calls": [call for target in options.target for call in calls(target)],
            "torch": torch.__version__,
            "triton": version("triton"),
        }
        print(json.dumps({**record, "reports": [asdict(x) for x in reports]}, indent=1))
    else:
        print(f"\n{ASSUMPTIONS}")
        for target in options.target:
            at = DEVICES[target]
            print(
                f"{target}: {at.name}, {at.half} TFLOP/s 16-bit, {at.single} fp32, TB/s: "
                f"{at.memory} from memory, {at.l2} from L2 ({at.l2_source})"
            )
            for call in calls(target):
                print(
                    f"  {call['size']}, {call['mode']}: products {call['products_ms']} ms, chunked "
                    f"{call['chunked_ms']} ({call['chunked_of_products']} times), fused "
                    f"{call['fused_ms']} ({call['fused_of_products']} times)"
                )
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
        "ms at the three sizes": "".join(f"{x:8.1f}" for x in report.forecast_ms),
        "of GEMM": f"{report.of_products:7.2f}" if report.of_products else "      –",
        "bound by": f"{report.bound_by:8}",
        "": "ok" if report.passed else "FAILED",
    }
    line = "  ".join(columns.values())
    if not header:
        return line
    return "  ".join(f"{name:{len(x)}}" for name, x in columns.items()) + "\n" + line


if __name__ == "__main__":
    sys.exit(main())
