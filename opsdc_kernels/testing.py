"""Check a backend on your own shapes: realistic inputs, float64 truth, an error budget.

    case = make_case(tokens=512, dim=576, vocab_size=49152, entropy=0.5, kl=1e-2)
    assert_accurate(case, backend="chunked")

Self-distillation keeps teacher and student close, so inputs are made to a wanted student entropy
and a wanted KL, not drawn at random: random logits are nearly uniform, and their errors say
nothing. Truth is the centred float64 form (see `opsdc_kernels.reference`) on the same rounded
inputs; errors are relative to the truth's own size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opsdc_kernels.api import linear_divergence

NEAR_UNIFORM_SLACK = 0.02
"""Entropies within this many nats of ln V would need logits too flat to be of interest."""
FAINT = 0.01
"""A share of the largest token's gradient: smaller ones are judged on that scale."""


class Unrepresentable(ValueError):
    """No inputs of this dtype and vocabulary have the wanted entropy and KL."""


@dataclass(frozen=True, slots=True)
class Case:
    """Inputs of one call; `teacher_weight` None means a shared head."""

    student_hidden: Tensor
    student_weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor | None = None

    def to(self, target: torch.dtype | torch.device) -> Case:
        """The same inputs in another dtype, or on another device."""
        student, weight, teacher = (
            x.to(target) for x in (self.student_hidden, self.student_weight, self.teacher_hidden)
        )
        other = self.teacher_weight
        return Case(student, weight, teacher, None if other is None else other.to(target))


@dataclass(frozen=True, slots=True)
class Outcome:
    """The results of a call, and the gradients that it left."""

    loss: Tensor
    per_token: Tensor
    hidden_gradient: Tensor
    weight_gradient: Tensor


@dataclass(frozen=True, slots=True)
class Errors:
    """Relative to the truth's own size; exact zeros count as 0."""

    loss: float
    hidden_gradient: float
    """Frobenius."""
    weight_gradient: float
    """Frobenius."""
    rows: Tensor
    """Shape [N]: the larger error of each token's divergence and hidden gradient. Gradients below
    `FAINT` of the largest token's are judged on that scale: a saturated JSD has nearly none."""
    finite: bool
    negative: bool
    """Some token's divergence is below 0."""

    @property
    def worst_row(self) -> float:
        """The largest of `rows`; 0 without tokens."""
        return float(self.rows.max()) if self.rows.numel() else 0.0


@dataclass(frozen=True, slots=True)
class Budget:
    """The largest `Errors` allowed."""

    loss: float
    gradient: float
    rows: float | Tensor
    """The limit of each token, or [N]: of its own."""


BUDGETS = {
    torch.float64: Budget(1e-12, 1e-12, 1e-9),
    torch.float32: Budget(1e-5, 3e-5, 1e-3),
    torch.bfloat16: Budget(1e-4, 3e-3, 1e-2),
    torch.float16: Budget(1e-4, 3e-3, 1e-2),
}


