"""Both heads as the kernels read them, and how they are launched on this device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from opsdc_kernels.fused.configs import INTERPRETER, Config, config_for, target_of
from opsdc_kernels.problem import Problem, Side
from opsdc_kernels.triton.launch import ENABLE_FP_FUSION, INTERPRETED
from opsdc_kernels.triton.logits import SideOfTriton
from opsdc_kernels.triton.scaling import power_of_two


@dataclass(frozen=True, kw_only=True, slots=True)
class Heads:
    student: SideOfTriton
    teacher: SideOfTriton
    """With a shared head its hidden states are the difference, teacher − student."""
    shared: bool
    masked: bool
    """A logit may be -inf on one side only: through a bias, where no soft-cap bounds it."""

    @classmethod
    def of(cls, problem: Problem, rows: Tensor | None) -> Heads:
        """`rows`: those kept, or None for all."""
        student_hidden, teacher_hidden = problem.student_hidden, problem.teacher_hidden
        if rows is not None:
            student_hidden, teacher_hidden = student_hidden[rows], teacher_hidden[rows]
        student = side(student_hidden, problem.student_weight, problem.side(0))
        if problem.shared_logits:
            high, low, factor = split_difference(student_hidden, teacher_hidden)
            teacher = side(high, problem.student_weight, problem.side(1))
            teacher = teacher._replace(low=low, factor=factor)
        else:
            weight = problem.teacher_weight
            weight = problem.student_weight if weight is None else weight
            teacher = side(teacher_hidden, weight, problem.side(1))
        open_ended = [x.bias is not None and x.post is None for x in (student, teacher)]
        return cls(
            student=student,
            teacher=teacher,
            shared=problem.shared_logits,
            masked=any(open_ended) and not problem.shared_logits,
        )

    @property
    def processors(self) -> int:
        """Programs that the device runs at once."""
        if INTERPRETED:
            return 3  # parts to combine, in tests
        return torch.cuda.get_device_properties(self.student.hidden.device).multi_processor_count

    def config(self, kernel: str, extras: bool = False, by_teacher: bool = False) -> Config:
        """Tile sizes, see `configs.config_for`; `extras`: targets or a bias gradient."""
        if INTERPRETED:
            return INTERPRETER
        hidden = self.student.hidden
        for side in (self.student, self.teacher):
            extras = extras or side.post is not None or side.bias is not None
        dtype = "fp32" if hidden.dtype == torch.float32 else "16-bit"
        target = target_of(hidden.device)
        return config_for(
            kernel, target, dtype, shared=self.shared, extras=extras, by_teacher=by_teacher
        )

    def launch_options(self, config: Config) -> dict[str, object]:
        """Constants and options of every kernel that computes logit tiles."""
        even = self.student.D % config.BK == 0 and self.teacher.D % config.BK == 0
        return {
            **config._asdict(),
            "SHARED": self.shared,
            "EVEN": even,
            "UPCAST": INTERPRETED,
            "enable_fp_fusion": ENABLE_FP_FUSION,
        }


def side(hidden: Tensor, weight: Tensor, its: Side) -> SideOfTriton:
    """Rows may lie apart, but within the int32 offsets of a tile; other layouts are copied."""
    hidden, weight = (
        x if x.stride(1) == 1 and 0 < x.stride(0) < 1 << 22 else x.contiguous()
        for x in (hidden, weight)
    )
    return SideOfTriton(
        bias=None if its.bias is None else its.bias.contiguous(),
        pre=its.pre,
        post=its.post,
        hidden=hidden,
        weight=weight,
        hidden_stride=hidden.stride(0),
        weight_stride=weight.stride(0),
        D=hidden.shape[1],
    )


def split_difference(
    student_hidden: Tensor, teacher_hidden: Tensor
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return (high, low, factor): teacher − student = factor · (high + low), to 16 bits or more.

    The power of two per row keeps small differences out of fp16's subnormal numbers. fp32 hidden
    states need no low part.
    """
    delta = (teacher_hidden.float() - student_hidden.float()).contiguous()
    if student_hidden.dtype == torch.float32:
        return delta, None, None
    exponent = torch.frexp(delta.abs().amax(1)).exponent.clamp(-100, 100)
    delta *= power_of_two(-exponent)[:, None]
    high = delta.to(student_hidden.dtype)
    return high, delta.sub_(high).to(student_hidden.dtype), power_of_two(exponent)
