"""The checks before step 1; each is against a fault that has cost somebody a run."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from opsdc.config.describe import ignored_settings
from opsdc.config.settings import OPSDCConfig
from opsdc.data.prompted import ProblemSets, PromptedSet
from opsdc.errors import ModelError
from opsdc.eval import plots
from opsdc.method.batch import Layout, Pair, plan_step, token_batch
from opsdc.method.teacher import Teacher
from opsdc.method.update import autocast, student_pass, teacher_pass
from opsdc.models.adapters import architecture, unwrap
from opsdc.models.head import check_head, evaluating, hidden_states, read_head
from opsdc.models.load import VARIABLE_LENGTH, padding_id
from opsdc.models.positions import longest_sequence
from opsdc.planner.room import check_disk, check_memory
from opsdc.ranks import shard
from opsdc.ranks.talk import ALONE, Ranks, is_out_of_memory
from opsdc.record.proof import check_saving
from opsdc.rollout.base import AGREEMENT, Request, Rollout, Sampler, SamplingParams, difference

_PACKED_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest relative difference between packed and single forwards, which add in another order; above
it neighbours leak."""

_PROMPTS = 3
"""Number of prompts that the checks take."""

_RESPONSE_TOKENS = 8
"""Tokens of each response in the checks: enough for a cache or a position off by one to show."""

_SAME_PROMPT_LIMIT = 1e-6
"""Largest divergence in nats per token of equal weights behind equal prompts, which should be 0."""


def check_prompts(model: Any, sets: ProblemSets, config: OPSDCConfig) -> None:
    """Raise ModelError for prompts that the model has no embeddings or no positions for."""
    embedding: Any = unwrap(model).get_input_embeddings()
    rows = len(embedding.weight)
    largest_id = max(problems.largest_id for problems in sets)
    if largest_id >= rows:
        raise ModelError(
            f"a prompt holds the token id {largest_id}, and the model's embedding has {rows} rows: "
            "the tokenizer is of another model, or has tokens of its own; give the model's own, or "
            "call model.resize_token_embeddings(len(tokenizer)) and train them"
        )
    limit = longest_sequence(model)
    new = {"rollout.max_new_tokens": (sets.training, config.rollout.max_new_tokens)}
    if config.eval.problems != 0 and (len(sets.held_out) or len(sets.gate)):
        both = max(sets.held_out, sets.gate, key=lambda problems: problems.longest)
        new["eval.max_new_tokens"] = (both, config.eval.max_new_tokens)
    for setting, (problems, tokens) in new.items():
        length = problems.longest + tokens
        if limit is not None and length > limit[0]:
            raise ModelError(
                f"{setting} {tokens} makes sequences of up to {length} tokens with the longest "
                f"prompt, and {architecture(model)} is to have {limit[0]} at most: {limit[1]}; "
                f"lower it to {limit[0] - problems.longest}, or prompt.max_tokens"
            )


