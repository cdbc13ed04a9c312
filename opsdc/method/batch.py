"""Token batches from rollouts: the only home of shifts, masks, packing and normalisation.

A sequence is prompt + response. The hidden state at position i predicts token i + 1, so the
response tokens at P … P+R−1 (P prompt tokens, R response tokens, the end-of-sequence token
included) are scored at positions P−1 … P+R−2. Prompt positions never reach the head.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch

from opsdc.method.mixture import AGAINST, CONCISE, PLAIN, START
from opsdc.models.head import TokenBatch

IGNORED = -100
"""Label that transformers gives to a position outside the response."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """One response behind the student's prompt and the same token ids behind the teacher's."""

    student_prompt_ids: Sequence[int]
    teacher_prompt_ids: Sequence[int]
    response_ids: Sequence[int]
    against_prompt_ids: Sequence[int] = ()
    """The prompt with the instruction whose style is subtracted, where there is one."""
    dial: float = 1.0
    """Weight of the instruction in this response's teacher, see `mixture`."""

    @property
    def student_length(self) -> int:
        """Number of tokens of prompt and response on the student's side."""
        return len(self.student_prompt_ids) + len(self.response_ids)

    @property
    def teacher_length(self) -> int:
        """Number of tokens of prompt and response on the teacher's side."""
        return len(self.teacher_prompt_ids) + len(self.response_ids)


def token_batch(
    sequences: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    packed: bool,
    pad_id: int,
    device: torch.device,
) -> TokenBatch:
    """Lay out (prompt, response) sequences of token ids for one forward.

    Packed, all of them stand in one row, [1, Σ length], without a mask: positions restart at 0
    with each sequence. Otherwise each has a row of its own, padded on the right with `pad_id`.
    The scored positions follow the order of the sequences and of their tokens.
    """
    rows = [list(prompt) + list(response) for prompt, response in sequences]
    width = sum(map(len, rows)) if packed else max(map(len, rows))

    # Indices into the flattened rows: a response's tokens are predicted one position earlier.
    scored: list[int] = []
    start = 0
    for prompt, response in sequences:
        first = start + len(prompt) - 1
        scored += range(first, first + len(response))
        start += len(prompt) + len(response) if packed else width

    if packed:
        input_ids = torch.tensor([[token for row in rows for token in row]])
        position_ids = torch.cat([torch.arange(len(row)) for row in rows])[None]
        attention_mask = None
    else:
        input_ids = torch.full((len(rows), width), pad_id)
        attention_mask = torch.zeros_like(input_ids)
        for i, row in enumerate(rows):
            input_ids[i, : len(row)] = torch.tensor(row)
            attention_mask[i, : len(row)] = 1
        position_ids = torch.arange(width).expand(len(rows), -1)
        attention_mask = attention_mask.to(device)
    return TokenBatch(
        input_ids=input_ids.to(device),
        attention_mask=attention_mask,
        position_ids=position_ids.to(device),
        scored=torch.tensor(scored, dtype=torch.int64, device=device),
        lengths=[len(response) for _, response in sequences],
    )


def to_labels(batch: TokenBatch) -> torch.Tensor:
    """Return the labels [rows, T] int64 of a batch as transformers writes them.

    A response token stands at its own position, `IGNORED` everywhere else.
    """
    labels = torch.full_like(batch.input_ids, IGNORED)
    labels.view(-1)[batch.scored + 1] = batch.targets
    return labels


def from_labels(
    input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor
) -> TokenBatch:
    """Build a token batch from transformers' tensors, [rows, T] int64 each, padded on either side.

    Nothing stands before the first token of a row to predict it: its label does not count.
    """
    predicts = torch.zeros_like(labels, dtype=torch.bool)
    predicts[:, :-1] = labels[:, 1:] != IGNORED
    return TokenBatch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=(attention_mask.cumsum(1) - 1).clamp_min(0),
        scored=predicts.flatten().nonzero()[:, 0],
        lengths=predicts.sum(1).tolist(),
    )


