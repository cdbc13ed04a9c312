"""Who competes: one function each, from hidden states and heads to a scalar loss.

Every divergence is the reverse KL(student‖teacher), mean over the tokens, at the peer's own best
setting. Points of reference are cross entropy, which needs one set of logits instead of two, and
Liger's forward KL, which wants the teacher's probabilities in memory.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution, version
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from opsdc_kernels import linear_divergence

PEER_MODULES = (
    "liger_kernel.chunked_loss",
    "trl.kernels.chunked_divergence",
    "orda_kernel",
    "cut_cross_entropy",
)
"""What `contenders` imports; slow to import, so worth loading once for many processes."""

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(student hidden [N, D], its head [V, D], teacher hidden [N, D], its head [V, D]) to a scalar.

Where both heads are one tensor, a contender that knows of shared heads may make use of it.
"""


@dataclass(frozen=True, slots=True)
class Contender:
    """One implementation, ready to run."""

    name: str
    loss: Loss
    package: str
    """The distribution it comes from."""
    compiled: bool = False
    """Through torch.compile: the first call takes minutes."""
    other_loss: bool = False
    """Computes something else than the reverse KL: time and memory only."""
    cuda_only: bool = False

    @property
    def version(self) -> str:
        return version(self.package)


@dataclass(frozen=True, slots=True)
class Failure:
    """Stands in a list of figures for one that a contender did not give."""

    contender: str
    reason: str

    @classmethod
    def of(cls, contender: str, error: Exception) -> Failure:
        said = str(error).strip().partition("\n")[0][:120]
        return cls(contender, f"{type(error).__name__}: {said}")

    def __str__(self) -> str:
        return f"{self.contender}: {self.reason}"


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def contenders(device: torch.device) -> tuple[list[Contender], dict[str, str]]:
    """Those that run on `device`, ours first, and for each that does not the reason."""
    found: list[Contender] = []
    missing: dict[str, str] = {}
    for make in FAMILIES.values():
        found.extend(_tried(make, missing))
    for each in [c for c in found if c.cuda_only and device.type != "cuda"]:
        missing[each.name] = "runs on a GPU only"
        found.remove(each)
    return found, missing


def _tried(make: Callable[[], Iterator[Contender]], missing: dict[str, str]) -> list[Contender]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return list(make())
    except PackageNotFoundError as error:
        missing[make.__name__[1:]] = f"not installed: {error.name}"
    except Exception as error:
        # A peer may fail to import in any way; it is listed with its reason, never dropped.
        missing[make.__name__[1:]] = Failure.of(make.__name__, error).reason
    return []


def _ours() -> Iterator[Contender]:
    yield Contender("ours, chunked", lambda h, w, ht, wt: linear_divergence(h, w, ht, wt), "opsdc")
    yield Contender(
        "ours, skip 1e-3",
        lambda h, w, ht, wt: linear_divergence(h, w, ht, wt, skip_tolerance=1e-3),
        "opsdc",
    )
    yield Contender(
        "ours, fused",
        lambda h, w, ht, wt: linear_divergence(h, w, ht, wt, backend="fused"),
        "opsdc",
        cuda_only=True,
    )


def materialized(h: Tensor, w: Tensor, ht: Tensor, wt: Tensor) -> Tensor:
    """The textbook: both logits, both log-softmaxes, Σ q·(log q − log p)."""
    log_q = (h @ w.T).float().log_softmax(-1)
    with torch.no_grad():
        log_p = (ht @ wt.T).float().log_softmax(-1)
    return (log_q.exp() * (log_q - log_p)).sum(-1).mean()


def _naive() -> Iterator[Contender]:
    yield Contender("naive", materialized, "torch")
    yield Contender("naive, compiled", torch.compile(materialized), "torch", compiled=True)


