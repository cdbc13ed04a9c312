"""`nn.Module`s that only hold the options of the functions they call."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from opsdc_kernels.api import linear_divergence


class LinearDivergence(nn.Module):
    """`linear_divergence` with its options fixed; call it with the tensors and per-call options.

        loss = LinearDivergence(divergence="jsd", beta=0.3)(h_s, w, h_t, token_weight=mask)

    A per-call option overrides the one given here. Raises what `linear_divergence` raises, when
    called.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(
        self,
        student_hidden: Tensor,
        student_weight: Tensor,
        teacher_hidden: Tensor,
        teacher_weight: Tensor | None = None,
        **options: Any,
    ) -> Any:
        return linear_divergence(
            student_hidden,
            student_weight,
            teacher_hidden,
            teacher_weight,
            **{**self.options, **options},
        )

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class LinearReverseKL(LinearDivergence):
    """`LinearDivergence` of KL(student‖teacher)."""

    def __init__(self, **options: Any) -> None:
        if "divergence" in options:
            raise TypeError("LinearReverseKL takes no divergence; use LinearDivergence")
        super().__init__(divergence="reverse_kl", **options)