def micro_batches(lengths: Sequence[int], *, max_tokens: int, packed: bool) -> list[list[int]]:
    """Group sequences so that a forward holds at most `max_tokens` tokens, padding counted.

    Returns the indices of each group. A sequence above the budget is a group of its own: nothing
    is dropped or cut.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    groups: list[list[int]] = []
    room = 0
    for i in order:
        # Longest first: the first sequence of a padded group sets the width of its rows.
        width = lengths[i] if packed or not groups else lengths[groups[-1][0]]
        if not groups or width > room:
            groups.append([])
            room = max_tokens
            width = lengths[i]
        groups[-1].append(i)
        room -= width
    return groups


def share_out(lengths: Sequence[int], ranks: int) -> list[list[int]]:
    """Divide sequences among ranks so that each gets about equally many tokens.

    Returns the indices of each rank's sequences, rising. With fewer sequences than ranks some
    ranks get none.
    """
    load = [0] * ranks
    shares: list[list[int]] = [[] for _ in range(ranks)]
    # The longest first, each to the rank that has the fewest tokens so far.
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        rank = min(range(ranks), key=lambda r: (load[r], r))
        shares[rank].append(i)
        load[rank] += lengths[i]
    return [sorted(share) for share in shares]


def token_weights(response_lengths: Sequence[int], normalization: str) -> list[float]:
    """Return the loss weight that each token of a response has, one number per response.

    Σ weight·KL over all tokens is the loss of the whole step. `normalization` "sequence" takes the
    mean over responses of their token means, "token" the mean over all tokens. Weights are taken
    over the whole step, so micro-batches, packing and ranks change nothing. A response without
    tokens counts in no mean.
    """
    counted = [n for n in response_lengths if n > 0]
    if normalization == "token":
        total = sum(counted)
        return [1.0 / total if n else 0.0 for n in response_lengths]
    return [1.0 / (len(counted) * n) if n else 0.0 for n in response_lengths]


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """The way sequences become forwards: it changes speed and memory, never the result."""

    packed: bool
    """True puts the sequences of a forward into one row, False pads each to a row of its own."""
    max_tokens: int
    """Most tokens of one forward, padding counted."""
    pad_id: int
    """Token id that fills padded rows and stands in where a rank has no tokens."""
    dtype: torch.dtype
    """The dtype that the forward computes in; below float32 it runs under autocast."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepPlan:
    """One step cut into forwards: built once, followed by the teacher's and the student's pass.

    All ranks plan the whole step alike, and each takes its own groups.
    """

    pairs: Sequence[Pair]
    """The step's responses that have tokens."""
    weights: Sequence[float]
    """Loss weight of each token of a response, one number per pair."""
    mixes: Sequence[Mapping[str, float]]
    """Weight of each context in each pair's teacher, see `mixture`."""
    teacher_groups: Mapping[str, Sequence[Sequence[int]]]
    """For each context, indices of the pairs in each forward of this rank's teacher pass; an empty
    group stands for a dummy row."""
    student_groups: Sequence[Sequence[int]]
    """Indices of the pairs in each forward of this rank's student pass, in the same manner."""
    layout: Layout
    """Packing, token budget and dtype of the forwards."""

    def teacher_batch(self, context: str, group: Sequence[int], device: torch.device) -> TokenBatch:
        """Lay one group out behind the prompts of a context."""
        return self._batch(
            [(_prompt_of(p, context), p.response_ids) for p in self._pairs_of(group)], device
        )

    def student_batch(self, group: Sequence[int], device: torch.device) -> TokenBatch:
        """Lay one group out behind the student's prompts."""
        return self.teacher_batch(PLAIN, group, device)

    def token_weights(self, group: Sequence[int], device: torch.device) -> torch.Tensor:
        """Return the loss weights [n] float32 of a group's response tokens; [0.0] for a dummy."""
        weights = [self.weights[i] for i in group for _ in self.pairs[i].response_ids]
        return torch.tensor(weights or [0.0], device=device)

    def owners(self) -> torch.Tensor:
        """Return the pair's index [n] int64 of each token that this rank's student pass scores."""
        order = [i for group in self.student_groups for i in group]
        lengths = torch.tensor([len(self.pairs[i].response_ids) for i in order], dtype=torch.int64)
        return torch.tensor(order, dtype=torch.int64).repeat_interleave(lengths)

    def _pairs_of(self, group: Sequence[int]) -> list[Pair]:
        # A rank without tokens runs a row all the same: the others wait for it in every layer.
        ids = [self.layout.pad_id]
        dummy = Pair(
            student_prompt_ids=ids,
            teacher_prompt_ids=ids,
            against_prompt_ids=ids,
            response_ids=ids,
        )
        return [self.pairs[i] for i in group] or [dummy]

    def _batch(
        self, sequences: list[tuple[Sequence[int], Sequence[int]]], device: torch.device
    ) -> TokenBatch:
        layout = self.layout
        return token_batch(sequences, packed=layout.packed, pad_id=layout.pad_id, device=device)


def _prompt_of(pair: Pair, context: str) -> Sequence[int]:
    """Return the prompt that a context of `mixture` puts before a pair's response."""
    if context == CONCISE:
        return pair.teacher_prompt_ids
    return pair.against_prompt_ids if context == AGAINST else pair.student_prompt_ids


def plan_step(
    pairs: Sequence[Pair],
    layout: Layout,
    *,
    normalization: str,
    contexts: Callable[[float], Mapping[str, float]],
    rank: int = 0,
    ranks: int = 1,
) -> StepPlan:
    """Cut a step's responses into the forwards of one rank.

    Args:
        pairs: All of the step, the same on every rank; those without a response are left out.
        layout: Packing, token budget and dtype of the forwards.
        normalization: "sequence" or "token", see `token_weights`.
        contexts: Gives the weight of each context in a pair's teacher from the pair's dial, as
            `Teacher.contexts` does.
        rank, ranks: This process among how many.
    """
    scored = [p for p in pairs if p.response_ids]
    # By both lengths together: a rank that scores a response as teacher also trains on it.
    shares = share_out([p.student_length + p.teacher_length for p in scored], ranks)

    mixes = [contexts(p.dial) for p in scored]
    for p, mix in zip(scored, mixes, strict=True):
        if AGAINST in mix and not p.against_prompt_ids:
            raise ValueError("a pair needs against_prompt_ids where another style is subtracted")

    def groups(context: str, members: Collection[int]) -> list[list[int]]:
        lengths = [len(_prompt_of(p, context)) + len(p.response_ids) for p in scored]
        by_rank = []
        for share in shares:
            mine = [i for i in share if i in members]
            cut = micro_batches(
                [lengths[i] for i in mine], max_tokens=layout.max_tokens, packed=layout.packed
            )
            by_rank.append([[mine[j] for j in group] for group in cut])
        # Ranks run in lockstep, so all have as many forwards as the busiest; dummies come last.
        dummies = max(map(len, by_rank)) - len(by_rank[rank])
        return by_rank[rank] + [[] for _ in range(dummies)]

    return StepPlan(
        pairs=scored,
        weights=token_weights([len(p.response_ids) for p in scored], normalization),
        mixes=mixes,
        teacher_groups={
            context: groups(context, [i for i, mix in enumerate(mixes) if context in mix])
            for context in (CONCISE, PLAIN, AGAINST, START)
            if any(context in mix for mix in mixes)
        },
        student_groups=groups(PLAIN, range(len(scored))),
        layout=layout,
    )
