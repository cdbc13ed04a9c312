"""The checks before step 1; each is against a fault that has cost somebody a run."""

from __future__ import annotations

import itertools
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from opsdc.config.describe import ignored_settings
from opsdc.config.settings import OPSDCConfig
from opsdc.data.prompted import PromptedSet
from opsdc.errors import CheckpointError, ModelError
from opsdc.eval import plots
from opsdc.method.batch import Layout, Pair, plan_step, token_batch
from opsdc.method.teacher import Teacher
from opsdc.method.update import autocast, student_pass, teacher_pass
from opsdc.models.adapters import unwrap
from opsdc.models.head import check_head, hidden_states, read_head
from opsdc.models.load import VARIABLE_LENGTH
from opsdc.planner.plan import loss_plan
from opsdc.planner.sizes import sizes_of
from opsdc.ranks import shard
from opsdc.ranks.talk import ALONE, Ranks
from opsdc.record import checkpoint
from opsdc.rollout.base import AGREEMENT, Request, Sampler, SamplingParams, difference
from opsdc.rollout.weights import sequence_logprobs

_PACKED_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest relative difference between packed and single forwards, which add in another order; above
it neighbours leak."""

_PROMPTS = 3
"""Number of prompts that the checks take."""

_RESPONSE_TOKENS = 8
"""Tokens of each response in the checks: enough for a cache or a position off by one to show."""

_SAME_PROMPT_LIMIT = 1e-6
"""Largest divergence in nats per token of equal weights behind equal prompts, which should be 0."""


def check_attention(model: Any) -> None:
    """Raise ModelError for an attention that can sample on this device, but not learn."""
    attention = unwrap(model).config._attn_implementation
    if attention == "flex_attention" and read_head(model).weight.device.type == "cpu":
        raise ModelError(
            "model.attn_implementation flex_attention: torch has no backward of it on a CPU; use "
            "sdpa"
        )


@torch.no_grad()
def packing_difference(model: Any, sequences: list[list[int]], dtype: torch.dtype) -> float:
    """Measure how much packed sequences differ from single ones in their hidden states.

    Returns the largest difference relative to the largest value. transformers isolates packed
    neighbours only on some attention paths and for some architectures; elsewhere they leak into
    each other silently.
    """
    device = read_head(model).weight.device

    def run(parts: list[tuple[list[int], list[int]]]) -> torch.Tensor:
        with autocast(device, dtype):
            batch = token_batch(parts, packed=True, pad_id=0, device=device)
            return hidden_states(model, batch).float()

    parts = [(ids[:1], ids[1:]) for ids in sequences]
    single = torch.cat([run([part]) for part in parts])
    return float((run(parts) - single).abs().max() / single.abs().max().clamp_min(1e-30))


def choose_packing(model: Any, config: OPSDCConfig, sequences: list[list[int]]) -> tuple[bool, str]:
    """Decide whether to pack, and say why in a clause; raise ModelError where "on" would leak."""
    wanted = config.train.packing
    if wanted == "off":
        return False, "padded batches (train.packing off)"
    attention = unwrap(model).config._attn_implementation
    if wanted == "auto" and attention not in VARIABLE_LENGTH:
        return False, f"padded batches ({attention} attention would pay for foreign blocks)"
    dtype = getattr(torch, config.model.dtype)
    difference = packing_difference(model, sequences, dtype)
    if difference <= _PACKED_TOLERANCE[dtype]:
        return True, f"packed rows (packed equals single to {difference:.1e})"
    if wanted == "on":
        raise ModelError(
            f"train.packing on: packed neighbours leak into each other in "
            f"{type(unwrap(model)).__name__} with {attention} attention (relative difference "
            f"{difference:.1e}); use off"
        )
    return False, f"padded batches (packed neighbours leak: {difference:.1e})"


def same_prompt_divergence(
    model: Any,
    teacher: Teacher,
    pairs: list[Pair],
    layout: Layout,
    config: OPSDCConfig,
    ranks: Ranks = ALONE,
) -> float:
    """Measure the loss in nats with the student's prompt on both sides: 0 for equal weights."""
    same = [
        Pair(
            student_prompt_ids=p.student_prompt_ids,
            teacher_prompt_ids=p.student_prompt_ids,
            against_prompt_ids=p.student_prompt_ids,
            response_ids=p.response_ids,
        )
        for p in pairs
    ]
    plan = plan_step(
        same, layout, normalization=config.loss.normalization, contexts=teacher.contexts,
        rank=ranks.rank, ranks=ranks.size,
    )  # fmt: skip
    teacher_hidden = teacher_pass(model, teacher, plan, ranks=ranks)
    loss, *_ = student_pass(model, teacher, plan, teacher_hidden, config, ranks=ranks)
    for parameter in model.parameters():
        parameter.grad = None
    return loss


