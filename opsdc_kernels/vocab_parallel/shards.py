"""The ranks of a sharded vocabulary: who has which columns, and what they tell one another.

Communication per chunk: one all-gather of a few float64 numbers per token, two for the JSD, put
together on every rank in rank order: the loss and the statistics are the same bits on all of them.
Then one all-reduce of dH per call, over all tokens. dW stays where W is. `bytes_per_token` counts.
Before the first chunk one all-gather of `HEADER_BYTES` tells the sizes of the shards, the smallest
workspace, and whether the ranks make the same call: a mistake raises on all of them instead of
hanging. That all ranks hold the *same* hidden states is not checked; different ones (data
parallelism: an FSDP shard of W looks the same as a vocabulary shard) give wrong numbers.
"""

from __future__ import annotations

import dataclasses
import zlib
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from opsdc_kernels import plan
from opsdc_kernels.problem import GradientsWanted, Problem
from opsdc_kernels.products import Layout
from opsdc_kernels.row_pass.choose import RowPass, in_torch
from opsdc_kernels.vocab_parallel.rows import Summary, sharded_rows_

HEADER = ("tokens", "tokens with weight", "options", "student rows", "teacher rows", "chunk rows")
"""The numbers by which ranks find out whether they make the same call, and how large it is."""
HEADER_BYTES = 8 * len(HEADER)
"""Bytes that each rank contributes to the exchange before the first chunk."""


def bytes_per_token(
    *,
    divergence: str,
    student_dim: int,
    gradient: bool = True,
    return_stats: bool = False,
    target_ids: bool = False,
    dtype: torch.dtype = torch.float32,
) -> int:
    """Bytes that each rank hands to collectives per token, beside `HEADER_BYTES` per call.

    Args:
        divergence, return_stats, target_ids (whether given): as in `linear_divergence`.
        student_dim: columns of the student's hidden states.
        gradient: whether these ask for a gradient.
        dtype: of the hidden states.

    The gathered part is received from every other rank; of the gradient, 4 bytes a number (8 for
    float64), a ring all-reduce sends and receives less than twice as much. ``reduction="none"``
    with a trainable head gathers once more in backward, without statistics.
    """
    gathered = len(Summary._fields) + 3 * (divergence == "jsd")
    gathered += return_stats * (5 + 2 * target_ids)
    wide = 8 if dtype == torch.float64 else 4
    return 8 * gathered + gradient * wide * student_dim


@dataclasses.dataclass(frozen=True, slots=True)
class Shard:
    """This rank's part of the vocabulary, and what all ranks agreed on."""

    group: Any
    first: int
    """Id of the first column."""
    size: int
    """Columns scored here; may be 0."""
    chunk_rows: int
    """The most that fits every rank's workspace."""

    @property
    def row_pass(self) -> RowPass:
        """The row pass of a chunk, of which this rank has some columns."""
        run = partial(sharded_rows_, gather=self.gather)
        return RowPass(name="torch, vocabulary parallel", layout=Layout.BY_ROW, run=run)

    def localize(self, problem: Problem) -> Problem:
        """The same problem over this rank's columns; targets of others lie outside of them."""
        ids = problem.target_ids
        ids = None if ids is None else ids - self.first
        options = dataclasses.replace(problem.options, vocab_size=self.size)
        return dataclasses.replace(problem, target_ids=ids, options=options)

    def gather(self, ours: Tensor) -> Tensor:
        """[R, *ours.shape] in rank order, the same on all ranks."""
        return _gather(ours, self.group)

    def add_up_(self, gradient: Tensor) -> None:
        """The sum over all ranks, in place."""
        dist.all_reduce(gradient, group=self.group)


def agree(problem: Problem, wanted: GradientsWanted) -> tuple[Shard, Problem]:
    """This rank's shard, and the problem with `vocab_size` that of all shards together. With the
    device this synchronizes once.

    Raises:
        ValueError: the ranks differ in tokens or options, student and teacher are cut at different
            columns, or `vocab_size` is more than all shards hold; on every rank alike.
    """
    group = dist.distributed_c10d._resolve_process_group(problem.options.process_group)  # type: ignore[arg-type]
    table = _gather(_header(problem, wanted), group).tolist()
    ranks = dict(zip(HEADER, zip(*table, strict=True), strict=True))
    for name in ("tokens", "tokens with weight"):
        if len(set(ranks[name])) > 1:
            raise ValueError(
                f"process_group: the ranks hold {ranks[name]} {name}; a vocabulary-parallel loss "
                "needs the same tokens on all ranks (data-parallel ranks belong to other groups)"
            )
    if len(set(ranks["options"])) > 1:
        raise ValueError(
            "process_group: the ranks call with different options, dtypes, hidden sizes or "
            "gradients asked for; make the same call on all of them"
        )
    total = min(sum(ranks["student rows"]), sum(ranks["teacher rows"]))
    asked = problem.options.vocab_size
    scored = total if asked is None else asked
    if scored > total or total == 0:
        raise ValueError(f"vocab_size={scored} must be between 1 and {total}, that of all shards")
    student, teacher = (_cuts(ranks[f"{x} rows"], scored) for x in ("student", "teacher"))
    if student != teacher:
        raise ValueError(
            f"process_group: the student's head is cut at columns {student} and the teacher's at "
            f"{teacher}; shard both alike, and pass vocab_size= where one is padded"
        )
    rank = dist.get_rank(group)
    first, stop = student[rank], student[rank + 1]
    shard = Shard(group, first, stop - first, min(ranks["chunk rows"]))
    options = dataclasses.replace(problem.options, vocab_size=scored)
    return shard, dataclasses.replace(problem, options=options)


def _header(problem: Problem, wanted: GradientsWanted) -> Tensor:
    """This rank's `HEADER`, on the device."""
    hidden, rows = problem.student_hidden, problem.student_weight.shape[0]
    tokens, teacher, weight = len(hidden), problem.teacher_weight, problem.token_weight
    sizes = dataclasses.replace(
        plan.Sizes.of(problem, in_torch(hidden.device)), vocab_size=max(rows, 1)
    )
    # Workspaces may differ, the smallest of all counts; and so may the group's name.
    options = dataclasses.replace(problem.options, workspace_bytes=None, process_group=None)
    optional = (teacher, problem.student_bias, problem.teacher_bias, problem.target_ids)
    call = (sizes.dims, sizes.dtype, tuple(wanted), [x is None for x in optional], options)
    identity = zlib.crc32(repr(call).encode())
    teacher_rows = rows if teacher is None else len(teacher)
    height = plan.chunk_rows(tokens, sizes, problem.options.workspace_bytes)
    header = torch.tensor(
        [tokens, tokens, identity, rows, teacher_rows, height], device=hidden.device
    )
    if weight is not None:
        header[1] = torch.count_nonzero(weight)
    return header


def _cuts(rows: tuple[int, ...], scored: int) -> list[int]:
    """First scored column of each shard, and the end."""
    return [min(sum(rows[:rank]), scored) for rank in range(len(rows) + 1)]


def _gather(ours: Tensor, group: Any) -> Tensor:
    gathered = [torch.empty_like(ours) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, ours, group=group)
    return torch.stack(gathered)
