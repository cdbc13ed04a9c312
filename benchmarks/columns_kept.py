"""What lowers the share of vocabulary columns that an accuracy asks for, on a real model's states.

    python -m benchmarks.columns_kept                            (about 12 minutes on one CPU core)
    python -m benchmarks.columns_kept --states real.safetensors  (of `benchmarks.real_states`)

No bounds here but true errors, of dH and dW against those from all columns, in fp32; their norms
are taken through 64 random directions of the hidden dimension, good to about 1 %. Four questions,
each at temperature 1 and at that where the mean entropy is half a nat: the order of the tokens, the
rows of a chunk, what columns are ranked by, and what stands in for the columns that are dropped.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.real_states import real_cases
from opsdc_kernels.testing import Case

PROBLEMS, RESPONSE = 16, 96
TARGET = 1e-3
"""Relative error of the gradients at which shares of columns are compared."""
ENTROPY = 0.5
CHUNKS = (128, 256, 512, 1024)
DIRECTIONS = 64


@dataclass(frozen=True)
class States:
    """All logits of some tokens; letters as in `opsdc_kernels.problem`."""

    hidden_ND: Tensor
    delta_ND: Tensor
    """The teacher's hidden states less the student's: one head gives both logits."""
    weight_VD: Tensor
    q_NV: Tensor
    d_NV: Tensor
    directions_DP: Tensor

    @classmethod
    def of(cls, case: Case, temperature: float) -> States:
        hidden = case.student_hidden / temperature
        delta = case.teacher_hidden / temperature - hidden
        weight = case.student_weight
        g = torch.Generator().manual_seed(0)
        return cls(
            hidden_ND=hidden,
            delta_ND=delta,
            weight_VD=weight,
            q_NV=(hidden @ weight.T).softmax(1),
            d_NV=delta @ weight.T,
            directions_DP=torch.randn(hidden.shape[1], DIRECTIONS, generator=g),
        )

    @property
    def entropy_N(self) -> Tensor:
        return torch.special.entr(self.q_NV).sum(1)

    def gradient(self, rows: Tensor) -> Tensor:
        """dZ [C, V] of the reverse KL, from all columns."""
        q, d = self.q_NV[rows], self.d_NV[rows]
        return q.mul(torch.linalg.vecdot(q, d)[:, None] - d)


# What stands in for the dropped columns of a chunk: (states, rows, keeps [V], seed) → dZ [C, V],
# and what dH gets beside dZ·W, [C, D] or None.
Tail = Callable[[States, Tensor, Tensor, int], tuple[Tensor, Tensor | None]]


def renormalized(s: States, rows: Tensor, keeps_V: Tensor, seed: int) -> tuple[Tensor, None]:
    """Nothing: the mean of d is taken over the kept columns (what `skip_tolerance` does)."""
    q = s.q_NV[rows] * keeps_V
    d = s.d_NV[rows]
    mean = torch.linalg.vecdot(q, d) / q.sum(1)
    return q.mul_(mean[:, None] - d), None


def mean_row(by_mass: bool) -> Tail:
    """One row W̄ for all of them: d = Δh·W̄ there, which adds (m − d)·Q ⊗ W̄ to dH."""

    def tail(s: States, rows: Tensor, keeps_V: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        q = s.q_NV[rows]
        share_V = torch.where(keeps_V, 0.0, q.sum(0) if by_mass else 1.0)
        row = (share_V / share_V.sum().clamp(min=1e-30)) @ s.weight_VD
        q = q * keeps_V
        d = s.d_NV[rows]
        dropped = 1 - q.sum(1)
        there = s.delta_ND[rows] @ row
        mean = torch.linalg.vecdot(q, d) + dropped * there
        return q.mul_(mean[:, None] - d), torch.outer(dropped * (mean - there), row)

    return tail


def sampled(columns: int) -> Tail:
    """So many of them, drawn by their mass in the chunk and weighted by its inverse."""

    def tail(s: States, rows: Tensor, keeps_V: Tensor, seed: int) -> tuple[Tensor, None]:
        q, d = s.q_NV[rows], s.d_NV[rows]
        mass_V = torch.where(keeps_V, 0.0, q.sum(0))
        factor_V = keeps_V.float()
        if mass_V.sum() > 0:
            g = torch.Generator().manual_seed(seed)
            drawn = mass_V.multinomial(columns, replacement=True, generator=g)
            weight = mass_V.sum() / mass_V[drawn] / columns
            factor_V = factor_V.index_add(0, drawn, weight)
        q = q * factor_V
        mean = torch.linalg.vecdot(q, d)
        # Σ q is 1 in expectation alone.
        mean = mean + (1 - q.sum(1)) * (mean / q.sum(1))
        return q.mul_(mean[:, None] - d), None

    return tail


# How columns are ranked in a chunk: (states, rows) → [V].
Rank = Callable[[States, Tensor], Tensor]
RANKS: dict[str, Rank] = {
    "largest q": lambda s, rows: s.q_NV[rows].amax(0),
    "Σ q²": lambda s, rows: s.q_NV[rows].square().sum(0).sqrt(),
    "largest q·‖Δh‖": lambda s, rows: _slopes(s, rows).amax(0),
    "Σ (q·‖Δh‖)²": lambda s, rows: _slopes(s, rows).square().sum(0).sqrt(),
    "Σ dZ² (oracle)": lambda s, rows: s.gradient(rows).square().sum(0).sqrt(),
}


def _slopes(s: States, rows: Tensor) -> Tensor:
    return s.q_NV[rows] * s.delta_ND[rows].norm(dim=1, keepdim=True)


def orders(s: States, height: int) -> Iterator[tuple[str, Tensor]]:
    """Orders of the tokens, before they are cut into chunks of so many."""
    n = len(s.q_NV)
    yield "as sampled", torch.arange(n)
    yield "random", torch.randperm(n, generator=torch.Generator().manual_seed(0))
    yield "by most likely token", s.q_NV.argmax(1).argsort(stable=True)
    yield "by hidden state (k-means)", _clusters(s.hidden_ND, -(-n // height)).argsort(stable=True)
    yield "by entropy", s.entropy_N.argsort()
    yield "by ‖Δh‖", s.delta_ND.norm(dim=1).argsort()


def _clusters(hidden_ND: Tensor, count: int) -> Tensor:
    x = torch.nn.functional.normalize(hidden_ND - hidden_ND.mean(0))
    centres = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:count]]
    for _ in range(20):
        nearest = (x @ centres.T).argmax(1)
        sums = torch.zeros_like(centres).index_add_(0, nearest, x)
        centres = torch.nn.functional.normalize(sums + 1e-6 * centres)
    return (x @ centres.T).argmax(1)


def errors(
    s: States, chunks: list[Tensor], keeps: list[Tensor], tail: Tail = renormalized, seed: int = 0
) -> tuple[float, float]:
    """Relative errors of dH and dW where each chunk keeps the columns `keeps` [V] bool."""
    weight_VP, hidden_NP = s.weight_VD @ s.directions_DP, s.hidden_ND @ s.directions_DP
    gap_VP, true_VP = torch.zeros_like(weight_VP), torch.zeros_like(weight_VP)
    gap = true = 0.0
    for i, (rows, keeps_V) in enumerate(zip(chunks, keeps, strict=True)):
        exact = s.gradient(rows)
        found, beside = tail(s, rows, keeps_V, 1000 * seed + i)
        found -= exact
        lack = found @ weight_VP
        if beside is not None:
            lack += beside @ s.directions_DP
        gap += float(lack.square().sum())
        true += float((exact @ weight_VP).square().sum())
        gap_VP.addmm_(found.T, hidden_NP[rows])
        true_VP.addmm_(exact.T, hidden_NP[rows])
    return math.sqrt(gap / true), float(gap_VP.norm() / true_VP.norm())


def kept_share(
    s: States, order: Tensor, height: int, rank: Rank, target: float = TARGET
) -> tuple[float, float]:
    """(mean share of the columns, cut) of the largest cut with both errors within the target."""
    chunks = list(order.split(height))
    scores = [rank(s, rows) for rows in chunks]
    top = max(float(score.max()) for score in scores)
    low, high = math.log(top * 1e-12), math.log(top)
    for _ in range(9):
        middle = (low + high) / 2
        keeps = [score > math.exp(middle) for score in scores]
        if max(errors(s, chunks, keeps)) <= target:
            low = middle
        else:
            high = middle
    cut = math.exp(low)
    kept = sum(float((x > cut).sum()) * len(rows) for x, rows in zip(scores, chunks, strict=True))
    return kept / len(order) / len(s.weight_VD), cut


def at_half_a_nat(case: Case) -> float:
    low, high = 0.1, 1.0
    for _ in range(12):
        middle = (low + high) / 2
        hidden = case.student_hidden[::4] / middle
        q = (hidden @ case.student_weight.T).softmax(1)
        mean = float(torch.special.entr(q).sum(1).mean())
        low, high = (middle, high) if mean < ENTROPY else (low, middle)
    return low


def report_orders(s: States) -> None:
    print(f"share of the columns for errors of at most {TARGET:g}, by largest q in a chunk")
    heights = [height for height in CHUNKS if height <= len(s.q_NV)]
    print(f"{'order':<28}" + "".join(f"{height:>9}" for height in heights) + "   rows")
    shares: dict[str, list[float]] = {}
    for height in heights:
        for name, order in orders(s, height):
            found, _ = kept_share(s, order, height, RANKS["largest q"])
            shares.setdefault(name, []).append(found)
    for name, found_shares in shares.items():
        print(f"{name:<28}" + "".join(f"{share:>9.1%}" for share in found_shares), flush=True)


def report_ranks(s: States, height: int) -> None:
    print(f"share of the columns for errors of at most {TARGET:g}, chunks of {height}, by rank")
    order = torch.arange(len(s.q_NV))
    for name, rank in RANKS.items():
        found, _ = kept_share(s, order, height, rank)
        print(f"{name:<28}{found:>9.1%}", flush=True)


def report_tails(s: States, height: int) -> None:
    print(f"errors of dH / dW at one cut of the largest q, chunks of {height}, as sampled")
    chunks = list(torch.arange(len(s.q_NV)).split(height))
    tails: dict[str, Tail] = {
        "renormalized": renormalized,
        "mean row": mean_row(by_mass=False),
        "mean row, by mass": mean_row(by_mass=True),
        "256 sampled columns": sampled(256),
        "2,048 sampled columns": sampled(2048),
    }
    for cut in (1e-3, 1e-4, 1e-5, 1e-6):
        peaks = [s.q_NV[rows].amax(0) for rows in chunks]
        keeps = [peak > cut for peak in peaks]
        share = float(torch.stack(keeps).float().mean())
        dropped = 1 - sum(
            float((s.q_NV[rows] * k).sum()) for rows, k in zip(chunks, keeps, strict=True)
        ) / len(s.q_NV)
        print(f"cut {cut:.0e}: {share:.1%} of the columns, mass dropped {dropped:.1e}")
        for name, tail in tails.items():
            found = [errors(s, chunks, keeps, tail, seed) for seed in range(3)]
            hidden, weight = (max(each[i] for each in found) for i in (0, 1))
            print(f"  {name:<26}{hidden:9.1e} / {weight:.1e}", flush=True)
        for more in (256, 2048):
            counts = [int(k.sum()) + more for k in keeps]
            wider = [
                torch.zeros_like(k).index_fill_(0, peak.topk(min(n, len(peak))).indices, True)
                for k, peak, n in zip(keeps, peaks, counts, strict=True)
            ]
            hidden, weight = errors(s, chunks, wider)
            print(f"  {f'{more:,} columns more':<26}{hidden:9.1e} / {weight:.1e}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--states", type=Path, metavar="FILE", help="written by real_states --save")
    parser.add_argument("--temperature", type=float, help="this one instead of both")
    parser.add_argument("--only", choices=("orders", "ranks", "tails"))
    options = parser.parse_args()
    if options.states:
        from safetensors.torch import load_file

        found = load_file(options.states)
        names = ("student_hidden", "student_weight", "teacher_hidden")
        case = Case(*(found[name] for name in names))
    else:
        case, _ = real_cases(PROBLEMS, RESPONSE)
    for temperature in [options.temperature] if options.temperature else [1.0, at_half_a_nat(case)]:
        s = States.of(case, temperature)
        print(
            f"\n{len(s.q_NV)} tokens, temperature {temperature:.2f}, entropy "
            f"{float(s.entropy_N.mean()):.2f} nats"
        )
        if options.only in (None, "orders"):
            report_orders(s)
        if options.only in (None, "ranks"):
            report_ranks(s, 256)
        if options.only in (None, "tails"):
            report_tails(s, 256)


if __name__ == "__main__":
    main()
