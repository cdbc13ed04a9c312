"""Compile the fused kernels ahead of time, for any target on any machine, and read what came out.

Registers, stack, spills and tensor-core instructions are read from the machine code (NVIDIA:
cuobjdump of the triton wheel; AMD: the metadata of the assembly), compiled with the divisibility
hints of aligned tensors. `opsdc_kernels.audit` is the command, which audits the row pass too.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from typing import Any, NamedTuple

from opsdc_kernels.fused.configs import SHARED_MEMORY_LIMIT, Config, config_for
from opsdc_kernels.fused.cost import DEVICES, SIZES, Cost, Kernel
from opsdc_kernels.triton.launch import ENABLE_FP_FUSION

TENSOR_INSTRUCTIONS = {
    "sm_80": "HMMA",
    "sm_90": "HGMMA",
    "sm_100": "UTCHMMA",
    "sm_120": "HMMA",
    "gfx942": "v_mfma",
}


@dataclass(frozen=True, slots=True)
class Case:
    """One specialization of one kernel."""

    kernel: str
    """One of statistics | jsd | gradient, or of the row pass rows_statistics | rows_gradient."""
    dtype: str
    """One of bf16 | fp16 | fp32."""
    divergence: int = 0
    """The number in `problem.DIVERGENCES`."""
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
    Case("statistics", "fp16"),
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
    Case("gradient", "bf16", shared=True),
    Case("gradient", "bf16", divergence=1, shared=True),
    Case("gradient", "bf16", divergence=2),
    Case("gradient", "bf16", divergence=2, shared=True),
    Case("gradient", "bf16", divergence=1, biased=True),
    Case("gradient", "fp16", divergence=2, shared=True, capped=True),
    Case("gradient", "fp32", divergence=2, capped=True, biased=True),
)


@dataclass(frozen=True, slots=True)
class Report:
    """One case on one target as the compiler made it. Times in ms, sizes in bytes."""

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
    """Read from L2."""
    intensity: float
    """FLOP per byte from L2."""
    forecast_ms: tuple[float, ...]
    """One pass at each of `cost.SIZES`."""
    bound_by: str
    """Of the first one: tensor | memory | l2."""
    of_products: float
    """The first forecast over that of its products alone; 0 without products."""
    passed: bool


class Work(NamedTuple):
    """The arithmetic and traffic of a kernel."""

    flop: int
    """Per step of a tile."""
    loaded: int
    """Bytes per step of a tile, from L2."""
    costs: tuple[Cost, ...]
    """Of one pass at each of `cost.SIZES`."""


def audit(case: Case, target: str, config: Config | None = None) -> Report:
    """Compile one case for one target, with its shipped configuration unless another is given."""
    from opsdc_kernels.fused import backward, forward

    kernel = {
        "statistics": forward.statistics_kernel,
        "jsd": forward.jsd_kernel,
        "gradient": backward.gradient_kernel,
    }[case.kernel]
    if config is None:
        # The JSD's gradient is tiled like its second pass.
        name = "jsd" if case.divergence == 2 and case.kernel == "gradient" else case.kernel
        extras = case.capped or case.biased or case.targets
        config = config_for(
            name, target, case.dtype, shared=case.shared, extras=extras,
            by_teacher=case.divergence == 1,
        )  # fmt: skip
    return compiled_report(kernel, case, target, config._asdict(), _work(case, target, config))


def compiled_report(
    kernel: Any, case: Case, target: str, config: dict[str, int], work: Work
) -> Report:
    """Compile a kernel for a target and read the machine code.

    Raises:
        RuntimeError: `TRITON_INTERPRET` is set; then triton cannot compile in this process.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("the audit compiles kernels; unset TRITON_INTERPRET and run it again")
    compiled = _compile(kernel, case, target, config)
    read = _read_amd if target.startswith("gfx") else _read_nvidia
    registers, spill, stack, count = read(compiled.asm, TENSOR_INSTRUCTIONS[target])
    limit, shared = SHARED_MEMORY_LIMIT[target], compiled.metadata.shared
    first = work.costs[0]
    tensor_missing = case.dtype != "fp32" and count == 0
    return Report(
        case=str(case),
        target=target,
        config="x".join(str(x) for x in config.values()),
        registers=registers,
        spill_bytes=spill,
        stack_bytes=stack,
        shared_bytes=shared,
        shared_limit=limit,
        tensor_instruction=TENSOR_INSTRUCTIONS[target],
        tensor_count=count,
        flop_per_tile=work.flop,
        bytes_per_tile=work.loaded,
        intensity=round(work.flop / work.loaded, 1),
        forecast_ms=tuple(round(cost.milliseconds, 1) for cost in work.costs),
        bound_by=first.bound_by,
        of_products=round(first.milliseconds / first.tensor, 2) if first.tensor else 0.0,
        passed=spill == 0 and shared <= limit and not tensor_missing,
    )


def _compile(kernel: Any, case: Case, target: str, config: dict[str, int]) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    # What is fixed at compile time: tile sizes and the case.
    options = dict(config)
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
    # The other arguments by type, with the hints of aligned pointers and sizes; parts of a tuple
    # have paths of their own.
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
    return triton.compile(ASTSource(kernel, types, fixed, hints), target=gpu, options=launch)


def _argument_type(name: str, case: Case) -> Any:
    from opsdc_kernels.triton.logits import SideOfTriton

    data, split = "*" + case.dtype, case.shared and case.dtype != "fp32"
    heads = "constexpr" if case.kernel.startswith("rows") else data
    if name in ("student", "teacher"):
        difference = name == "teacher" and case.shared
        return SideOfTriton(
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
    """Return (registers, spilled bytes, stack bytes, tensor instructions)."""
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
    resources = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if resources is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {usage[:200]!r}")
    widths = re.findall(r"\bSTL(?:\.(64|128))?\b", code)
    spill = sum(int(width or 32) // 8 for width in widths)
    return int(resources[1]), spill, int(resources[2]), len(re.findall(rf"\b{instruction}\b", code))


def _read_amd(asm: dict[str, Any], instruction: str) -> tuple[int, int, int, int]:
    text = asm["amdgcn"]

    def field(name: str) -> int:
        match = re.search(rf"\.{name}:\s+(\d+)", text)
        if match is None:
            raise RuntimeError(f"the assembly has no {name}")
        return int(match[1])

    spill = 4 * field("vgpr_spill_count")  # scalar registers spill into lanes, not memory
    count = len(re.findall(rf"\b{instruction}", text))
    return field("vgpr_count"), spill, field("private_segment_fixed_size"), count


def _work(case: Case, target: str, config: Config) -> Work:
    item = 4 if case.dtype == "fp32" else 2
    kernel = Kernel.of(case.kernel, shared=case.shared, item=item)
    costs = tuple(kernel.cost(config, DEVICES[target], size) for size in SIZES)
    return Work(kernel.step_flop(config), kernel.step_bytes(config), costs)