def common_suffix(pairs: list[Pair]) -> int:
    """Count the tokens in which both prompts of each pair end alike.

    It is at least the generation suffix: building prompts refuses two that differ there.
    """

    def length(pair: Pair) -> int:
        ends = zip(
            reversed(pair.student_prompt_ids), reversed(pair.teacher_prompt_ids), strict=False
        )
        return sum(1 for _ in itertools.takewhile(lambda end: end[0] == end[1], ends))

    return min(map(length, pairs))


def check_sampler(sampler: Sampler, model: Any, pairs: list[Pair], config: OPSDCConfig) -> str:
    """Sample a few tokens, compare the sampler's log-probabilities of them with the trainer's.

    Returns a line for the log. Raises ModelError where they differ, since rollouts would come from
    another model than is trained, or are not finite.
    """
    prompts = [list(p.student_prompt_ids) for p in pairs]
    requests = [Request(key=f"preflight/{i}", prompt_ids=ids) for i, ids in enumerate(prompts)]
    # An engine has no room for responses longer than a rollout's.
    params = SamplingParams(max_new_tokens=min(_RESPONSE_TOKENS, config.rollout.max_new_tokens))
    dtype = getattr(torch, config.model.dtype)
    trainer_logprobs: list[float] = []
    sampler_logprobs: list[float] = []
    for r in sampler.generate(requests, params, label="preflight"):
        logprobs = sequence_logprobs(model, [*r.prompt_ids, *r.response_ids], dtype)
        trainer_logprobs += logprobs[len(logprobs) - len(r.response_ids) :]
        sampler_logprobs += r.logprobs or ()
    count = len(trainer_logprobs)
    if not all(map(math.isfinite, trainer_logprobs)):
        raise ModelError(
            f"the model's own log-probabilities of {count} tokens are not finite: its weights "
            "hold NaN or infinity, or model.dtype overflows; use float32, or another model"
        )
    mean, largest = difference(trainer_logprobs, sampler_logprobs)
    limits = AGREEMENT[dtype]
    if not (mean <= limits[0] and largest <= limits[1]):
        raise ModelError(
            f"the sampler's log-probabilities of {count} tokens that it sampled are "
            f"{mean:.1e} nats from the trainer's on average and {largest:.1e} at most (allowed: "
            f"{limits[0]:.0e} and {limits[1]:.0e}): it samples from another model than is trained. "
            "Use another rollout.engine, or model.attn_implementation eager"
        )
    return f"sampler: the trainer's log p of {count} sampled tokens to {largest:.1e} nats"


def check_disk(model: Any, teacher: Teacher, config: OPSDCConfig) -> str:
    """Compare free disk space with the checkpoints that are kept and the one being written.

    Returns a line for the log. Raises CheckpointError where there is less: the run would fail hours
    later.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    saved = trained if hasattr(model, "peft_config") else list(model.parameters())
    weights = sum(p.numel() * p.element_size() for p in saved)
    moments = 2 * sum(p.numel() * p.element_size() for p in trained)
    size = weights * (1 if teacher.is_student else 2) + moments
    saves = -(-config.train.steps // config.train.save_every) if config.train.save_every else 1
    folder = Path(config.output_dir) / "checkpoints"
    wanted = min(config.train.keep + 1, saves)
    needed = size * max(wanted - len(checkpoint.listing(folder)), 1)
    # The folder itself is made with the first checkpoint.
    parent = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(parent).free
    line = (
        f"disk: {needed / 2**30:.2f} GiB for checkpoints of {size / 2**30:.2f} GiB, "
        f"{free / 2**30:.2f} GiB free in {parent}"
    )
    if needed > free:
        raise CheckpointError(
            f"{line}: too little; free some, lower train.keep, or name another output_dir"
        )
    return line


def check_memory(model: Any, config: OPSDCConfig, ranks: Ranks = ALONE) -> str:
    """Compare free memory with gradients, moments and the loss; activations are not counted.

    Returns a line for the log, which only warns where there is less: activations depend on
    attention and checkpointing, and free memory on other programs.
    """
    device, sizes = read_head(model).weight.device, sizes_of(model, config.model)
    # A forward holds at most so many response tokens.
    tokens = config.train.max_tokens_per_micro_batch
    plan = loss_plan(sizes, config, tokens, device, config.loss.workspace_bytes)
    # Gradients and two moments in float32.
    held = 12 * sizes.trained // (ranks.size if shard.is_sharded(model) else 1)
    needed = held + plan.peak_bytes
    free = _free_bytes(device)
    line = (
        f"memory: {needed / 2**30:.2f} GiB for gradients, moments and the loss beside activations, "
        + ("free unknown" if free is None else f"{free / 2**30:.2f} GiB free")
    )
    if free is not None and needed > free:
        return (
            f"warning: {line}; lower train.max_tokens_per_micro_batch or loss.workspace_bytes, or "
            "train an adapter (model.lora)"
        )
    return line


def _free_bytes(device: torch.device) -> int | None:
    """Return the free memory of a GPU or of this machine; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
    except OSError:
        return None
    return next((int(x.split()[1]) << 10 for x in lines if x.startswith("MemAvailable")), None)


