"""GEMM units that the planner foretells beside those that a call makes.

    python -m benchmarks.planned

Counted by torch's profiler: every matrix product in forward and backward, by its operands' sizes.
(Peak bytes stand beside their forecast in `benchmarks.memory`.)
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from torch.profiler import ProfilerActivity, profile

from benchmarks.contenders import contenders, default_device
from benchmarks.inputs import Shape, inputs
from benchmarks.speed import MODES, call_of
from opsdc_kernels import plan

SHAPE = Shape(tokens=512, dim=128, vocab_size=8192)


@dataclass(frozen=True, slots=True)
class Units:
    mode: str
    planned: int
    counted: float

    def __str__(self) -> str:
        return f"{self.mode:<15}planned {self.planned} GEMM units, counted {self.counted:.3f}"


def measure() -> list[Units]:
    """Ours in every mode; prints each line."""
    device = default_device()
    case = inputs(SHAPE, device=device)
    ours = contenders(device)[0][0]
    sizes = asdict(SHAPE)
    found = []
    for mode in MODES:
        planned = plan.estimate(
            tokens=sizes["tokens"],
            vocab_size=sizes["vocab_size"],
            student_dim=sizes["dim"],
            device=device,
            trainable_head=mode == "trainable head",
            gradient=mode != "forward only",
        ).gemm_units
        call = call_of(ours, case, mode)
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
            call()
        flop = sum(_flop(event.name, event.input_shapes) for event in profiler.events())
        found.append(Units(mode, planned, flop / SHAPE.unit_flop))
        print(found[-1], flush=True)
    return found


def _flop(operation: str, shapes: list[list[int]]) -> int:
    """Of one event; its first factor comes first, or second where a product is added up."""
    first = {"aten::mm": 0, "aten::addmm": 1, "aten::addmm_": 1}.get(operation)
    if first is None:
        return 0
    (rows, inner), (_, columns) = shapes[first : first + 2]
    return 2 * rows * inner * columns


if __name__ == "__main__":
    measure()
