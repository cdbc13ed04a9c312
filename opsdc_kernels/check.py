"""Validation of a call: every mistake is named, with its remedy, before any work."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from opsdc_kernels import plan
from opsdc_kernels.problem import COLUMNS, DIVERGENCES, Options, Problem, statistics_dtype
from opsdc_kernels.row_pass.choose import choose
from opsdc_kernels.transforms import differentiated

REDUCTIONS = ("mean", "sum", "none")
BACKENDS = ("auto", "chunked", "fused", "reference")
TARGET = 1e-2
"""The relative standard error that unbiased columns aim at where no other is asked for."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def options(backend: str, **given: Any) -> Options:
    """Everything that is given beside tensors, with pairs resolved."""
    for name in ("beta", "temperature", "logit_scale", "logit_softcap"):
        _check_constant(name, given[name])
    scale, softcap = given["logit_scale"], given["logit_softcap"]
    columns, tolerance = _columns(given["columns"], given["skip_tolerance"])
    resolved = {
        "beta": float(given["beta"]),
        "temperature": float(given["temperature"]),
        "logit_scale": _pair("logit_scale", scale),
        "logit_softcap": _pair("logit_softcap", softcap),
        "columns": columns,
        "skip_tolerance": tolerance,
        "seed": _seed(given["seed"]),
        "process_group": _group(given["process_group"], backend),
    }
    checked = Options(**{**given, **resolved})
    for name, value, allowed in (
        ("divergence", checked.divergence, DIVERGENCES),
        ("reduction", checked.reduction, REDUCTIONS),
        ("backend", backend, BACKENDS),
    ):
        if value not in allowed:
            raise ValueError(f"{name}={value!r} is none of {', '.join(allowed)}")
    kind, beta, temperature = checked.divergence, checked.beta, checked.temperature
    if kind == "jsd" and not 0 < beta < 1:
        raise ValueError(
            f"beta={beta!r} must lie strictly between 0 and 1; for the ends use "
            'divergence="forward_kl" or divergence="reverse_kl"'
        )
    if kind != "jsd" and beta != 0.5:
        raise ValueError(f'beta={beta!r} has no effect on {kind}; use divergence="jsd"')
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature={temperature!r} must be finite and above 0")
    if not all(-math.inf < x < math.inf and x != 0 for x in checked.logit_scale):
        raise ValueError(f"logit_scale={scale!r} must be finite and not 0")
    if not all(x is None or 0 < x < math.inf for x in checked.logit_softcap):
        raise ValueError(f"logit_softcap={softcap!r} must be above 0, or None for no cap")
    _check_skip(checked, backend)
    return checked


def problem(
    backend: str,
    options: Options,
    process_group: Any,
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor | None,
    student_bias: Tensor | None,
    teacher_bias: Tensor | None,
    token_weight: Tensor | None,
    target_ids: Tensor | None,
) -> Problem:
    """The tensors of `linear_divergence`, checked, flattened, this rank's where sharded."""
    if target_ids is not None and not options.return_stats:
        raise ValueError("target_ids only adds to the statistics; pass return_stats=True too")
    shared = teacher_weight is None or teacher_weight is student_weight
    tensors = _tensors(
        student_hidden=student_hidden,
        student_weight=_shard("student_weight", student_weight, process_group),
        teacher_hidden=teacher_hidden,
        teacher_weight=None if shared else _shard("teacher_weight", teacher_weight, process_group),
        student_bias=_shard("student_bias", student_bias, process_group),
        teacher_bias=_shard("teacher_bias", teacher_bias, process_group),
    )
    _check_shapes(tensors, options)
    _check_transforms(backend, tensors)
    if shared and teacher_bias is student_bias:
        tensors["teacher_bias"] = None  # the head's own
    for name in ("student_hidden", "teacher_hidden"):
        tensors[name] = tensors[name].reshape(-1, tensors[name].shape[-1])
    checked = Problem(
        **tensors,
        token_weight=_token_weight(token_weight, student_hidden, options.reduction),
        target_ids=_target_ids(target_ids, student_hidden),
        options=options,
    )
    _check_workspace(checked)
    return checked