def make_case(
    *,
    tokens: int,
    dim: int,
    vocab_size: int,
    entropy: float,
    kl: float,
    dtype: torch.dtype = torch.float32,
    shared_head: bool = True,
    common_mode: float = 0.0,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Case:
    """Inputs whose every row has about the wanted student entropy and KL(student‖teacher), in nats.

    Args:
        tokens, dim, vocab_size: N, D and V.
        entropy: of the student, from 0.01 (a peaked row) to just below ln V.
        kl: from 1e-12 to 5. With different heads it is reached on average over the rows.
        dtype: of all tensors; entropy and KL are those after rounding to it.
        shared_head: else the teacher's head is a perturbed copy.
        common_mode: size of a component that all rows of W share, in units of a row's own size: it
            changes no distribution, and strains arithmetic that does not know that.
        seed: of the draw.
        device: on which to draw, and to search for entropy and KL; another one draws other numbers.

    Raises:
        Unrepresentable: rounding to `dtype` moves entropy or KL off by more than a factor of 3.
    """
    if not 0 < entropy < math.log(vocab_size) - NEAR_UNIFORM_SLACK:
        raise Unrepresentable(f"entropy={entropy} needs more than {vocab_size} columns")
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64, device=device)

    weight = (normal(vocab_size, dim) / math.sqrt(dim)).to(dtype).double()
    # Like a language model's, a row's logits are a bulk and a few tokens that stand out of it; a
    # peaked row of Gaussian logits would need a far larger scale.
    favourites = torch.randint(vocab_size, (tokens, 3), generator=generator, device=device)
    shares = torch.tensor([1.0, 0.8, 0.6], device=device)
    direction = (weight[favourites] * shares[:, None]).sum(1)
    direction = direction + 0.5 * normal(tokens, dim) / math.sqrt(dim)
    unknown = weight.new_zeros(tokens)
    scale = _bisect(lambda x: -_entropy(x[:, None] * direction @ weight.T), -entropy, unknown)
    hidden = scale[:, None] * direction
    weight = (weight + common_mode * normal(1, dim) / math.sqrt(dim)).to(dtype).double()
    hidden = hidden.to(dtype).double()
    logits = hidden @ weight.T
    if shared_head:
        step = normal(tokens, dim)
        step_logits = step @ weight.T
        size = _bisect(lambda x: _kl(logits, x[:, None] * step_logits), kl, unknown)
        case = Case(hidden, weight, hidden + size[:, None] * step)
    else:
        step = normal(vocab_size, dim)
        step_logits = hidden @ step.T
        size = _bisect(lambda x: _kl(logits, x * step_logits).mean()[None], kl, unknown[:1])
        case = Case(hidden, weight, hidden, weight + size * step)
    case = case.to(dtype)
    _check_representable(case, entropy, kl)
    return case


def _logits(case: Case) -> tuple[Tensor, Tensor]:
    """The student's, and teacher − student, in float64 [N, V]."""
    wide = case.to(torch.float64)
    s = wide.student_hidden @ wide.student_weight.T
    if wide.teacher_weight is None:
        return s, (wide.teacher_hidden - wide.student_hidden) @ wide.student_weight.T
    return s, wide.teacher_hidden @ wide.teacher_weight.T - s


def _check_representable(case: Case, entropy: float, kl: float) -> None:
    s, d = _logits(case)
    for name, wanted, got in (("entropy", entropy, _entropy(s)), ("kl", kl, _kl(s, d))):
        if not 1 / 3 < float(got.mean()) / wanted < 3:
            outcome = f"{float(got.mean()):.1e} in {case.student_hidden.dtype}"
            raise Unrepresentable(f"{name}={wanted} comes out as {outcome}")


def _entropy(logits: Tensor) -> Tensor:
    log_q = torch.log_softmax(logits, 1)
    return -(log_q.exp() * log_q).sum(1)


def _kl(logits: Tensor, difference: Tensor) -> Tensor:
    q = torch.softmax(logits, 1)
    c = difference - (q * difference).sum(1, keepdim=True)
    return torch.where(
        c.abs().amax(1) < 500, torch.log1p((q * (torch.expm1(c) - c)).sum(1)), math.inf
    )


def _bisect(rising: Any, wanted: float, like: Tensor) -> Tensor:
    """x > 0, of the shape of `like`, with rising(x) = wanted, by bisection of log x."""
    low, high = torch.full_like(like, -25.0), torch.full_like(like, 9.0)
    for _ in range(22):  # to 1e-5 of x
        middle = (low + high) / 2
        above = rising(middle.exp()) > wanted
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return low.exp()