def _liger() -> Iterator[Contender]:
    distribution("liger-kernel")
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    def chunked(compiled: bool) -> Loss:
        # beta 1 is the reverse KL; without a hard loss its cross entropy is not computed.
        module = LigerFusedLinearJSDLoss(0.0, 1.0, beta=1.0, compiled=compiled)

        def loss(h: Tensor, w: Tensor, ht: Tensor, wt: Tensor) -> Tensor:
            return module(h, w, ht, wt, torch.zeros(len(h), dtype=torch.long, device=h.device))

        return loss

    yield Contender("Liger, chunked", chunked(False), "liger-kernel")
    yield Contender("Liger, chunked, compiled", chunked(True), "liger-kernel", compiled=True)

    def triton(h: Tensor, w: Tensor, ht: Tensor, wt: Tensor) -> Tensor:
        from liger_kernel.transformers import LigerFusedLinearJSD

        return LigerFusedLinearJSD(jsd_beta=1.0)(h, w, ht, wt)

    yield Contender("Liger, Triton", triton, "liger-kernel", cuda_only=True)

    def forward_kl(h: Tensor, w: Tensor, ht: Tensor, wt: Tensor) -> Tensor:
        from liger_kernel.transformers.fused_linear_kl_div import LigerFusedLinearKLDivLoss

        with torch.no_grad():  # it takes the teacher as probabilities
            target = (ht @ wt.T).float().softmax(-1).to(h.dtype)
        return LigerFusedLinearKLDivLoss()(h, w, target)

    yield Contender("Liger, forward KL", forward_kl, "liger-kernel", other_loss=True,
                    cuda_only=True)  # fmt: skip


def _trl() -> Iterator[Contender]:
    distribution("trl")
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    def loss(h: Tensor, w: Tensor, ht: Tensor, wt: Tensor) -> Tensor:
        return ChunkedDivergenceFunction.apply(h, w, None, ht, wt, None, 1.0)[0].mean()

    yield Contender("TRL, chunked", loss, "trl")


def _orda() -> Iterator[Contender]:
    distribution("orda-kernel")
    from orda_kernel import SeparateTeacher, TiedTeacher, distillation_loss

    def loss(h: Tensor, w: Tensor, ht: Tensor, wt: Tensor) -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on a CPU it says that it materializes the logits
            return distillation_loss(
                h,
                w,
                torch.zeros(len(h), dtype=torch.long, device=h.device),
                TiedTeacher(ht) if wt is w else SeparateTeacher(ht, wt),
                student_ce_weight=0.0,
                teacher_ce_weight=0.0,
                kl_weight=1.0,
                kl_divergence="reverse",
            ).loss

    yield Contender("orda", loss, "orda-kernel")


def _unsloth() -> Iterator[Contender]:
    module = _module_of_file("unsloth-zoo", "unsloth_zoo/fused_losses/fused_linear.py")

    def loss(h: Tensor, w: Tensor, ht: Tensor, wt: Tensor) -> Tensor:
        return module.fused_linear_jsd(h, w, ht, wt, beta=1.0)

    yield Contender("unsloth", loss, "unsloth-zoo")


def _module_of_file(package: str, path: str) -> ModuleType:
    """One file of a distribution whose package as a whole refuses to be imported here."""
    location = distribution(package).locate_file(path)
    name = "benchmarks_peer_" + package.replace("-", "_")
    spec = importlib.util.spec_from_file_location(name, str(location))
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _cross_entropies() -> Iterator[Contender]:
    def targets(h: Tensor) -> Tensor:
        return torch.zeros(len(h), dtype=torch.long, device=h.device)

    chunked = torch.nn.LinearCrossEntropyOptions()
    yield Contender(
        "torch linear_cross_entropy",
        lambda h, w, ht, wt: F.linear_cross_entropy(h, w, targets(h), options=chunked),
        "torch",
        other_loss=True,
    )
    distribution("cut-cross-entropy")
    with contextlib.redirect_stderr(None):
        from cut_cross_entropy import linear_cross_entropy

    yield Contender(
        "cut-cross-entropy",
        lambda h, w, ht, wt: linear_cross_entropy(h, w, targets(h)),
        "cut-cross-entropy",
        other_loss=True,
        cuda_only=True,
    )
    yield Contender(
        "cut-cross-entropy, compiled",
        lambda h, w, ht, wt: linear_cross_entropy(h, w, targets(h), impl="torch_compile"),
        "cut-cross-entropy",
        compiled=True,
        other_loss=True,
    )


FAMILIES = {
    make.__name__[1:]: make
    for make in (_ours, _naive, _liger, _trl, _orda, _unsloth, _cross_entropies)
}
"""What makes the contenders, by whose they are; one that is not installed raises."""
