"""What lowers the share of vocabulary columns that an accuracy asks for, on a real model's states.

    python -m benchmarks.columns_kept                            (about 12 minutes on one CPU core)
    python -m benchmarks.columns_kept --states real.safetensors  (of `benchmarks.real_states`)

No bounds here but true errors, of dH and dW against those from all columns, in fp32; their norms
are taken through 64 random directions of the hidden dimension, good to about 1 %. Four questions,
each at temperature 1 and at that where the mean entropy is half a nat: the order of the tokens, the
rows of a chunk (of those also the time of their products), what columns are ranked by, and what
stands in for the columns that are dropped.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.real_states import real_cases
from benchmarks.speed import seconds
from opsdc_kernels.testing import Case

PROBLEMS, RESPONSE, TOKENS = 16, 96, 1024
ENTROPY = 0.5
KEPT = 0.05
"""Of the columns, where chunks are timed."""
CHUNKS = (128, 256, 512, 1024)
DIRECTIONS = 64


@dataclass(frozen=True)
class States:
    """All logits of some tokens; letters as in `opsdc_kernels.problem`, P random directions."""

    hidden_ND: Tensor
    delta_ND: Tensor
    """The teacher's hidden states less the student's: one head gives both logits."""
    weight_VD: Tensor
    q_NV: Tensor
    d_NV: Tensor

    @classmethod
    def of(cls, case: Case, temperature: float) -> States:
        hidden = case.student_hidden / temperature
        delta = case.teacher_hidden / temperature - hidden
        weight = case.student_weight
        return cls(hidden, delta, weight, (hidden @ weight.T).softmax(1), delta @ weight.T)

    def reordered(self, order: Tensor) -> States:
        rows = (x[order] for x in (self.hidden_ND, self.delta_ND, self.q_NV, self.d_NV))
        hidden, delta, q, d = rows
        return States(hidden, delta, self.weight_VD, q, d)

    @cached_property
    def entropy_N(self) -> Tensor:
        return torch.cat([torch.special.entr(q).sum(1) for q in self.q_NV.split(64)])

    @cached_property
    def directions_DP(self) -> Tensor:
        g = torch.Generator().manual_seed(0)
        return torch.randn(self.hidden_ND.shape[1], DIRECTIONS, generator=g)

    @cached_property
    def weight_VP(self) -> Tensor:
        return self.weight_VD @ self.directions_DP

    @cached_property
    def hidden_NP(self) -> Tensor:
        return self.hidden_ND @ self.directions_DP

    @cached_property
    def exact(self) -> tuple[Tensor, Tensor]:
        """dH [N, P] and dW [V, P] from all columns."""
        hidden_NP, weight_VP = torch.zeros_like(self.hidden_NP), torch.zeros_like(self.weight_VP)
        for rows in self.chunks(64):
            dz = self.gradient(rows)
            hidden_NP[rows] = dz @ self.weight_VP
            weight_VP.addmm_(dz.T, self.hidden_NP[rows])
        return hidden_NP, weight_VP

    def gradient(self, rows: slice) -> Tensor:
        """dZ [C, V] of the reverse KL."""
        q, d = self.q_NV[rows], self.d_NV[rows]
        return q * (torch.linalg.vecdot(q, d)[:, None] - d)

    def chunks(self, height: int) -> list[slice]:
        return [slice(i, i + height) for i in range(0, len(self.q_NV), height)]


@dataclass(frozen=True)
class Found:
    """The gradient of a chunk as some columns give it."""

    columns_K: Tensor
    dz_CK: Tensor
    beside_CD: Tensor | None = None
    """What dH gets beside dZ·W."""


# What stands in for the columns that a chunk drops: (states, rows, kept columns, seed) → gradient.
Tail = Callable[[States, slice, Tensor, int], Found]


def renormalized(s: States, rows: slice, columns: Tensor, seed: int) -> Found:
    """Nothing: the mean of d is taken over the kept columns (what `skip_tolerance` does)."""
    q, d = s.q_NV[rows].index_select(1, columns), s.d_NV[rows].index_select(1, columns)
    mean = torch.linalg.vecdot(q, d) / q.sum(1)
    return Found(columns, q.mul_(d.neg_().add_(mean[:, None])))


def mean_row(by_mass: bool) -> Tail:
    """One row W̄ for all of them: d = Δh·W̄ there, which adds (m − d)·Q ⊗ W̄ to dH."""

    def tail(s: States, rows: slice, columns: Tensor, seed: int) -> Found:
        share_V = s.q_NV[rows].sum(0) if by_mass else torch.ones(len(s.weight_VD))
        share_V[columns] = 0
        row = (share_V / share_V.sum().clamp(min=1e-30)) @ s.weight_VD
        q, d = s.q_NV[rows].index_select(1, columns), s.d_NV[rows].index_select(1, columns)
        dropped = 1 - q.sum(1)
        there = s.delta_ND[rows] @ row
        mean = torch.linalg.vecdot(q, d) + dropped * there
        beside = torch.outer(dropped * (mean - there), row)
        return Found(columns, q.mul_(d.neg_().add_(mean[:, None])), beside)

    return tail


def sampled(count: int) -> Tail:
    """So many of them, drawn by their mass in the chunk and weighted by its inverse: unbiased. The
    mean that a drawn column meets is of the other draws, or the two would be correlated."""

    def tail(s: States, rows: slice, columns: Tensor, seed: int) -> Found:
        mass_V = s.q_NV[rows].sum(0)
        mass_V[columns] = 0
        g = torch.Generator().manual_seed(seed)
        drawn = mass_V.multinomial(count, replacement=True, generator=g)
        every = torch.cat([columns, drawn])
        q, d = s.q_NV[rows].index_select(1, every), s.d_NV[rows].index_select(1, every)
        kept = len(columns)
        q[:, kept:] *= mass_V.sum() / mass_V[drawn] / count
        terms = q * d
        tail_mean = terms[:, kept:].sum(1, keepdim=True)
        mean = terms[:, :kept].sum(1, keepdim=True) + tail_mean
        means = mean.repeat(1, len(every))
        means[:, kept:] += (tail_mean - count * terms[:, kept:]) / (count - 1)
        return Found(every, q.mul_(means - d))

    return tail


# How columns are ranked in a chunk: (states, rows) → [V].
Rank = Callable[[States, slice], Tensor]


def by_largest(s: States, rows: slice) -> Tensor:
    return s.q_NV[rows].amax(0)


def _slopes(s: States, rows: slice) -> Tensor:
    return s.q_NV[rows] * s.delta_ND[rows].norm(dim=1, keepdim=True)


RANKS: dict[str, Rank] = {
    "largest q": by_largest,
    "Σ q²": lambda s, rows: s.q_NV[rows].norm(dim=0),
    "largest q·‖Δh‖": lambda s, rows: _slopes(s, rows).amax(0),
    "Σ (q·‖Δh‖)²": lambda s, rows: _slopes(s, rows).norm(dim=0),
    "Σ dZ² (all columns known)": lambda s, rows: s.gradient(rows).norm(dim=0),
}


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
    s: States, height: int, kept: list[Tensor], tail: Tail = renormalized, seed: int = 0
) -> tuple[float, float]:
    """Relative errors of dH and dW where each chunk keeps the columns `kept`."""
    true_NP, true_VP = s.exact
    gap, gap_VP = 0.0, true_VP.clone()
    for i, (rows, columns) in enumerate(zip(s.chunks(height), kept, strict=True)):
        found = tail(s, rows, columns, 1000 * seed + i)
        lack = true_NP[rows] - found.dz_CK @ s.weight_VP[found.columns_K]
        if found.beside_CD is not None:
            lack -= found.beside_CD @ s.directions_DP
        gap += float(lack.square().sum())
        gap_VP.index_add_(0, found.columns_K, found.dz_CK.T @ s.hidden_NP[rows], alpha=-1)
    return math.sqrt(gap) / float(true_NP.norm()), float(gap_VP.norm() / true_VP.norm())


def kept_share(s: States, height: int, target: float, rank: Rank = by_largest) -> float:
    """Mean share of the columns above the largest cut whose errors are both within the target."""
    scores = [rank(s, rows) for rows in s.chunks(height)]
    top = max(float(score.max()) for score in scores)
    low, high = math.log(top * 1e-9), math.log(top)
    for _ in range(8):
        middle = (low + high) / 2
        kept = [(score > math.exp(middle)).nonzero()[:, 0] for score in scores]
        low, high = (middle, high) if max(errors(s, height, kept)) <= target else (low, middle)
    counts = [
        float((score > math.exp(low)).sum()) * len(s.q_NV[rows])
        for score, rows in zip(scores, s.chunks(height), strict=True)
    ]
    return sum(counts) / s.q_NV.numel()


def at_half_a_nat(case: Case) -> float:
    low, high = 0.1, 1.0
    for _ in range(12):
        middle = (low + high) / 2
        hidden = case.student_hidden[::4] / middle
        q = (hidden @ case.student_weight.T).softmax(1)
        mean = float(torch.special.entr(q).sum(1).mean())
        low, high = (middle, high) if mean < ENTROPY else (low, middle)
    return low


def report_orders(s: States, heights: Sequence[int], target: float) -> None:
    print(f"share of the columns for errors of at most {target:g}, by largest q in a chunk of rows")
    print(f"{'order':<28}" + "".join(f"{height:>9}" for height in heights))
    for name, _ in orders(s, heights[0]):
        shares = []
        for height in heights:
            shares.append(kept_share(s.reordered(dict(orders(s, height))[name]), height, target))
        print(f"{name:<28}" + "".join(f"{share:>9.1%}" for share in shares), flush=True)


def report_ranks(s: States, height: int, target: float) -> None:
    print(f"share of the columns for errors of at most {target:g}, chunks of {height}, by rank")
    for name, rank in RANKS.items():
        print(f"{name:<28}{kept_share(s, height, target, rank):>9.1%}", flush=True)


def report_tails(s: States, height: int) -> None:
    print(f"errors of dH / dW at one cut of the largest q, chunks of {height}")
    tails: dict[str, Tail] = {
        "renormalized": renormalized,
        "mean row": mean_row(by_mass=False),
        "mean row, by mass": mean_row(by_mass=True),
        "256 sampled columns": sampled(256),
        "2,048 sampled columns": sampled(2048),
    }
    peaks = [by_largest(s, rows) for rows in s.chunks(height)]
    for cut in (1e-3, 1e-4, 1e-5, 1e-6):
        kept = [(peak > cut).nonzero()[:, 0] for peak in peaks]
        share = sum(map(len, kept)) / len(kept) / len(s.weight_VD)
        print(f"cut {cut:.0e}: {share:.1%} of the columns")
        for name, tail in tails.items():
            found = [errors(s, height, kept, tail, seed) for seed in range(3)]
            hidden, weight = (max(each[i] for each in found) for i in (0, 1))
            print(f"  {name:<26}{hidden:9.1e} / {weight:.1e}", flush=True)
        for more in (256, 2048):
            wider = [
                peak.topk(min(len(columns) + more, len(peak))).indices
                for columns, peak in zip(kept, peaks, strict=True)
            ]
            hidden, weight = errors(s, height, wider)
            print(f"  {f'{more:,} columns more':<26}{hidden:9.1e} / {weight:.1e}", flush=True)


def report_rates(s: States, heights: Sequence[int]) -> None:
    """Medians of 5, in units of the head GEMM of all tokens at once."""
    n, v = len(s.hidden_ND), len(s.weight_VD)

    def spent(work: Callable[[], object]) -> float:
        return statistics.median(seconds(work, torch.device("cpu")) for _ in range(5))

    unit = spent(lambda: s.hidden_ND @ s.weight_VD.T)
    print(f"time in units of the head GEMM ({unit:.2f} s), {KEPT:.0%} of the columns gathered")
    print(f"{'rows':>5}{'student':>9}{'gather':>9}{'teacher':>9}{'dH':>9}{'dW':>9}{'scatter':>9}")
    columns = torch.randperm(v, generator=torch.Generator().manual_seed(0))[: int(KEPT * v)]
    columns = columns.sort().values
    out_VD = torch.zeros_like(s.weight_VD)
    for height in heights:
        hidden = s.hidden_ND[:height]
        logits = hidden @ s.weight_VD.T
        part_KD = s.weight_VD[columns]
        tile = logits.index_select(1, columns)
        gradient = tile.T @ hidden
        times = [
            spent(lambda h=hidden: h @ s.weight_VD.T),  # type: ignore[misc]
            spent(lambda x=logits: (x.index_select(1, columns), s.weight_VD[columns])),  # type: ignore[misc]
            spent(lambda h=hidden, w=part_KD: h @ w.T),  # type: ignore[misc]
            spent(lambda z=tile, w=part_KD: z @ w),  # type: ignore[misc]
            spent(lambda z=tile, h=hidden: z.T @ h),  # type: ignore[misc]
            spent(lambda g=gradient: out_VD.index_add_(0, columns, g)),  # type: ignore[misc]
        ]
        cells = "".join(f"{time * n / height / unit:>9.3f}" for time in times)
        print(f"{height:>5}{cells}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--states", type=Path, metavar="FILE", help="written by real_states --save")
    parser.add_argument("--temperature", type=float, help="this one instead of both")
    parser.add_argument("--target", type=float, default=1e-3, help="error (default %(default)s)")
    parser.add_argument("--rows", type=int, nargs="+", default=CHUNKS, help="of a chunk")
    parser.add_argument("--only", choices=("orders", "ranks", "tails", "rates"))
    options = parser.parse_args()
    if options.states:
        from safetensors.torch import load_file

        found = load_file(options.states)
        names = ("student_hidden", "student_weight", "teacher_hidden")
        case = Case(*(found[name] for name in names))
    else:
        case, _ = real_cases(PROBLEMS, RESPONSE)
    case = Case(case.student_hidden[:TOKENS], case.student_weight, case.teacher_hidden[:TOKENS])
    if options.only in (None, "rates"):
        report_rates(States.of(case, 1.0), options.rows)
    temperatures = [options.temperature] if options.temperature else [1.0, at_half_a_nat(case)]
    for temperature in temperatures:
        s = States.of(case, temperature)
        print(
            f"\n{len(s.q_NV)} tokens, temperature {temperature:.2f}, entropy "
            f"{float(s.entropy_N.mean()):.2f} nats"
        )
        if options.only in (None, "orders"):
            report_orders(s, options.rows, options.target)
        if options.only in (None, "ranks"):
            report_ranks(s, 256, options.target)
        if options.only in (None, "tails"):
            report_tails(s, 256)


if __name__ == "__main__":
    main()
