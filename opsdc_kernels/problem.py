"""One validated call, as every backend receives it.

Letters, fixed here for the whole package: ``q`` is the student's distribution and ``s`` its logits,
``p`` the teacher's and ``t`` its logits. ``N`` tokens, ``V`` vocabulary, ``D`` student and ``E``
teacher hidden size, ``K`` kept tokens (weight above 0), ``C`` tokens of a chunk, ``B`` tokens of a
block. Rows are tokens, columns are vocabulary entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from enum import IntEnum
from typing import Any, NamedTuple, get_args, get_type_hints

import torch
from torch import Tensor

DIVERGENCES = ("reverse_kl", "forward_kl", "jsd")
"""In the order of the numbers by which C and Triton know them."""


COLUMNS = ("exact", "unbiased", "bounded")


class Stat(IntEnum):
    """Places in every array of results per token [Stat, N], those of C and Triton included."""

    DIVERGENCE = 0
    STUDENT_LOGSUMEXP = 1
    TEACHER_LOGSUMEXP = 2
    STUDENT_ENTROPY = 3
    TEACHER_ENTROPY = 4
    AGREEMENT = 5
    STUDENT_LOGPROB = 6
    TEACHER_LOGPROB = 7


STATISTICS = tuple(stat.name.lower() for stat in Stat)
"""Their names in `DivergenceStats`."""


def named(values: Tensor) -> dict[str, Tensor]:
    """The parts of an array of results, detached, by their names in `DivergenceStats`."""
    return dict(zip(STATISTICS, values.detach().unbind(0), strict=False))


class GradientsWanted(NamedTuple):
    """The gradients to compute."""

    hidden: bool
    weight: bool
    bias: bool

    def __bool__(self) -> bool:
        return self.hidden or self.weight or self.bias


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """Everything that a call asks for beside tensors; (student, teacher) pairs are resolved.

    A field that is added here reaches every pass and every operator by itself.
    """

    divergence: str = "reverse_kl"
    beta: float = 0.5
    temperature: float = 1.0
    logit_scale: tuple[float, float] = (1.0, 1.0)
    logit_softcap: tuple[float | None, float | None] = (None, None)
    vocab_size: int | None = None
    """Columns scored: the first so many rows of both weights, or None for all of them. With a
    `process_group` they count over all shards."""
    reduction: str = "mean"
    return_stats: bool = False
    process_group: str | None = None
    """Name of the group over whose ranks the vocabulary is sharded."""
    columns: str = "exact"
    """The vocabulary columns that the gradients come from: of `COLUMNS`."""
    skip_tolerance: float | None = None
    """Relative error of the gradients that leaving columns out may make; None for all columns."""
    seed: int = 0
    """Of the draw of unbiased columns."""
    exact_value: bool = False
    """With a `skip_tolerance`, divergence and statistics come from all columns all the same."""
    workspace_bytes: int | None = None

    @property
    def kind(self) -> int:
        """The number of the divergence in C and Triton."""
        return DIVERGENCES.index(self.divergence)


@dataclass(frozen=True, slots=True)
class Side:
    """One head's part of eq. (1) in `reference`, from its products x = h·Wᵀ to its logits."""

    scale: float
    cap: float | None
    temperature: float
    bias: Tensor | None
    """Shape [vocab_size], detached."""

    @property
    def pre(self) -> float:
        """The logit is pre·(x + bias), or under a soft-cap post·tanh(pre·(x + bias))."""
        return self.scale / (self.temperature if self.cap is None else self.cap)

    @property
    def post(self) -> float | None:
        return None if self.cap is None else self.cap / self.temperature


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """Validated tensors, tokens flattened, and the options of the call."""

    student_hidden: Tensor
    """Shape [N, D]; receives a gradient."""
    student_weight: Tensor
    """Shape [V, D]; receives a gradient unless frozen."""
    teacher_hidden: Tensor
    """Shape [N, E]; receives no gradient."""
    teacher_weight: Tensor | None
    """Shape [V', E]; None where the student's head is the teacher's too."""
    student_bias: Tensor | None
    """Shape [V]; receives a gradient if it asks for one."""
    teacher_bias: Tensor | None
    """Shape [V']; None where there is none, or where a shared head's is the student's."""
    token_weight: Tensor | None
    """Shape [N], fp32 or float64, >= 0."""
    target_ids: Tensor | None
    """Shape [N], int64."""
    options: Options

    @classmethod
    def of(cls, arguments: Sequence[Any]) -> Problem:
        """The problem that `arguments` gave."""
        tensors, values = arguments[: len(TENSORS)], arguments[len(TENSORS) :]
        # Operators turn pairs into lists.
        values = [tuple(x) if isinstance(x, list) else x for x in values]
        options = Options(**dict(zip(OPTIONS, values, strict=True)))
        return cls(**dict(zip(TENSORS, tensors, strict=True)), options=options)

    @property
    def arguments(self) -> tuple[Any, ...]:
        """Everything, as operators whose schema begins with `SCHEMA` take it."""
        options = self.options
        return (
            *(getattr(self, name) for name in TENSORS),
            *(getattr(options, name) for name in OPTIONS),
        )

    @property
    def wanted(self) -> list[bool]:
        """`GradientsWanted` of autograd."""
        trained = (self.student_hidden, self.student_weight, self.student_bias)
        enabled = torch.is_grad_enabled()
        return [enabled and x is not None and x.requires_grad for x in trained]

    @property
    def shared_logits(self) -> bool:
        """True where both models map hidden states to logits by one function.

        t − s then comes from a GEMM of the difference of hidden states, and its rounding error
        shrinks with the difference instead of with the logits.
        """
        (scale, teacher_scale), (cap, teacher_cap) = (
            self.options.logit_scale,
            self.options.logit_softcap,
        )
        one_head = self.teacher_weight is None and self.teacher_bias is None
        return one_head and scale == teacher_scale and cap == teacher_cap

    def side(self, i: int) -> Side:
        """The way of the student's products (0), or of the teacher's (1); with `shared_logits` the
        latter are those of the difference of hidden states, which no bias moves."""
        bias = self.student_bias
        if i == 1 and (self.teacher_weight is not None or self.teacher_bias is not None):
            bias = self.teacher_bias
        if bias is not None:
            bias = None if i == 1 and self.shared_logits else bias.detach()[: self.vocab_size]
        options = self.options
        return Side(options.logit_scale[i], options.logit_softcap[i], options.temperature, bias)

    @property
    def vocab_size(self) -> int:
        """Columns scored."""
        size = self.options.vocab_size
        return self.student_weight.shape[0] if size is None else size

    @property
    def logit_factor(self) -> float:
        """dz/dx of eq. (1) in `reference` but for the soft-cap, x = h·Wᵀ + b of the student."""
        return self.options.logit_scale[0] / self.options.temperature

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of logits, statistics and loss: fp32, or float64 for float64 inputs."""
        return statistics_dtype(self.student_hidden.dtype)

    @property
    def stat_count(self) -> int:
        """Length of an array of results: the first so many of `Stat`."""
        if not self.options.return_stats:
            return 1
        return len(Stat) if self.target_ids is not None else Stat.STUDENT_LOGPROB

    def kept_tokens(self) -> Tensor | None:
        """Indices [K] of the tokens with weight, or None for all. With weights this synchronizes
        with the device, once; the checks of values stay there.

        Raises:
            ValueError: a weight is negative or not finite, or a kept target is outside the scored
                vocabulary. (On a GPU: a device-side assertion.)
        """
        kept = None
        if self.token_weight is not None:
            weight = self.token_weight
            _check_values(
                ((weight >= 0) & (weight < torch.inf)).all(),
                "token_weight must be finite and >= 0; mask tokens with 0",
            )
            kept = torch.nonzero(weight).squeeze(1)
        if self.target_ids is not None:
            ids = self.target_ids if kept is None else self.target_ids[kept]
            _check_values(
                ((ids >= 0) & (ids < self.vocab_size)).all(),
                f"target_ids must lie in [0, {self.vocab_size}) for every token with weight; give "
                "tokens to ignore the token_weight 0",
            )
        return kept


def _schema(hint: Any) -> str:
    """A type in the language of PyTorch's operator schemas."""
    names = {Tensor: "Tensor", str: "str", float: "float", int: "SymInt", bool: "bool"}
    if hint in names:
        return names[hint]
    inner = get_args(hint)
    return _schema(inner[0]) + ("?" if type(None) in inner else "[]")


