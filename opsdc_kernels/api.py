"""The public functions: contract, validation and choice of backend."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from opsdc_kernels import plan
from opsdc_kernels.problem import Problem, statistics_dtype

DIVERGENCES = ("reverse_kl", "forward_kl", "jsd")
REDUCTIONS = ("mean", "sum", "none")
BACKENDS = ("auto", "chunked", "fused", "reference")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class DivergenceStats:
    """Detached statistics per token, in nats: [N] or [B, T] like the input, fp32 (float64 for
    float64 inputs). All are of the logits the divergence sees, after bias, scale, soft-cap and
    temperature. Rows whose token weight is 0 hold zeros."""

    divergence: Tensor
    """Unweighted, unreduced."""
    student_logsumexp: Tensor
    teacher_logsumexp: Tensor
    student_entropy: Tensor
    teacher_entropy: Tensor
    agreement: Tensor
    """1 where both have the same most likely token, else 0."""
    student_logprob: Tensor | None = None
    """Log-probability of `target_ids`, where given."""
    teacher_logprob: Tensor | None = None
    gradient_error_bound: Tensor | None = None
    """With `skip_tolerance`, as all that follow. Per token: the columns left out make an error of
    its row of dH of at most this, relative to the exact row (∞ where nothing can be said)."""
    divergence_error: Tensor | None = None
    """Nats that `divergence`, then a lower bound, may lack: an estimate, no bound. 0 where it is
    exact."""
    hidden_gradient_bound: Tensor | None = None
    """0-dim: bounds ‖error of dH‖ / ‖exact dH‖ (Frobenius) of Σ w·d."""
    weight_gradient_bound: Tensor | None = None
    """0-dim: the same of dW, together with db."""
    kept_share: Tensor | None = None
    """0-dim: share of the vocabulary columns that were kept, mean over the tokens."""
    gemm_units: Tensor | None = None
    """0-dim: head GEMMs of the call."""


def linear_divergence(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor | None = None,
    *,
    divergence: str = "reverse_kl",
    beta: float = 0.5,
    token_weight: Tensor | None = None,
    reduction: str = "mean",
    temperature: float = 1.0,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    logit_scale: float | Sequence[float] = 1.0,
    logit_softcap: float | Sequence[float | None] | None = None,
    target_ids: Tensor | None = None,
    return_stats: bool = False,
    process_group: Any = None,
    backend: str = "auto",
    vocab_size: int | None = None,
    skip_tolerance: float | None = None,
    exact_value: bool = False,
    workspace_bytes: int | None = None,
) -> Any:
    """Divergence between the student's and the teacher's next-token distributions over the full
    vocabulary, from hidden states and LM-head weights; the [N, V] logits never exist.

    The logits are ``z = softcap(scale·(h·Wᵀ + b)) / temperature``, ``softcap(x) =
    cap·tanh(x/cap)``, in fp32 whatever the inputs. The equations, the gradients and the meaning
    of −inf logits are in `opsdc_kernels.reference`.

    Args:
        student_hidden: [N, Ds] or [B, T, Ds]; bf16, fp16, fp32 or float64. Receives a gradient.
        student_weight: [V, Ds], same dtype (autocast casts both). Receives a gradient unless it
            does
            not require one; then none is allocated.
        teacher_hidden: [N, Dt] or [B, T, Dt]. Never receives a gradient.
        teacher_weight: [V, Dt]. None, or the very tensor `student_weight`: the head is shared, and
            with it the student's bias, scale and soft-cap, unless the teacher is given its own. The
            teacher stays a constant: W receives the student's gradient alone.
        divergence: ``"reverse_kl"`` KL(student‖teacher), ``"forward_kl"`` KL(teacher‖student), or
            ``"jsd"``, the generalized Jensen–Shannon divergence
            ``(1−β)·KL(student‖m) + β·KL(teacher‖m)``, ``m = (1−β)·student + β·teacher``.
        beta: of the jsd, strictly between 0 and 1.
        token_weight: [N] or [B, T], finite and ≥ 0: mask and weights. Rows of weight 0 are dropped
            before any GEMM and may hold anything, NaN too. This costs one synchronization of the
            device; without it there is none.
        reduction: ``"mean"`` Σ w·d / Σ w, ``"sum"`` Σ w·d, or ``"none"``: the unweighted divergence
            per token, 0 where the weight is 0. Empty sums are 0.
        temperature: divides the logits of both; the loss is *not* multiplied by temperature².
        student_bias, teacher_bias: [V], of the heads.
        logit_scale, logit_softcap: one value for both, or a (student, teacher) pair.
        target_ids: [N] or [B, T] int64; adds their log-probabilities to the statistics.
        return_stats: also return `DivergenceStats`.
        process_group: the `torch.distributed` group over whose ranks the vocabulary is sharded:
            weights and biases are this rank's rows of the heads, in rank order, of any number and
            cut alike for student and teacher; everything else is the same on all ranks, and
            `target_ids` and `vocab_size` count over all shards. Loss and statistics are those of
            the whole vocabulary, the hidden states receive the whole gradient on every rank
            (backpropagate the same loss on all of them), the weights that of their rows. Weights
            may be DTensors sharded by rows over this group. One more synchronization of the
            device. See `opsdc_kernels.vocab_parallel`, also for what it communicates.
        backend: ``"chunked"`` (every device, 4 GEMM units with a trainable head, 3 frozen),
            ``"fused"`` (Triton, no [N, V] scratch in the forward pass), ``"reference"`` (eager,
            materializes the logits, differentiable twice) or ``"auto"``: see `opsdc_kernels.plan`.
            A backend asked for by name runs or raises.
        vocab_size: score only the first so many columns of (padded) heads.
        skip_tolerance: None: gradients from all columns. Else the largest relative error of dH and
            dW (Frobenius) to accept for leaving vocabulary columns out whose student probability is
            negligible in a whole chunk of tokens: reverse KL on the chunked backend, 1 + 3·(share
            kept) GEMM units instead of 4. The statistics say how large the error can be at the
            most; the choice keeps that bound within the tolerance wherever it can be known before
            the gradient is (`hidden_gradient_bound` and `weight_gradient_bound` tell). Rounding,
            which exact gradients have too, comes on top. Loss and `divergence` are then lower
            bounds (see `divergence_error`), teacher entropy, normalizer and agreement those of the
            kept columns. The student's statistics, and passes without gradients, stay exact. See
            `opsdc_kernels.columns`.
        exact_value: with `skip_tolerance`, the loss and all statistics from all columns, for one
            GEMM unit more.
        workspace_bytes: budget of the scratch; None: a share of the device's total memory.

    Returns:
        The loss, a scalar, or [N] / [B, T] for ``"none"``; fp32, or float64 for float64 inputs.
        With `return_stats`, a pair (loss, `DivergenceStats`).

    Raises:
        TypeError: a tensor argument is no tensor or has the wrong dtype.
        ValueError: shapes, devices or options do not fit; the message names argument and remedy.
    """
    _check_option("divergence", divergence, DIVERGENCES)
    _check_option("reduction", reduction, REDUCTIONS)
    _check_option("backend", backend, BACKENDS)
    if divergence == "jsd" and not 0 < beta < 1:
        raise ValueError(
            f"beta={beta!r} must lie strictly between 0 and 1; for the ends use "
            'divergence="forward_kl" or divergence="reverse_kl"'
        )
    if divergence != "jsd" and beta != 0.5:
        raise ValueError(f'beta={beta!r} has no effect on {divergence}; use divergence="jsd"')
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature={temperature!r} must be finite and above 0")
    if target_ids is not None and not return_stats:
        raise ValueError("target_ids only adds to the statistics; pass return_stats=True too")
    group = _group(process_group, backend)
    _check_skip(skip_tolerance, exact_value, divergence, reduction, backend, group)

    shared = teacher_weight is None or teacher_weight is student_weight
    weights = _tensors(
        student_hidden=student_hidden,
        student_weight=_shard("student_weight", student_weight, process_group),
        teacher_hidden=teacher_hidden,
        teacher_weight=None if shared else _shard("teacher_weight", teacher_weight, process_group),
        student_bias=_shard("student_bias", student_bias, process_group),
        teacher_bias=_shard("teacher_bias", teacher_bias, process_group),
    )
    leading = student_hidden.shape[:-1]
    size = _check_shapes(weights, vocab_size, sharded=group is not None)
    scale = _pair("logit_scale", logit_scale)
    softcap = _pair("logit_softcap", logit_softcap)
    for value in scale:
        if not -math.inf < value < math.inf or value == 0:
            raise ValueError(f"logit_scale={logit_scale!r} must be finite and not 0")
    if skip_tolerance is not None and softcap[0] != softcap[1]:
        raise ValueError(
            f"logit_softcap={logit_softcap!r}: under different caps nothing bounds the columns "
            "that skip_tolerance leaves out; give both one cap, or skip_tolerance=None"
        )
    for cap in softcap:
        if cap is not None and not 0 < cap < math.inf:
            raise ValueError(f"logit_softcap={logit_softcap!r} must be above 0, or None for no cap")
    own_teacher_bias = shared and teacher_bias is not None and teacher_bias is not student_bias
    if shared and not own_teacher_bias:
        weights["teacher_bias"] = weights["student_bias"]
    bias_of_teacher = weights["teacher_bias"]
    problem = Problem(
        student_hidden=_flat(weights["student_hidden"]),
        student_weight=weights["student_weight"],
        teacher_hidden=_flat(weights["teacher_hidden"]),
        teacher_weight=weights["teacher_weight"],
        student_bias=weights["student_bias"],
        teacher_bias=None if bias_of_teacher is None else bias_of_teacher.detach(),
        token_weight=_token_weight(token_weight, student_hidden),
        target_ids=_target_ids(target_ids, student_hidden),
        divergence=divergence,
        beta=float(beta),
        temperature=float(temperature),
        logit_scale=(float(scale[0]), float(scale[1])),
        logit_softcap=(_float_or_none(softcap[0]), _float_or_none(softcap[1])),
        own_teacher_bias=own_teacher_bias,
        vocab_size=size,
        reduction=reduction,
        return_stats=return_stats,
        workspace_bytes=_budget(workspace_bytes, weights, size),
        process_group=group,
        skip_tolerance=None if skip_tolerance is None else float(skip_tolerance),
        exact_value=exact_value,
    )
    loss, statistics = _run(problem, backend)
    if reduction == "none":
        loss = loss.reshape(leading)
    if not return_stats:
        return loss
    assert statistics is not None
    if skip_tolerance is None:
        return loss, DivergenceStats(*(x.reshape(leading) for x in statistics))
    found: list[Any] = [x.reshape(leading) for x in statistics[:-4]]
    if target_ids is None:
        found[-2:-2] = [None, None]
    return loss, DivergenceStats(*found, *statistics[-4:])


def linear_reverse_kl(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor | None = None,
    **options: Any,
) -> Any:
    """KL(student‖teacher): `linear_divergence` with the divergence fixed, same other options."""
    if "divergence" in options:
        raise TypeError("linear_reverse_kl takes no divergence; use linear_divergence")
    return linear_divergence(
        student_hidden,
        student_weight,
        teacher_hidden,
        teacher_weight,
        divergence="reverse_kl",
        **options,
    )


def _run(problem: Problem, backend: str) -> tuple[Tensor, tuple[Tensor, ...] | None]:
    trainable = (problem.student_hidden, problem.student_weight, problem.student_bias)
    gradient = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in trainable)
    name, _ = plan.choose_backend(backend, problem.student_hidden.device, gradient)
    if problem.process_group is not None or problem.skip_tolerance is not None:
        name = "chunked"
    if name == "reference":
        from opsdc_kernels.reference import reference_divergence

        return reference_divergence(problem)
    if name == "chunked":
        from opsdc_kernels.chunked.op import chunked_divergence

        return chunked_divergence(problem)
    return _fused_backend()(problem)


def _fused_backend() -> Any:
    try:
        from opsdc_kernels.fused.op import fused_divergence
    except ImportError as error:
        raise ValueError(
            f'backend="fused" is not installed ({error}); use backend="chunked"'
        ) from error
    return fused_divergence


def _check_option(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is none of {', '.join(allowed)}")


def _check_skip(
    tolerance: float | None,
    exact_value: bool,
    divergence: str,
    reduction: str,
    backend: str,
    group: str | None,
) -> None:
    if tolerance is None:
        if exact_value:
            raise ValueError("exact_value=True has no effect without skip_tolerance; leave it out")
        return
    if not 0 < tolerance < 1:
        raise ValueError(f"skip_tolerance={tolerance!r} must lie between 0 and 1; None is exact")
    remedy = "or skip_tolerance=None"
    if divergence != "reverse_kl":
        raise ValueError(
            f'skip_tolerance does not apply to divergence="{divergence}": only the reverse KL\'s '
            "gradient is weighted by the student's probability alone, the others' needs the "
            f'teacher\'s mass on the columns left out; use divergence="reverse_kl", {remedy}'
        )
    if reduction == "none":
        raise ValueError(
            'skip_tolerance with reduction="none": the tolerance is one of the gradient of Σ w·d; '
            f'use reduction="sum" with token_weight, {remedy}'
        )
    if backend not in ("auto", "chunked"):
        raise ValueError(f'backend="{backend}" has no skip_tolerance; use "chunked", {remedy}')
    if group is not None:
        raise ValueError(
            "skip_tolerance with process_group: shards do not agree on columns; gather the head, "
            + remedy
        )


def _group(group: Any, backend: str) -> str | None:
    """The group's name, or None where there is nothing to share."""
    if group is None:
        return None
    from torch.distributed import ProcessGroup, is_available

    if not is_available() or not isinstance(group, ProcessGroup):
        raise TypeError(
            f"process_group={group!r} is no torch.distributed.ProcessGroup that this rank is in; "
            "give torch.distributed.group.WORLD, new_group(...) or a device mesh's get_group()"
        )
    if group.size() == 1:
        return None
    if backend not in ("auto", "chunked"):
        raise ValueError(
            f'backend="{backend}" takes no process_group; use backend="chunked", or gather the head'
        )
    return group.group_name


