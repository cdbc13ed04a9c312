"""The public functions: their contract, then a choice of backend."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from opsdc_kernels import check, plan
from opsdc_kernels.chunked.op import chunked_divergence
from opsdc_kernels.columns.op import columns_divergence
from opsdc_kernels.reference import reference_divergence


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
    """Holds 1 where both have the same most likely token, else 0."""
    student_logprob: Tensor | None = None
    """Log-probability of `target_ids`, where given."""
    teacher_logprob: Tensor | None = None
    gradient_error_bound: Tensor | None = None
    """Of bounded columns, as the two other bounds. Per token: the columns left out make an error of
    its row of dH of at most this, relative to the exact row (∞ where nothing can be said)."""
    divergence_error: Tensor | None = None
    """Of bounded columns: nats that `divergence`, then a lower bound, may lack, by an estimate. Of
    unbiased ones: its standard error. 0 where it is exact."""
    hidden_gradient_bound: Tensor | None = None
    """Bound of ‖error of dH‖ / ‖exact dH‖ (Frobenius) of Σ w·d, 0-dim."""
    weight_gradient_bound: Tensor | None = None
    """The same of dW, together with db, 0-dim."""
    gradient_error: Tensor | None = None
    """Of unbiased columns, as the two following. Per token: the standard error of its row of dH,
    relative to the row; all three are estimated from the draw."""
    hidden_gradient_error: Tensor | None = None
    """The same of dH as a whole (Frobenius), 0-dim."""
    weight_gradient_error: Tensor | None = None
    """The same of dW, together with db, 0-dim."""
    kept_share: Tensor | None = None
    """With columns left out, the share that was kept or drawn, mean over the tokens, 0-dim."""
    gemm_units: Tensor | None = None
    """Head GEMMs of the call, 0-dim."""


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
    columns: str | None = None,
    skip_tolerance: float | None = None,
    seed: int = 0,
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
            does not require one; then none is allocated.
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
            ``"fused"`` (experimental: Triton, no [N, V] scratch in the forward pass; checked in
            Triton's interpreter and by compiling, but no GPU has run it yet), ``"reference"``
            (eager, materializes the logits, differentiable twice) or ``"auto"``: on a GPU the
            faster of the first two by measurements or by forecast (`opsdc_kernels.plan.estimate`
            says which and why), else chunked. A backend asked for by name runs or raises.
        vocab_size: score only the first so many columns of (padded) heads.
        columns: the vocabulary columns that the gradients come from; for the reverse KL on the
            chunked backend, others refuse. ``"exact"``: all. ``"unbiased"``: those of much
            probability in a chunk of tokens, and a random sample of the others; the expectation
            over `seed` is the exact gradient. ``"bounded"``: those that a proven bound of the
            error cannot do without. Both take 1 + 3·(share of columns) GEMM units instead of 4.
            None: bounded with a `skip_tolerance`, else exact. See `opsdc_kernels.columns`.
        skip_tolerance: relative error of dH and dW (Frobenius). Bounded: the largest to accept.
            The choice keeps the bound within it wherever it can be known before the gradient is
            (`hidden_gradient_bound` and `weight_gradient_bound` tell), and a call that turns out
            above is done again with all columns. Unbiased: the standard error to aim at, 0.01
            where it is None; `hidden_gradient_error` and `weight_gradient_error` are what came
            out. Rounding, which exact gradients have too, comes on top. Loss and `divergence` are
            then lower bounds, or estimates (see `divergence_error`), and so is what is said of the
            teacher. The student's statistics, and passes without gradients, stay exact.
        seed: of the draw of unbiased columns, from 0; take another in every step.
        exact_value: where columns are left out, the loss and all statistics from all columns, for
            one GEMM unit more.
        workspace_bytes: budget of the scratch; None: a share of the device's total memory.

    Returns:
        The loss, a scalar, or [N] / [B, T] for ``"none"``; fp32, or float64 for float64 inputs.
        With `return_stats`, a pair (loss, `DivergenceStats`).

    Raises:
        TypeError: a tensor argument is no tensor or has the wrong dtype.
        ValueError: shapes, devices or options do not fit; the message names argument and remedy.
    """
    options = check.options(
        backend,
        divergence=divergence, beta=beta, temperature=temperature, logit_scale=logit_scale,
        logit_softcap=logit_softcap, vocab_size=vocab_size, reduction=reduction,
        return_stats=return_stats, process_group=process_group, columns=columns,
        skip_tolerance=skip_tolerance, seed=seed, exact_value=exact_value,
        workspace_bytes=workspace_bytes,
    )  # fmt: skip
    problem = check.problem(
        backend, options, process_group, student_hidden, student_weight, teacher_hidden,
        teacher_weight, student_bias, teacher_bias, token_weight, target_ids,
    )  # fmt: skip
    if backend == "auto":
        chunked_only = options.columns != "exact" or process_group is not None
        backend = plan.backend_of(problem, chunked_only=chunked_only)
    if options.columns != "exact":
        loss, statistics = columns_divergence(problem)
    elif backend == "reference":
        loss, statistics = reference_divergence(problem)
    elif backend == "fused":
        from opsdc_kernels.fused.op import fused_divergence  # loads what only it needs

        loss, statistics = fused_divergence(problem)
    else:
        loss, statistics = chunked_divergence(problem)
    leading = student_hidden.shape[:-1]
    loss = loss.reshape(leading) if reduction == "none" else loss
    if not return_stats:
        return loss
    return loss, DivergenceStats(
        **{name: x.reshape(leading) if x.dim() else x for name, x in statistics.items()}
    )


def linear_reverse_kl(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor | None = None,
    **options: Any,
) -> Any:
    """KL(student‖teacher) over the full vocabulary: `linear_divergence` with this divergence fixed.

    Options, what is returned and what is raised are those of `linear_divergence`, without
    `divergence` and `beta`.
    """
    if unknown := options.keys() - _REVERSE_KL.parameters.keys():
        hint = "; use linear_divergence" if unknown & {"divergence", "beta"} else ""
        raise TypeError(f"linear_reverse_kl takes no {min(unknown)}{hint}")
    return linear_divergence(
        student_hidden,
        student_weight,
        teacher_hidden,
        teacher_weight,
        divergence="reverse_kl",
        **options,
    )


_EVERY = inspect.signature(linear_divergence)
_REVERSE_KL = _EVERY.replace(
    parameters=[p for n, p in _EVERY.parameters.items() if n not in ("divergence", "beta")]
)
# What help() and editors show; listed once, so that an option has one home.
linear_reverse_kl.__signature__ = _REVERSE_KL  # type: ignore[attr-defined]