@torch.no_grad()
def length_difference(model: Any, ids: list[int], first: int, dtype: torch.dtype) -> float:
    """Measure how much the first hidden states of a long sequence depend on what follows.

    Returns the median over the first tokens of the relative difference: single ones may differ
    where an expert is chosen by a hair. Raises ModelError for a sequence too long for the model.
    """
    device = read_head(model).weight.device

    def run(part: list[int]) -> torch.Tensor:
        with autocast(device, dtype):
            batch = token_batch([(part[:1], part[1:])], packed=False, pad_id=0, device=device)
            return hidden_states(model, batch).float()

    try:
        long = run(ids)[: first - 1]
    except (IndexError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise ModelError(
            f"{architecture(model)} cannot compute the {len(ids)} tokens of a sequence of full "
            f"length: {error}; lower rollout.max_new_tokens or prompt.max_tokens"
        ) from error
    alone = run(ids[:first])
    return float(((long - alone).norm(dim=1) / alone.norm(dim=1).clamp_min(1e-30)).median())


def check_length(model: Any, sequences: list[list[int]], length: int, config: OPSDCConfig) -> str:
    """Run a sequence of the run's own length; return a line for the log.

    Raises ModelError where its beginning then is not computed as it is by itself.
    """
    dtype = getattr(torch, config.model.dtype)
    short = min(sequences, key=len)
    with evaluating(model):
        difference = length_difference(model, _repeated(short, length), len(short), dtype)
    if not difference <= _PACKED_TOLERANCE[dtype]:
        raise ModelError(
            f"the beginning of a sequence of {length} tokens is computed otherwise than by itself "
            f"(relative difference {difference:.1e}): the model looks at the length, or at later "
            "tokens, so sampler and trainer cannot agree; lower rollout.max_new_tokens, or use a "
            "causal model"
        )
    return f"length: {length} tokens begin as fewer do to {difference:.1e}"


def _repeated(ids: list[int], length: int) -> list[int]:
    """Return the ids over and over, up to a length."""
    return (ids * -(-length // len(ids)))[:length]


def check_other(
    module: Any, sequences: list[list[int]], length: int, config: OPSDCConfig
) -> list[str]:
    """Check another model that teaches, as the student is; return lines for the log.

    Raises ModelError for one that the loss does not describe, or with too few positions.
    """
    limit = longest_sequence(module)
    if limit is not None and length > limit[0]:
        raise ModelError(
            f"teacher.model {config.teacher.model} is to have {limit[0]} tokens at most: "
            f"{limit[1]}; the longest prompt and response have {length}: lower prompt.max_tokens, "
            "rollout.max_new_tokens or train.max_train_tokens"
        )
    difference = check_head(module)
    return [
        f"teacher: {architecture(module)} for itself, its own logits to {difference:.1e}",
        f"teacher's {check_length(module, sequences, length, config)}",
    ]


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


def check_same_prompt(
    model: Any,
    teacher: Teacher,
    pairs: list[Pair],
    layout: Layout,
    config: OPSDCConfig,
    ranks: Ranks = ALONE,
) -> list[str]:
    """Raise ModelError unless equal weights agree behind equal prompts; return what to print."""
    args, lines = (model, teacher, pairs, layout, config, ranks), []
    divergence = same_prompt_divergence(*args)
    if not divergence <= _SAME_PROMPT_LIMIT:
        noisy = divergence
        with evaluating(model):
            divergence = same_prompt_divergence(*args)
        lines.append(
            f"dropout: {noisy:.1e} nats per token of every loss come from the student's; teacher "
            "and sampler have none"
        )
    lines.append(f"same prompt on both sides: {divergence:.1e} nats per token")
    if not divergence <= _SAME_PROMPT_LIMIT:
        raise ModelError(
            f"the same prompt on both sides gives a divergence of {divergence:.1e} nats per token "
            "instead of 0: teacher and student do not compute alike. An attention implementation "
            "that is not deterministic would do that; use another model.attn_implementation"
        )
    return lines


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


def check_sampler(
    sampler: Sampler, model: Any, pairs: list[Pair], config: OPSDCConfig, length: int = 0
) -> str:
    """Sample a few tokens, compare the sampler's log-probabilities of them with the trainer's.

    The prompts share batches as the run's do, with padding between them; one more is as long as
    leaves a sequence of `length`.

    Returns a line for the log. Raises ModelError where they differ, since rollouts would come from
    another model than is trained, or are not finite.
    """
    # An engine has no room for responses longer than a rollout's.
    new = min(_RESPONSE_TOKENS, config.rollout.max_new_tokens)
    params = SamplingParams(max_new_tokens=new, batch_size=config.rollout.batch_size)
    prompts = [list(p.student_prompt_ids) for p in pairs]
    for i in range(1, len(prompts)):
        # No two alike in length, so that any two of them in a batch need padding.
        lengths = {len(ids) for ids in prompts[:i]}
        while len(prompts[i]) > 1 and len(prompts[i]) in lengths:
            prompts[i] = prompts[i][1:]
    rollouts: list[Rollout] = []
    for group in (prompts, [_repeated(prompts[0], length - new)]):
        requests = [
            Request(key=f"preflight/{len(rollouts) + i}", prompt_ids=ids)
            for i, ids in enumerate(group)
            if ids
        ]
        rollouts += sampler.generate(requests, params, label="preflight") if requests else []
    dtype = getattr(torch, config.model.dtype)
    trainer_logprobs: list[float] = []
    sampler_logprobs: list[float] = []
    for r in rollouts:
        trainer_logprobs += response_logprobs(model, r.prompt_ids, r.response_ids, dtype)
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
            "Use rollout.batch_size 1, another rollout.engine, or model.attn_implementation eager"
        )
    return f"sampler: the trainer's log p of {count} sampled tokens to {largest:.1e} nats"


@torch.no_grad()
def response_logprobs(
    model: Any, prompt_ids: Sequence[int], response_ids: Sequence[int], dtype: torch.dtype
) -> list[float]:
    """Return the log-probabilities of a response by the forward and the head that train."""
    device = read_head(model).weight.device
    batch = token_batch([(prompt_ids, response_ids)], packed=False, pad_id=0, device=device)

    def logits() -> torch.Tensor:
        return read_head(model).logits(hidden_states(model, batch)).float()

    with evaluating(model), autocast(device, dtype):
        rows = shard.as_forward(model, logits)
    return rows.log_softmax(1).gather(1, batch.targets[:, None])[:, 0].tolist()


def before_sampling(model: Any, sets: ProblemSets, config: OPSDCConfig, ranks: Ranks) -> None:
    """Run the checks that need no sampler; raise ModelError for one that fails."""
    check_prompts(model, sets, config)
    check_saving(model, config.output_dir, ranks)


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
    """Run all checks on the run's first prompts and print what they say, in one line or in many.

    Returns the layout to train with. `step` is the number of updates that the model has seen.
    Raises ModelError or CheckpointError for a check that fails.
    """
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
        pad_id=padding_id(model, tokenizer),
        teacher_is_student=teacher.equals_student(step),
        length=problems.longest + _trained_tokens(config),
        ranks=ranks,
    )
    if not config.log.verbose:
        loud = [line for line in lines if line.startswith("dropout")]
        lines = [*loud, f"checks before step 1 passed (-v lists them); {lines[-1]}"]
    for line in [*ignored_settings(config), *lines, plots.no_picture()]:
        if line:
            print(line, flush=True)
    return layout


def _trained_tokens(config: OPSDCConfig) -> int:
    """Return the most tokens of a response that are trained on."""
    sampled = config.rollout.max_new_tokens
    return min(sampled, config.train.max_train_tokens or sampled)


def run(
    model: Any,
    teacher: Teacher,
    sampler: Sampler,
    pairs: list[Pair],
    config: OPSDCConfig,
    *,
    pad_id: int,
    teacher_is_student: bool,
    length: int = 0,
    ranks: Ranks = ALONE,
) -> tuple[Layout, list[str]]:
    """Run all checks on a few prompts; return the layout to train with and a line for each check.

    `teacher_is_student` says that both have the same weights now: at the start, or right after a
    refresh. `length` is that of the longest sequence to train on, prompt included. Raises
    ModelError or CheckpointError for a check that fails.
    """
    check_attention(model)
    sequences = [[*p.student_prompt_ids, *p.response_ids] for p in pairs]
    length = max(length, *map(len, sequences))
    with shard.gathered(model):
        difference = check_head(model)
        by_length = check_length(model, sequences, length, config)
        packed, why = choose_packing(model, config, sequences)
    by_another: list[str] = []
    if teacher.is_other:
        with teacher.weights():
            by_another = check_other(teacher.module, sequences, length, config)
            if packed:
                packed, why = choose_packing(teacher.module, config, sequences)
    layout = Layout(
        packed=packed,
        max_tokens=config.train.max_tokens_per_micro_batch,
        pad_id=pad_id,
        dtype=getattr(torch, config.model.dtype),
    )
    lines = [
        f"head: the model's own logits to {difference:.1e}",
        by_length,
        *by_another,
        f"layout: {why}, at most {layout.max_tokens} tokens a forward",
        check_disk(model, teacher, config),
        check_memory(model, config, ranks, teacher.module if teacher.is_other else None),
        f"prompts: student's and teacher's end in the same {common_suffix(pairs)} tokens",
        check_sampler(sampler, model, pairs, config, length),
    ]
    if teacher_is_student:
        lines += check_same_prompt(model, teacher, pairs, layout, config, ranks)
    if teacher.is_other:
        lines.append("same prompt on both sides: not tried, another model teaches (teacher.model)")
    return layout, lines