def run(case: Case, **options: Any) -> Outcome:
    """Forward and backward of `linear_divergence` on the case."""

    def call(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        loss, stats = linear_divergence(
            hidden, weight, case.teacher_hidden, case.teacher_weight, return_stats=True, **options
        )
        return loss, stats.divergence

    return _outcome(case, call)


def _outcome(case: Case, call: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Outcome:
    """The loss and values per token of `call`, and the gradients of its arguments."""
    hidden, weight = (
        x.detach().clone().requires_grad_() for x in (case.student_hidden, case.student_weight)
    )
    loss, per_token = call(hidden, weight)
    loss.sum().backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return Outcome(loss.detach(), per_token.detach(), hidden.grad, weight.grad)


def truth(case: Case, **options: Any) -> Outcome:
    """The same in float64 by the reference, from the same rounded inputs.

    Tensor options (biases, token weights) are widened too.
    """
    wide = {
        name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in options.items()
    }
    wide.pop("workspace_bytes", None)
    return run(case.to(torch.float64), **{**wide, "backend": "reference"})


def naive(case: Case, logits_dtype: torch.dtype) -> Outcome:
    """The way of most trainers: materialized logits in `logits_dtype`, then `log_softmax` in fp32
    and Σ q·(log q − log p), mean over the tokens, by autograd."""
    head = case.student_weight if case.teacher_weight is None else case.teacher_weight

    def log_probabilities(h: Tensor, w: Tensor) -> Tensor:
        return torch.log_softmax((h.float() @ w.float().T).to(logits_dtype).float(), 1)

    def call(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        log_p = log_probabilities(case.teacher_hidden, head)
        log_q = log_probabilities(hidden, weight)
        per_token = (log_q.exp() * (log_q - log_p)).sum(1)
        return per_token.mean(), per_token

    return _outcome(case, call)


def errors(got: Outcome, true: Outcome) -> Errors:
    """Errors of `got`, relative to the size of `true`."""
    rows = torch.stack([
        _row_errors(got.per_token[..., None], true.per_token[..., None], 0.0),
        _row_errors(got.hidden_gradient, true.hidden_gradient, FAINT),
    ])  # fmt: skip
    tensors = (got.loss, got.per_token, got.hidden_gradient, got.weight_gradient)
    return Errors(
        loss=_relative(got.loss, true.loss),
        hidden_gradient=_relative(got.hidden_gradient, true.hidden_gradient),
        weight_gradient=_relative(got.weight_gradient, true.weight_gradient),
        rows=rows.amax(0),
        finite=all(bool(torch.isfinite(x).all()) for x in tensors),
        negative=bool((got.per_token < 0).any()),
    )


def _relative(got: Tensor, true: Tensor) -> float:
    error, size = (got.double() - true).norm(), true.norm()
    return float(error / size) if size > 0 else float(error)


def _row_errors(got: Tensor, true: Tensor, floor: float) -> Tensor:
    """Per token, relative to its own size or to `floor` times the largest token's."""
    flat = got.reshape(-1, got.shape[-1]).double(), true.reshape(-1, true.shape[-1])
    error, size = (flat[0] - flat[1]).norm(dim=1), flat[1].norm(dim=1)
    if floor and size.numel():
        size = size.clamp(min=floor * float(size.max()))
    return torch.where(size > 0, error / size.clamp(min=1e-300), error)


def budget(case: Case, true: Outcome) -> Budget:
    """The budget of the case's dtype, plus what fp32 logits cannot avoid.

    A logit z of fp32 is off by about 3e-7·|z|, or by more in a long sum: by what `torch.matmul` is
    off on these inputs. So is, relatively, the student's probability of it; a gradient weighs two
    of them against each other. The difference d of both logits is off by what both are where the
    heads differ and fp32 logits are subtracted, by 3e-7·|d| where one head gives it directly. It
    meets differences of about √(2·KL), which adds its error over √(2·KL), per row and on the whole.
    A divergence is their square: differences off by the share x leave it off by 2·x + x². In a
    single row they may all but cancel, in the divergence or only in its gradient.
    """
    limit = BUDGETS[case.student_hidden.dtype]
    if case.student_hidden.dtype == torch.float64:
        return limit
    rounding = _rounding_of_logits(case.student_hidden, case.student_weight)
    s, d = _logits(case)
    if case.teacher_weight is not None:
        difference = rounding + _rounding_of_logits(case.teacher_hidden, case.teacher_weight)
    else:
        difference = 3e-7 * d.abs().amax(1)
    kl = true.per_token.reshape(-1).abs().clamp(min=1e-60)
    whole = rounding.max() + difference.max() / (2 * kl.mean()).sqrt()
    share = rounding + difference / (2 * kl).sqrt()
    of_gradient = _conditioning_of_gradients(case, s, d, rounding, difference)
    return Budget(
        limit.loss + float(whole),
        limit.gradient + float(whole + rounding.max()),
        limit.rows + torch.maximum(share * (2 + share), of_gradient),
    )


def _rounding_of_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """The error of fp32 logits, per token [N]."""
    z = hidden.double() @ weight.double().T
    off = (hidden.float() @ weight.float().T - z).abs()
    return torch.maximum(3e-7 * z.abs().amax(1), off.amax(1))


def _conditioning_of_gradients(
    case: Case, s: Tensor, d: Tensor, rounding: Tensor, difference: Tensor
) -> Tensor:
    """The relative error [N] of a row of dH = Σ q·c·w where its logits are off by `rounding` and
    its differences by `difference`, each on its own: twice the sum in quadrature. A column's error
    acts along w − E_q[w], and small rows are judged as in `errors`."""
    w = case.student_weight.double()
    q = torch.softmax(s, 1)
    c = d - (q * d).sum(1, keepdim=True)
    mean = q @ w
    distance = (w.square().sum(1) - 2 * mean @ w.T + mean.square().sum(1, keepdim=True)).clamp(
        min=0
    )
    size = ((q * c) @ w).norm(dim=1)
    size = size.clamp(min=max(FAINT * float(size.max()), 1e-300))
    pull = (q.square() * distance).sum(1).sqrt()
    relative = ((q * c).square() * distance).sum(1).sqrt()
    return 2 * (rounding * relative + difference * pull) / size


def within(measured: Errors, limit: Budget) -> bool:
    """Finite, nowhere negative, and no error above its limit."""
    return not excesses(measured, limit)


def excesses(measured: Errors, limit: Budget) -> list[str]:
    """Everything that is wrong with these errors, a line each."""
    wrong = ["not everything is finite"] if not measured.finite else []
    if measured.negative:
        wrong.append("a divergence is negative")
    for name, error, most in (
        ("loss", measured.loss, limit.loss),
        ("dH", measured.hidden_gradient, limit.gradient),
        ("dW", measured.weight_gradient, limit.gradient),
    ):
        if not error <= most:
            wrong.append(f"{name} is off by {error:.1e}, allowed is {most:.1e}")
    most_N = torch.as_tensor(limit.rows, dtype=measured.rows.dtype).expand_as(measured.rows)
    over = (~(measured.rows <= most_N)).nonzero().squeeze(1).tolist()
    if over:
        worst = max(over, key=lambda i: float(measured.rows[i] / most_N[i]))
        error, most = float(measured.rows[worst]), float(most_N[worst])
        wrong.append(
            f"{len(over)} of {len(most_N)} rows, row {worst} by {error:.1e}, allowed is {most:.1e}"
        )
    return wrong


def assert_accurate(case: Case, **options: Any) -> Errors:
    """Run `linear_divergence` on the case and hold it to its budget.

    Args:
        case: inputs, from `make_case` or your own.
        options: of `linear_divergence`, `backend` included.

    Returns:
        The errors measured.

    Raises:
        AssertionError: an error is above its budget, something is not finite, or a divergence is
            negative; the message names each with its limit.
    """
    true = truth(case, **options)
    measured, limit = errors(run(case, **options), true), budget(case, true)
    if wrong := excesses(measured, limit):
        raise AssertionError(f"{'; '.join(wrong)} with {options}")
    return measured
