"""Real gloo processes that call the vocabulary-parallel loss, and the whole head beside them.

Three processes serve all tests of a session; a test sends them a function of its file. Equality is
to 1e-6 of a tensor's size plus the conditioning of fp32 logits, see `bound`.
"""

from __future__ import annotations

import dataclasses
import datetime
import math
import traceback

import torch
import torch.distributed as dist

from helpers.kernels import case_of, results

WORLD = 3
N, D, V = 24, 48, 1003
CUTS = {2: [0, 402, V], 3: [0, 335, 335, V], 1: [0, V]}
"""Uneven, and the second of three ranks holds nothing."""


def serve(rank, store, pipe):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD,
        timeout=datetime.timedelta(seconds=60),
    )  # fmt: skip
    groups = {WORLD: dist.group.WORLD, 2: dist.new_group([0, 1]), 1: dist.new_group([0])}
    while (job := pipe.recv()) is not None:
        function, size, arguments = job
        try:
            pipe.send(function(groups[size], **arguments) if rank < size else None)
        except Exception as error:
            error.add_note(traceback.format_exc())
            pipe.send(error)
    dist.destroy_process_group()


class Ranks:
    """ranks(function, size, **arguments): what function(group, **arguments) gives on each rank."""

    def __init__(self, store):
        context = torch.multiprocessing.get_context("spawn")
        self.pipes, self.processes = [], []
        for rank in range(WORLD):
            pipe, theirs = context.Pipe()
            process = context.Process(target=serve, args=(rank, store, theirs), daemon=True)
            process.start()
            self.pipes.append(pipe)
            self.processes.append(process)

    def __call__(self, function, size, **arguments):
        for pipe in self.pipes:
            pipe.send((function, size, arguments))
        answers = []
        for rank, pipe in enumerate(self.pipes):
            assert pipe.poll(100), f"rank {rank} hangs"
            answers.append(pipe.recv())
        errors = [x for x in answers if isinstance(x, Exception)]
        if errors:
            raise errors[0]
        return answers[:size]

    def close(self):
        for pipe in self.pipes:
            pipe.send(None)
        for process in self.processes:
            process.join(20)
            assert process.exitcode == 0


def call(case, upstream=1.0, trainable_head=True, **options):
    """As `helpers.kernels.results`, of a case."""
    tensors = (case.student_hidden, case.student_weight, case.teacher_hidden, case.teacher_weight)
    return results(tensors, upstream, (True, trainable_head, trainable_head), **options)


def sharded(group, case, **options):
    """As `call`, with this rank's rows of the heads; dW and db are those rows'."""
    cuts = CUTS[group.size()]
    rows = slice(cuts[group.rank()], cuts[group.rank() + 1])
    other = case.teacher_weight
    part = dataclasses.replace(
        case,
        student_weight=case.student_weight[rows],
        teacher_weight=None if other is None else other[rows],
    )
    for name in ("student_bias", "teacher_bias"):
        if options.get(name) is not None:
            options[name] = options[name][rows]
    return call(part, process_group=group, **options)


def whole(results):
    """One result of all ranks': what is replicated is the same bits, the rest is put together."""
    for other in results[1:]:
        for i, (a, b) in enumerate(zip(results[0], other, strict=True)):
            assert i in (2, 3) or a is b is None or torch.equal(a, b), f"ranks differ in result {i}"
    found = list(results[0])
    for i in (2, 3):
        found[i] = None if found[i] is None else torch.cat([x[i] for x in results])
    return found


def make_case(entropy, kl, dtype=torch.float32, *, shared, **options):
    return case_of(
        tokens=N, dim=D, vocab_size=V, entropy=entropy, kl=kl, dtype=dtype, shared_head=shared,
        **options,
    )  # fmt: skip


def bound(case, kl, dtype):
    """Of equality: 1e-6, plus what the rounding of fp32 logits z does: 3e-7·max|z|, divided by
    √(2·KL) where logits of two heads are subtracted."""
    if dtype == torch.float64:
        return 1e-12 * (1 if case.teacher_weight is None else 1 + 1e-3 / math.sqrt(2 * kl))
    z = float((case.student_hidden.double() @ case.student_weight.double().T).abs().max())
    return 1e-6 + 3e-7 * z / (1 if case.teacher_weight is None else min(math.sqrt(2 * kl), 1))


def differences(got, want):
    """Relative to a tensor's size."""
    return [
        0.0 if b is None else float((a.double() - b).norm() / max(float(b.norm()), 1e-300))
        for a, b in zip(got, (x if x is None else x.double() for x in want), strict=True)
    ]