def _shard(name: str, x: Any, group: Any) -> Any:
    """This rank's rows of a DTensor, where an explicit group says that they are vocabulary."""
    if group is None or not hasattr(x, "device_mesh"):
        return x
    from torch.distributed import get_process_group_ranks
    from torch.distributed.tensor import Shard

    mesh = x.device_mesh
    if mesh.ndim != 1 or tuple(x.placements) != (Shard(0),):
        raise ValueError(
            f"{name} is a DTensor of placements {tuple(x.placements)} on a mesh of {mesh.ndim} "
            "dimensions; it must be sharded by rows, Shard(0), over process_group alone: gather "
            "its other dimensions first"
        )
    ranks, own = get_process_group_ranks(mesh.get_group()), get_process_group_ranks(group)
    if ranks != own:
        raise ValueError(
            f"{name} is sharded over the ranks {ranks} and process_group holds {own}; pass the "
            "weight's own group, weight.device_mesh.get_group()"
        )
    return x.to_local()


def _tensors(**tensors: Tensor | None) -> dict[str, Any]:
    """Dtype, device, gradient and kind of every tensor; cast as `F.linear` would under autocast."""
    for name, x in tensors.items():
        optional = name in ("teacher_weight", "student_bias", "teacher_bias")
        if x is None and optional:
            continue
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        if hasattr(x, "device_mesh"):
            raise ValueError(
                f"{name} is a DTensor: whether its shards hold vocabulary or parameters of other "
                "tokens cannot be told; gather it with .full_tensor(), call from inside the "
                "wrapped module where it is plain, or pass process_group= for a head whose rows "
                "are the vocabulary's"
            )
        if name.startswith("teacher") and x.requires_grad:
            raise ValueError(
                f"{name} requires a gradient, and the teacher receives none; pass {name}.detach()"
            )
        if x.dtype not in DTYPES:
            raise TypeError(f"{name} has dtype {x.dtype}; use bf16, fp16, fp32 or float64")
    given = {name: x for name, x in tensors.items() if x is not None}
    first = given["student_hidden"]
    for name, x in given.items():
        if x.device != first.device:
            raise ValueError(
                f"{name} is on {x.device} and student_hidden on {first.device}; move one of them"
            )
    if len({x.dtype for x in given.values()}) == 1:
        return dict(tensors)
    kind = first.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        if not any(x.dtype == torch.float64 for x in given.values()):
            return {name: None if x is None else x.to(dtype) for name, x in tensors.items()}
    dtypes = ", ".join(f"{name} {x.dtype}" for name, x in given.items())
    raise TypeError(f"the dtypes differ ({dtypes}); cast to one dtype, or use autocast")