def _check_constant(name: str, value: Any) -> None:
    """A number that no gradient is asked of."""
    for x in value if isinstance(value, (tuple, list)) else [value]:
        if isinstance(x, Tensor) and (x.requires_grad or differentiated(x)):
            raise ValueError(
                f"{name}={value!r} requires a gradient and receives none; pass {name}.item(). To "
                "train a scale or a temperature, apply it to student_hidden, and detached to "
                "teacher_hidden"
            )


def _pair(name: str, value: Any) -> tuple[Any, Any]:
    """Return (student, teacher), as floats."""
    pair = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(pair) != 2:
        raise ValueError(f"{name}={value!r} must be one value or a (student, teacher) pair")
    student, teacher = (None if x is None else float(x) for x in pair)
    return student, teacher


def _columns(columns: str | None, tolerance: float | None) -> tuple[str, float | None]:
    """Return the mode that is meant, and its tolerance."""
    if columns is None:
        columns = "exact" if tolerance is None else "bounded"
    if columns not in COLUMNS:
        raise ValueError(f"columns={columns!r} is none of {', '.join(COLUMNS)}")
    if tolerance is None:
        if columns == "bounded":
            raise ValueError(
                'columns="bounded" wants skip_tolerance, the largest error to accept; give 1e-3, '
                'or take columns="unbiased"'
            )
        return columns, TARGET if columns == "unbiased" else None
    if columns == "exact":
        raise ValueError(
            f'skip_tolerance={tolerance!r} has no effect with columns="exact"; leave one out'
        )
    if not 0 < tolerance < 1:
        raise ValueError(f"skip_tolerance={tolerance!r} must lie between 0 and 1; None is exact")
    return columns, float(tolerance)


def _seed(seed: Any) -> int:
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**63:
        raise ValueError(f"seed={seed!r} must be a whole number from 0 to 2^63 - 1")
    return seed


