"""What the passes that leave vocabulary columns out share: chunk after chunk of tokens, the
gradient products with some columns, and the way back to all of them."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from opsdc_kernels import plan, products
from opsdc_kernels.chunked.run import (
    Gradients,
    Result,
    Tokens,
    chunk_of,
    other_logits_into,
    run_chunks,
    run_rows,
    student_logits_into,
    token_count,
)
from opsdc_kernels.columns import compiled
from opsdc_kernels.problem import GradientsWanted, Problem
from opsdc_kernels.row_pass.choose import choose

DENSE_SHARE = 0.45
"""From this share of columns on, gathering costs more than it saves. At most ½: the second logit
buffer holds the columns of student and teacher."""

Following = tuple[Tokens, Tensor] | None
"""The next chunk's tokens, and the buffer for their logits where those are to be on their way
before the host waits for this chunk's columns."""


class Chunks:
    """The chunks of a pass, and what they add to."""

    def __init__(
        self,
        problem: Problem,
        wanted: GradientsWanted,
        row_weight_N: Tensor | None,
        kept_K: Tensor | None,
        most_rows: int | None = None,
    ) -> None:
        self.problem, self.wanted = problem, wanted
        self.row_weight_N, self.kept_K = row_weight_N, kept_K
        self.count, self.size = token_count(problem, kept_K), problem.vocab_size
        self.row_pass = choose(problem.student_hidden.device, problem.dtype)
        sizes = plan.Sizes.of(problem, self.row_pass)
        self.height = plan.column_chunk_rows(
            self.count, sizes, problem.options.workspace_bytes, most_rows
        )
        # What was kept and spent, summed over the tokens.
        self.kept_columns = self.units = 0.0
        self.backward_units = wanted.hidden + wanted.weight
        # What comes with dW: rows that may not be 0, and whether it was written to at all.
        self.touched_V = torch.zeros(
            self.size, dtype=torch.bool, device=problem.student_weight.device
        )
        self.weight_written = self.dense = False

    @property
    def chunk_count(self) -> int:
        return -(-self.count // self.height)

    def run(
        self, chunk: Callable[[Tokens, Tensor, Tensor, Following], None], ahead: bool | None
    ) -> Result:
        """Run `chunk` with the tokens of each, the student's raw products and a spare buffer of
        their shape, until one sets `dense`; all columns for what is left.

        `ahead`: the student's logits of the next chunk are on their way before the host waits for
        this one's columns (None: on a GPU); takes a third buffer.
        """
        problem = self.problem
        if ahead is None:
            ahead = problem.student_hidden.is_cuda
        self.result = Result.empty(problem, self.wanted._replace(weight=False))
        if self.wanted.weight:
            self.result.weight_gradient = untouched_zeros(problem.student_weight, problem.dtype)
        products_wanted = self.wanted._replace(bias=False)
        self.gradients = Gradients(
            problem, products_wanted, self.result, self.row_weight_N, self.kept_K
        )
        starts = range(0, self.count, self.height)
        chunks = [self.tokens(i, i + self.height) for i in starts]
        spare, *logits = self.empty_logits(2 + ahead, min(self.height, self.count))
        for i, tokens in enumerate(chunks):
            if self.dense:  # once dense, always: what a choice costs would be lost again
                self._all_of_the_rest(starts[i])
                break
            here, there = (logits[j % len(logits)] for j in (i, i + 1))
            if i == 0 or not ahead:
                self.student_logits(tokens, here)
            following = (chunks[i + 1], there) if ahead and i + 1 < len(chunks) else None
            rows = count(tokens)
            chunk(tokens, here[:rows], spare[:rows], following)
        else:
            self.gradients.undo_lift_()
        return self.result

    def all_columns(self) -> Result:
        """Start again, and leave out none."""
        self.units += self.count * (2 + self.backward_units)
        self.kept_columns = float(self.count)
        self.result = run_chunks(self.problem, self.wanted, self.row_weight_N, self.kept_K)
        return self.result

    def _all_of_the_rest(self, start: int) -> None:
        """Run what is left with all columns."""
        self.gradients.undo_lift_()
        rest = self.tokens(start, self.count)
        if isinstance(rest, slice):
            rest = torch.arange(start, self.count, device=self.touched_V.device)
        run_chunks(self.problem, self.wanted, self.row_weight_N, rest, onto=self.result)
        self.touched_V.fill_(True)
        self.units += len(rest) * (2 + self.backward_units)
        self.kept_columns += len(rest)

    def tokens(self, start: int, stop: int) -> Tokens:
        return chunk_of(self.kept_K, start, min(stop, self.count))

    def empty_logits(self, count: int, rows: int) -> Tensor:
        weight, dtype = self.problem.student_weight, self.problem.dtype
        return products.empty_logits(weight, count, rows, self.size, dtype, self.row_pass.layout)

    def student_logits(self, tokens: Tokens, out_CV: Tensor) -> None:
        student_logits_into(out_CV[: count(tokens)], self.problem, tokens)

    def all_rows(self, tokens: Tokens, x_CV: Tensor, spare_CV: Tensor) -> Tensor:
        """dZ of all columns replaces `x_CV`, up to the factor returned [C, 1]."""
        other_logits_into(spare_CV, self.problem, tokens)
        self.units += count(tokens)
        return run_rows(self.row_pass, x_CV, spare_CV, self.problem, tokens, True, self.result)

    def multiply_back(
        self,
        tokens: Tokens,
        dz_CK: Tensor,
        scratch_CK: Tensor,
        scale_C1: Tensor,
        columns: Tensor | None,
    ) -> Tensor | None:
        """Add the gradients of a tile; `columns` None: of all. Returns what `Gradients.add`
        does."""
        share = 1.0 if columns is None else len(columns) / self.size
        self.kept_columns += count(tokens) * share
        self.units += count(tokens) * self.backward_units * share
        if self.result.bias_gradient is not None:
            scale_C = scale_C1.squeeze(1)
            if self.row_weight_N is not None:
                scale_C = scale_C * self.row_weight_N[tokens]
            bias_K = dz_CK.T @ scale_C
            if columns is None:
                self.result.bias_gradient[: self.size] += bias_K
            else:
                self.result.bias_gradient.index_add_(0, columns, bias_K)
        gradient, add_rows = self.result.weight_gradient, products.add_rows_
        if gradient is not None and gradient.stride(1) == 1 and compiled.serves(gradient):
            add_rows = partial(compiled.add_rows_, touched_V=self.touched_V)
        square_K = self.gradients.add(
            tokens, dz_CK, scratch_CK, scale_C1, first=not self.weight_written, columns=columns,
            add_rows=add_rows,
        )  # fmt: skip
        if self.backward_units:
            self.weight_written = True
            self.touched_V[slice(None) if columns is None else columns] = True
        return square_K

    def weight_gradient_norm(self) -> Tensor:
        """‖dW, db‖, 0-dim; of dW what was written to."""
        result = self.result
        norms = [] if result.bias_gradient is None else [result.bias_gradient.norm()]
        if result.weight_gradient is not None and self.kept_columns < self.count:
            touched = self.touched_V.nonzero().squeeze(1)
            blocks = products.row_blocks(result.weight_gradient, result.values.dtype, touched)
            norms += [block.norm() for _, block in blocks]
        return torch.stack(norms).norm() if norms else result.values.new_zeros(())


def untouched_zeros(weight_VD: Tensor, dtype: torch.dtype) -> Tensor:
    """Zeros of the weight's shape. A CPU's come as the system's pages of zeros, which take neither
    time nor memory before they are written to: most of dW never is."""
    if weight_VD.device.type != "cpu" or not weight_VD.numel():
        return torch.zeros_like(weight_VD, dtype=dtype, memory_format=torch.contiguous_format)
    if not hasattr(mmap, "MAP_PRIVATE"):
        return torch.zeros_like(weight_VD, dtype=dtype, memory_format=torch.contiguous_format)
    # Private pages: shared ones, the default, take longer to come.
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    pages = mmap.mmap(-1, weight_VD.numel() * dtype.itemsize, flags=private)
    return torch.frombuffer(pages, dtype=dtype).view(weight_VD.shape)


def count(tokens: Tokens) -> int:
    return tokens.stop - tokens.start if isinstance(tokens, slice) else len(tokens)
