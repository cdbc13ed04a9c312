"""Both heads as the kernels read them, and how they are launched on this device."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from opsdc_kernels.fused.configs import (
    ENABLE_FP_FUSION,
    INTERPRETER,
    Config,
    config_for,
    target_of,
)
from opsdc_kernels.fused.logit_tiles import Side
from opsdc_kernels.triton.scaling import power_of_two

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@dataclass(frozen=True, kw_only=True, slots=True)
class Heads:
    student: Side
    teacher: Side
    """With a shared head its hidden states are the difference, teacher − student."""
    shared: bool
    masked: bool
    """A logit may be -inf on one side only: through a bias, where no soft-cap bounds it."""

    @classmethod
    def of(
        cls,
        student_hidden: Tensor,
        student_weight: Tensor,
        teacher_hidden: Tensor,
        teacher_weight: Tensor | None,
        student_bias: Tensor | None,
        teacher_bias: Tensor | None,
        rows: Tensor | None,
        shared: bool,
        transform: Sequence[float],
    ) -> Heads:
        """`rows`: the rows kept, or None for all; `transform`: see `fused.folded_transform`."""
        if rows is not None:
            student_hidden, teacher_hidden = student_hidden[rows], teacher_hidden[rows]
        student = side(student_hidden, student_weight, student_bias, *transform[:2])
        if shared:
            high, low, factor = split_difference(student_hidden, teacher_hidden)
            teacher = side(high, student_weight, None, *transform[:2])
            teacher = teacher._replace(low=low, factor=factor)
        else:
            weight = student_weight if teacher_weight is None else teacher_weight
            teacher = side(teacher_hidden, weight, teacher_bias, *transform[2:])
        open_ended = [x.bias is not None and x.post is None for x in (student, teacher)]
        return cls(
            student=student,
            teacher=teacher,
            shared=shared,
            masked=any(open_ended) and not shared,
        )

    @property
    def processors(self) -> int:
        """Programs that the device runs at once."""
        if INTERPRETED:
            return 3  # parts to combine, in tests
        return torch.cuda.get_device_properties(self.student.hidden.device).multi_processor_count

    def config(self, kernel: str, extras: bool = False) -> Config:
        """Tile sizes, see `configs.config_for`; `extras`: targets or a bias gradient."""
        if INTERPRETED:
            return INTERPRETER
        hidden = self.student.hidden
        for side in (self.student, self.teacher):
            extras = extras or side.post is not None or side.bias is not None
        dtype = "fp32" if hidden.dtype == torch.float32 else "16-bit"
        target = target_of(hidden.device)
        return config_for(kernel, target, dtype, shared=self.shared, extras=extras)

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


def side(hidden: Tensor, weight: Tensor, bias: Tensor | None, pre: float, post: float) -> Side:
    """Rows may lie apart, but within the int32 offsets of a tile; other layouts are copied."""
    hidden, weight = (
        x if x.stride(1) == 1 and 0 < x.stride(0) < 1 << 22 else x.contiguous()
        for x in (hidden, weight)
    )
    return Side(
        hidden=hidden,
        low=None,
        factor=None,
        weight=weight,
        bias=None if bias is None else bias.contiguous(),
        hidden_stride=hidden.stride(0),
        weight_stride=weight.stride(0),
        D=hidden.shape[1],
        pre=pre,
        post=post or None,
    )


def split_difference(
    student_hidden: Tensor, teacher_hidden: Tensor
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(high, low, factor): teacher − student = factor · (high + low), to 16 bits or more.

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