def _check_skip(options: Options, backend: str) -> None:
    """The calls whose columns may be left out."""
    softcap = options.logit_softcap
    if options.columns == "exact":
        if options.exact_value:
            raise ValueError(
                "exact_value=True has no effect without skip_tolerance or columns; leave it out"
            )
        return
    # How it was asked for, and the way out.
    asked, remedy = "skip_tolerance", "or skip_tolerance=None"
    if options.columns == "unbiased":
        asked, remedy = 'columns="unbiased"', 'or columns="exact"'
    if options.divergence != "reverse_kl":
        raise ValueError(
            f'{asked} does not apply to divergence="{options.divergence}": only the reverse '
            "KL's gradient is weighted by the student's probability alone, the others' needs the "
            f'teacher\'s mass on the columns left out; use divergence="reverse_kl", {remedy}'
        )
    if options.reduction == "none":
        raise ValueError(
            f'{asked} with reduction="none": the columns are chosen for the gradient of Σ w·d; '
            f'use reduction="sum" with token_weight, {remedy}'
        )
    if backend not in ("auto", "chunked"):
        raise ValueError(f'backend="{backend}" has no {asked}; use "chunked", {remedy}')
    if options.process_group is not None:
        raise ValueError(
            f"{asked} with process_group: shards do not agree on columns; gather the head, {remedy}"
        )
    if options.columns == "bounded" and softcap[0] != softcap[1]:
        raise ValueError(
            f"logit_softcap={softcap!r}: under different caps nothing bounds the columns that "
            "skip_tolerance leaves out; give both one cap, or skip_tolerance=None"
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
    sharded, given = (get_process_group_ranks(x) for x in (mesh.get_group(), group))
    if sharded != given:
        raise ValueError(
            f"{name} is sharded over the ranks {sharded} and process_group holds {given}; pass the "
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


def _check_transforms(backend: str, tensors: dict[str, Any]) -> None:
    """Derivatives that the backend can give. (Within `torch.compile` there are no transforms.)"""
    if torch.compiler.is_compiling():
        return
    for name, x in tensors.items():
        if x is None or not differentiated(x):
            continue
        if name.startswith("teacher"):
            raise ValueError(
                f"{name} is differentiated within torch.func or has a tangent, and the teacher is "
                f"a constant; pass {name}.detach()"
            )
        if backend != "reference":
            raise ValueError(
                f"{name} is differentiated within torch.func or has a tangent, and "
                f'backend="{backend}" knows the backward of torch.autograd alone; use '
                'backend="reference", or torch.autograd.grad'
            )


def _check_shapes(tensors: dict[str, Any], options: Options) -> None:
    """Shapes that fit one another and the options."""
    student, teacher = tensors["student_hidden"], tensors["teacher_hidden"]
    for name, x in (("student_hidden", student), ("teacher_hidden", teacher)):
        if x.dim() not in (2, 3):
            raise ValueError(f"{name} has shape {tuple(x.shape)}; give [N, D] or [B, T, D]")
    if student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(
            f"student_hidden {tuple(student.shape)} and teacher_hidden {tuple(teacher.shape)} hold "
            "different tokens; the shapes must agree in all but the last dimension"
        )
    head, head_of_teacher = tensors["student_weight"], tensors["teacher_weight"]
    head_of_teacher = head if head_of_teacher is None else head_of_teacher
    pairs = [("student", student, head), ("teacher", teacher, head_of_teacher)]
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
    sizes, scored = [head.shape[0] for _, _, head in pairs], options.vocab_size
    if scored is None and sizes[0] != sizes[1]:
        raise ValueError(
            f"student_weight has {sizes[0]} rows and teacher_weight {sizes[1]}; if the larger "
            "is padding, pass vocab_size= to score only the first columns of both"
        )
    # Of shards it counts all, which only their ranks together know.
    most = math.inf if options.process_group is not None else min(sizes)
    if scored is not None and not 1 <= scored <= most:
        raise ValueError(f"vocab_size={scored} must be between 1 and {min(sizes)}")


def _check_workspace(problem: Problem) -> None:
    """A workspace that holds a row of this rank's columns. (`torch.compile` leaves that to the
    operators.)"""
    if problem.options.workspace_bytes is None or torch.compiler.is_compiling():
        return
    device, rows = problem.student_hidden.device, problem.student_weight.shape[0]
    sizes = plan.Sizes.of(problem, choose(device, problem.dtype))
    sizes = replace(sizes, vocab_size=min(problem.options.vocab_size or sys.maxsize, max(rows, 1)))
    plan.chunk_rows(1, sizes, problem.options.workspace_bytes)


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


def _token_weight(token_weight: Any, hidden: Tensor, reduction: str) -> Tensor | None:
    if token_weight is None:
        return None
    flat = _per_token("token_weight", token_weight, hidden)
    if getattr(token_weight, "requires_grad", False):
        raise ValueError("token_weight requires a gradient and receives none; pass its .detach()")
    dtype = statistics_dtype(hidden.dtype)
    if reduction == "mean" and flat.is_floating_point() and flat.numel():
        flat = _near_one(flat if flat.dtype == torch.float64 else flat.float())
    return flat.to(dtype)


def _near_one(weight_N: Tensor) -> Tensor:
    """Weights over the power of two just above the largest: no sum of them over- or underflows, and
    a mean keeps its bits."""
    mantissa, exponent = torch.frexp(weight_N)
    below = exponent - torch.frexp(weight_N.amax()).exponent
    return torch.ldexp(mantissa, below.clamp(-126, 0))  # 0 has exponent 0


def _target_ids(target_ids: Any, hidden: Tensor) -> Tensor | None:
    if target_ids is None:
        return None
    flat = _per_token("target_ids", target_ids, hidden)
    if flat.is_floating_point() or flat.dtype == torch.bool:
        raise TypeError(f"target_ids has dtype {flat.dtype}; give int64")
    return flat.long()