def before_first_step(
    model: Any,
    teacher: Teacher,
    sampler: Sampler,
    problems: PromptedSet,
    tokenizer: PreTrainedTokenizerBase,
    config: OPSDCConfig,
    *,
    step: int,
    ranks: Ranks = ALONE,
) -> Layout:
    """Run all checks on the run's first prompts and print a line for each.

    Returns the layout to train with. `step` is the number of updates that the model has seen.
    Raises ModelError or CheckpointError for a check that fails.
    """
    pad = tokenizer.pad_token_id
    sample = [
        # The prompt's own tokens stand in for a response: no sampling before the checks.
        Pair(
            student_prompt_ids=p.prompts.student_ids,
            teacher_prompt_ids=p.prompts.teacher_ids,
            response_ids=p.prompts.student_ids[:_RESPONSE_TOKENS],
        )
        for p in (problems[i] for i in range(min(_PROMPTS, len(problems))))
    ]
    layout, lines = run(
        model,
        teacher,
        sampler,
        sample,
        config,
        pad_id=0 if pad is None else pad,
        teacher_is_student=teacher.equals_student(step),
        ranks=ranks,
    )
    for line in [*ignored_settings(config), *lines, plots.no_picture()]:
        if line:
            print(line, flush=True)
    return layout


def run(
    model: Any,
    teacher: Teacher,
    sampler: Sampler,
    pairs: list[Pair],
    config: OPSDCConfig,
    *,
    pad_id: int,
    teacher_is_student: bool,
    ranks: Ranks = ALONE,
) -> tuple[Layout, list[str]]:
    """Run all checks on a few prompts; return the layout to train with and a line for each check.

    `teacher_is_student` says that both have the same weights now: at the start, or right after a
    refresh. Raises ModelError or CheckpointError for a check that fails.
    """
    check_attention(model)
    sequences = [[*p.student_prompt_ids, *p.response_ids] for p in pairs]
    with shard.gathered(model):
        difference = check_head(model)
        packed, why = choose_packing(model, config, sequences)
    layout = Layout(
        packed=packed,
        max_tokens=config.train.max_tokens_per_micro_batch,
        pad_id=pad_id,
        dtype=getattr(torch, config.model.dtype),
    )
    lines = [
        f"head: the model's own logits to {difference:.1e}",
        f"layout: {why}, at most {layout.max_tokens} tokens a forward",
        check_disk(model, teacher, config),
        check_memory(model, config, ranks),
        f"prompts: student's and teacher's end in the same {common_suffix(pairs)} tokens",
        check_sampler(sampler, model, pairs, config),
    ]
    if not teacher_is_student:
        return layout, lines
    divergence = same_prompt_divergence(model, teacher, pairs, layout, config, ranks)
    lines.append(f"same prompt on both sides: {divergence:.1e} nats per token")
    if not divergence <= _SAME_PROMPT_LIMIT:
        raise ModelError(
            f"the same prompt on both sides gives a divergence of {divergence:.1e} nats per token "
            "instead of 0: teacher and student do not compute alike. Dropout in the model's "
            "config, or an attention implementation that is not deterministic, would do that"
        )
    return layout, lines
