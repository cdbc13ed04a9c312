"""Compiles the shipped Triton kernels for five targets, on any machine, and prints what came out.

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
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from math import ceil
from typing import Any

import torch

from opsdc_kernels.fused.configs import (
    ENABLE_FP_FUSION,
    ROWS,
    SHARED_MEMORY_LIMIT,
    Config,
    RowsConfig,
    config_for,
)

QWEN3_8B_HEAD = {"N": 8192, "D": 4096, "V": 151936}
# target: (device, dense 16-bit TFLOP/s with fp32 sums, fp32 TFLOP/s, TB/s), vendors' figures
DEVICES = {
    "sm_80": ("A100 80GB SXM", 312.0, 19.5, 2.04),
    "sm_90": ("H100 SXM", 989.0, 67.0, 3.35),
    "sm_100": ("B200", 2250.0, 75.0, 8.0),
    "sm_120": ("RTX 5090", 209.5, 104.8, 1.79),
    "gfx942": ("MI300X", 1307.0, 163.4, 5.3),
}
TENSOR_INSTRUCTIONS = {
    "sm_80": "HMMA",
    "sm_90": "HGMMA",
    "sm_100": "UTCHMMA",
    "sm_120": "HMMA",
    "gfx942": "v_mfma",
}
ASSUMPTIONS = (
    "Roofline: one pass of the kernel over a Qwen3-8B head (N 8192, D 4096, V 151936) at the "
    "larger of FLOP / peak and bytes / bandwidth; weights are read from memory once per group of "
    "row blocks, hidden states once per group, the gradient tile is written once. FLOP and bytes "
    "per tile are those of one step of BK hidden units, bytes being what the tile loads from L2. "
    "Row passes have no GEMM: their bytes are two fp32 logits per column and pass."
)


@dataclass(frozen=True, slots=True)
class Case:
    """One specialization of one kernel."""

    kernel: str
    """statistics | jsd | gradient (with head GEMMs) | rows_statistics | rows_gradient (without)"""
    dtype: str
    """bf16 | fp16 | fp32"""
    divergence: int = 0
    """0 reverse KL, 1 forward KL, 2 JSD."""
    shared: bool = False
    capped: bool = False
    """Soft-cap on both sides."""
    biased: bool = False
    """Biases, so that -inf logits are possible; the gradient kernel then sums the bias gradient."""
    targets: bool = False

    def __str__(self) -> str:
        names = ("reverse", "forward", "jsd")[self.divergence], "shared" if self.shared else ""
        flags = [name for name in ("capped", "biased", "targets") if getattr(self, name)]
        return " ".join([self.kernel, self.dtype, *(x for x in (*names, *flags) if x)])


QUICK = (Case("statistics", "bf16"), Case("gradient", "bf16"))
CASES = (
    *QUICK,
    Case("statistics", "bf16", divergence=1),
    Case("statistics", "bf16", shared=True),
    Case("statistics", "bf16", divergence=1, shared=True),
    Case("statistics", "bf16", divergence=1, biased=True, targets=True),
    Case("statistics", "fp16", shared=True, capped=True, targets=True),
    Case("statistics", "fp32", targets=True),
    Case("statistics", "fp32", shared=True, capped=True),
    Case("jsd", "bf16", divergence=2),
    Case("jsd", "bf16", divergence=2, shared=True),
    Case("jsd", "bf16", divergence=2, biased=True),
    Case("jsd", "bf16", divergence=2, shared=True, capped=True),
    Case("jsd", "fp32", divergence=2, capped=True),
    Case("gradient", "bf16", divergence=1),
    Case("gradient", "bf16", divergence=1, shared=True),
    Case("gradient", "bf16", divergence=2),
    Case("gradient", "bf16", divergence=2, shared=True),
    Case("gradient", "bf16", divergence=1, biased=True),
    Case("gradient", "fp16", divergence=2, shared=True, capped=True),
    Case("gradient", "fp32", divergence=2, capped=True, biased=True),
    Case("rows_statistics", "fp32", targets=True),
    Case("rows_statistics", "fp32", divergence=2, biased=True),
    Case("rows_statistics", "fp32", divergence=2, shared=True, capped=True),
    Case("rows_gradient", "fp32", divergence=2, shared=True, capped=True),
)


@dataclass(frozen=True, slots=True)
class Report:
    """What the compiler made of one case on one target. Times in ms, sizes in bytes."""

    case: str
    target: str
    config: str
    registers: int
    spill_bytes: int
    stack_bytes: int
    shared_bytes: int
    shared_limit: int
    tensor_instruction: str
    tensor_count: int
    flop_per_tile: int
    bytes_per_tile: int
    intensity: float
    roofline_ms: float
    passed: bool


def audit(case: Case, target: str, config: Config | RowsConfig | None = None) -> Report:
    """Compiles one case for one target, with its shipped configuration unless another is given.

    Raises:
        RuntimeError: `TRITON_INTERPRET` is set; then triton cannot compile in this process.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("the audit compiles kernels; unset TRITON_INTERPRET and run it again")
    if config is None and case.kernel.startswith("rows"):
        config = ROWS
    elif config is None:
        # The JSD's gradient is tiled like its second pass.
        kernel = "jsd" if case.divergence == 2 else case.kernel
        kernel = "statistics" if case.kernel == "statistics" else kernel
        extras = case.capped or case.biased or case.targets
        config = config_for(kernel, target, case.dtype, shared=case.shared, extras=extras)
    compiled = _compile(case, target, config)
    read = _read_amd if target.startswith("gfx") else _read_nvidia
    registers, spill, stack, count = read(compiled.asm, TENSOR_INSTRUCTIONS[target])
    flop, loaded, roofline = _work(case, target, config)
    limit = SHARED_MEMORY_LIMIT[target]
    tensor_missing = case.dtype != "fp32" and count == 0
    return Report(
        case=str(case),
        target=target,
        config="x".join(str(x) for x in config),
        registers=registers,
        spill_bytes=spill,
        stack_bytes=stack,
        shared_bytes=compiled.metadata.shared,
        shared_limit=limit,
        tensor_instruction=TENSOR_INSTRUCTIONS[target],
        tensor_count=count,
        flop_per_tile=flop,
        bytes_per_tile=loaded,
        intensity=round(flop / loaded, 1),
        roofline_ms=round(roofline, 2),
        passed=spill == 0 and compiled.metadata.shared <= limit and not tensor_missing,
    )