def _check_shapes(tensors: dict[str, Any], vocab_size: int | None, *, sharded: bool) -> int:
    """Shapes agree; the number of columns to score, 0 for all that shards hold together."""
    student, teacher = tensors["student_hidden"], tensors["teacher_hidden"]
    for name, x in (("student_hidden", student), ("teacher_hidden", teacher)):
        if x.dim() not in (2, 3):
            raise ValueError(f"{name} has shape {tuple(x.shape)}; give [N, D] or [B, T, D]")
    if student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(
            f"student_hidden {tuple(student.shape)} and teacher_hidden {tuple(teacher.shape)} hold "
            "different tokens; the shapes must agree in all but the last dimension"
        )
    weight, other = tensors["student_weight"], tensors["teacher_weight"]
    pairs = [("student", student, weight), ("teacher", teacher, weight if other is None else other)]
    for side, hidden, head in pairs:
        if head.dim() != 2 or head.shape[1] != hidden.shape[-1]:
            raise ValueError(
                f"{side}_weight has shape {tuple(head.shape)} and {side}_hidden "
                f"{tuple(hidden.shape)}; the weight must be [V, {hidden.shape[-1]}]"
            )
        bias = tensors[f"{side}_bias"]
        if bias is not None and bias.shape != head.shape[:1]:
            raise ValueError(
                f"{side}_bias has shape {tuple(bias.shape)}; it must be [{head.shape[0]}]"
            )
    sizes = [head.shape[0] for _, _, head in pairs]
    if vocab_size is None:
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"student_weight has {sizes[0]} rows and teacher_weight {sizes[1]}; if the larger "
                "is padding, pass vocab_size= to score only the first columns of both"
            )
        if sharded:
            return 0
        vocab_size = sizes[0]
    if not 1 <= vocab_size <= (math.inf if sharded else min(sizes)):
        raise ValueError(f"vocab_size={vocab_size} must be between 1 and {min(sizes)}")
    return vocab_size