TENSORS = tuple(field.name for field in fields(Problem))[:-1]
OPTIONS = tuple(field.name for field in fields(Options))
SCHEMA = ", ".join(
    f"{_schema(get_type_hints(owner)[name])} {name}"
    for owner, names in ((Problem, TENSORS), (Options, OPTIONS))
    for name in names
)
"""How the schemas of all operators begin: the tensors of a problem, then its options."""
TRAINED = tuple(TENSORS.index(f"student_{name}") for name in ("hidden", "weight", "bias"))
"""Where the tensors of `GradientsWanted` stand in it."""


def among_inputs(
    gradients: Sequence[Tensor | None], wanted: Sequence[bool], count: int
) -> tuple[Tensor | None, ...]:
    """What a backward answers for `count` inputs that begin with `SCHEMA`."""
    answer: list[Tensor | None] = [None] * count
    for position, gradient, need in zip(TRAINED, gradients, wanted, strict=True):
        answer[position] = gradient if need else None
    return tuple(answer)


def like_inputs(
    upstream: Tensor, inputs: Sequence[Any], wanted: Sequence[bool]
) -> tuple[Tensor, ...]:
    """Tensors of the shapes of the gradients; empty ones where none is wanted."""
    return tuple(
        torch.empty_like(inputs[position], memory_format=torch.contiguous_format)
        if need
        else upstream.new_empty(0)
        for position, need in zip(TRAINED, wanted, strict=True)
    )


def _check_values(condition: Tensor, message: str) -> None:
    if condition.device.type == "cpu":
        if not condition:
            raise ValueError(message)
    else:
        torch._assert_async(condition, message)


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def reduce_tokens(per_token_N: Tensor, token_weight_N: Tensor | None, reduction: str) -> Tensor:
    """Σ w·d / Σ w for ``mean``, Σ w·d for ``sum``, d itself for ``none``; 0 for an empty sum."""
    if reduction == "none":
        return per_token_N
    if token_weight_N is None:
        total = per_token_N.sum()
        return total / max(per_token_N.shape[0], 1) if reduction == "mean" else total
    total = (per_token_N * token_weight_N).sum()
    return total * mean_factor(token_weight_N) if reduction == "mean" else total


def mean_factor(token_weight_N: Tensor) -> Tensor:
    """1 / Σ w as a 0-dim tensor on the device, 0 where Σ w = 0."""
    total = token_weight_N.sum()
    return torch.where(total > 0, total.reciprocal(), torch.zeros_like(total))