def _compile(case: Case, target: str, config: Config | RowsConfig) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from opsdc_kernels.fused import backward, forward
    from opsdc_kernels.row_pass import kernels as rows

    kernel = {
        "statistics": forward.statistics_kernel,
        "jsd": forward.jsd_kernel,
        "gradient": backward.gradient_kernel,
        "rows_statistics": rows.rows_statistics_kernel,
        "rows_gradient": rows.rows_gradient_kernel,
    }[case.kernel]
    options = config._asdict()
    launch: dict[str, Any] = {
        name: options.pop(name) for name in ("num_warps", "num_stages") if name in options
    }
    launch["enable_fp_fusion"] = ENABLE_FP_FUSION
    constants = {
        **options,
        "SHARED": case.shared,
        "BASE_TEACHER": case.divergence == 1,
        "DIVERGENCE": case.divergence,
        "MASKED": case.biased and not case.shared and not case.capped,
        "EVEN": True,
        "UPCAST": False,
    }
    types: dict[str, Any] = {}
    fixed: dict[tuple[int, ...], Any] = {}
    hints: dict[tuple[int, ...], Any] = {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            types[name], fixed[i,] = "constexpr", constants[name]
            continue
        types[name] = kind = _argument_type(name, case)
        parts = (
            [((i, j), x) for j, x in enumerate(kind)] if isinstance(kind, tuple) else [((i,), kind)]
        )
        for path, part in parts:
            if part == "constexpr":
                fixed[path] = None
            elif part.startswith("*") or (part == "i32" and (len(path) == 2 or name == "V")):
                hints[path] = [["tt.divisibility", 16]]
    gpu = GPUTarget("hip", target, 64) if target.startswith("gfx") else None
    gpu = gpu or GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    return triton.compile(
        ASTSource(kernel, types, fixed, hints),
        target=gpu,
        options=launch,
    )


def _argument_type(name: str, case: Case) -> Any:
    from opsdc_kernels.fused.logit_tiles import Side

    data, split = "*" + case.dtype, case.shared and case.dtype != "fp32"
    heads = "constexpr" if case.kernel.startswith("rows") else data
    if name in ("student", "teacher"):
        difference = name == "teacher" and case.shared
        return Side(
            hidden=heads,
            low=data if difference and split else "constexpr",
            factor="*fp32" if difference and split else "constexpr",
            weight=heads,
            bias=data if case.biased and not difference else "constexpr",
            hidden_stride="i32",
            weight_stride="i32",
            D="i32",
            pre="fp32",
            post="fp32" if case.capped else "constexpr",
        )
    optional = {
        "target_ptr": "*i64" if case.targets else "constexpr",
        "residual_ptr": "constexpr" if case.dtype == "fp32" else "*fp32",
        "dbias_ptr": "*fp32" if case.biased else "constexpr",
        "dz_ptr": data,
        "beta": "fp32",
    }
    return optional.get(name, "*fp32" if name.endswith("_ptr") else "i32")


def _read_nvidia(asm: dict[str, Any], instruction: str) -> tuple[int, int, int, int]:
    """(registers, spilled bytes, stack bytes, tensor instructions)."""
    import triton

    tool = os.path.join(os.path.dirname(triton.__file__), "backends/nvidia/bin/cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run(
                [tool, flag, file.name], capture_output=True, text=True, check=True
            ).stdout
            for flag in ("-res-usage", "-sass")
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {usage[:200]!r}")
    widths = re.findall(r"\bSTL(?:\.(64|128))?\b", code)
    spill = sum(int(width or 32) // 8 for width in widths)
    return int(found[1]), spill, int(found[2]), len(re.findall(rf"\b{instruction}\b", code))


def _read_amd(asm: dict[str, Any], instruction: str) -> tuple[int, int, int, int]:
    text = asm["amdgcn"]

    def field(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        if found is None:
            raise RuntimeError(f"the assembly has no {name}")
        return int(found[1])

    spill = 4 * field("vgpr_spill_count")  # scalar registers spill into lanes, not memory
    count = len(re.findall(rf"\b{instruction}", text))
    return field("vgpr_count"), spill, field("private_segment_fixed_size"), count


def _work(case: Case, target: str, config: Config | RowsConfig) -> tuple[int, int, float]:
    """(FLOP and loaded bytes of one step of a tile, roofline ms of the Qwen3-8B head)."""
    wide = 4 if case.dtype == "fp32" else 2
    N, D, V = QWEN3_8B_HEAD.values()
    _, half, single, bandwidth = DEVICES[target]
    if isinstance(config, RowsConfig):
        reads = 2 if case.kernel == "rows_statistics" and case.divergence == 2 else 1
        moved = N * V * wide * (2 * reads + (case.kernel == "rows_gradient"))
        return 0, 2 * wide * config.BV, moved / (1e9 * bandwidth)
    BM, BN, BK = config.BM, config.BN, config.BK
    products = 3 if case.shared and wide == 2 else 2
    weights = 1 if case.shared else 2
    groups = ceil(ceil(N / BM) / config.GROUP)
    moved = wide * D * (weights * V * groups + products * N)
    moved += wide * N * V if case.kernel == "gradient" else 0
    peak = 1e9 * (single if wide == 4 else half)
    roofline = max(products * 2 * N * D * V / peak, moved / (1e9 * bandwidth))
    return products * 2 * BM * BN * BK, wide * BK * (products * BM + weights * BN), roofline


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