def _pair(name: str, value: Any) -> tuple[Any, Any]:
    if not isinstance(value, (tuple, list)):
        return value, value
    if len(value) != 2:
        raise ValueError(f"{name}={value!r} must be one value or a (student, teacher) pair")
    return value[0], value[1]


def _float_or_none(value: float | None) -> float | None:
    return None if value is None else float(value)


def _flat(hidden: Tensor) -> Tensor:
    return hidden.reshape(-1, hidden.shape[-1])


def _per_token(name: str, x: Any, hidden: Tensor) -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.shape != hidden.shape[:-1]:
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}; it needs one entry per token, "
            f"{tuple(hidden.shape[:-1])}"
        )
    if x.device != hidden.device:
        raise ValueError(f"{name} is on {x.device} and student_hidden on {hidden.device}")
    return x.detach().reshape(-1)


def _token_weight(token_weight: Any, hidden: Tensor) -> Tensor | None:
    if token_weight is None:
        return None
    flat = _per_token("token_weight", token_weight, hidden)
    if getattr(token_weight, "requires_grad", False):
        raise ValueError("token_weight requires a gradient and receives none; pass its .detach()")
    return flat.to(statistics_dtype(hidden.dtype))


def _target_ids(target_ids: Any, hidden: Tensor) -> Tensor | None:
    if target_ids is None:
        return None
    flat = _per_token("target_ids", target_ids, hidden)
    if flat.is_floating_point() or flat.dtype == torch.bool:
        raise TypeError(f"target_ids has dtype {flat.dtype}; give int64")
    return flat.long()


def _budget(workspace_bytes: int | None, tensors: dict[str, Any], size: int) -> int | None:
    student = tensors["student_hidden"]
    dims = (student.shape[-1], tensors["teacher_hidden"].shape[-1])
    if workspace_bytes is not None:
        size = min(size or sys.maxsize, max(len(tensors["student_weight"]), 1))
        plan.chunk_rows(1, size, dims, student.dtype, student.device, workspace_bytes)
    return workspace_bytes
