"""`opsdc compress`: settings for the common case, from the model, its data and this machine.

The model answers a few prompts once, which says how long its answers are. The planner says what
fits: all weights, an adapter, or an adapter with activations computed again. Length is held by the
dial (`teacher.target`); where the data has answers, the step that is kept is chosen by them. A
setting that the user gives is never chosen here.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from operator import attrgetter
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from opsdc.config.fields import fields_of
from opsdc.config.settings import LoRAConfig, OPSDCConfig
from opsdc.config.yaml_file import with_settings
from opsdc.data.problem import Problem
from opsdc.data.prompted import PromptedSet, prompted_sets, read_problems
from opsdc.errors import ConfigError, DataError
from opsdc.eval.scorers import check_scorer
from opsdc.models import demo_model
from opsdc.models.load import load_model, load_tokenizer
from opsdc.models.positions import longest_sequence
from opsdc.planner.plan import make_plan
from opsdc.planner.report import largest_rows
from opsdc.ranks.talk import ALONE
from opsdc.rollout.base import Request, SamplingParams
from opsdc.rollout.hf import HFSampler

_HORIZONS = (256, 512, 1024)
"""Lengths at which responses may be cut; by the paper 1,024 tokens give about 95 % of the
compression, however long the answers are."""

_PROMPTS = 16
"""Problems that are answered to see how long answers are."""

_MOST = 0.75
"""A length is enough where at least this share of the answers ends within it."""

_SMALL = 1_000_000_000
"""Below so many parameters a model follows only short instructions, and takes larger steps."""

_SMALL_INSTRUCTION = (
    "Prioritize a correct answer above brevity. Be direct: no restating, no elaboration."
)
"""Small models follow this one; the paper's P2 asks for more."""

_SCORERS = ("number", "dual", "boxed", "exact")
"""Judges of answers; the first that takes all of the data's is used."""


def choose(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tree of settings of a run with `given` ones (by dotted name), and print why.

    Raises ConfigError where nothing that would train fits this machine, and the errors of loading
    the model and its data.
    """
    on_gpu = torch.cuda.is_available()
    settings = _start(given, on_gpu)
    # Without held-out problems all of them are there to be counted.
    counted = {"data.eval_size": 0, "data.gate_size": 0, "rollout.prompts_per_step": 1}
    bare = _config(settings | counted)
    read = read_problems(bare)
    tokenizer = load_tokenizer(bare.model)
    problems = prompted_sets(bare, tokenizer, read).training
    # Whole, the model would be loaded in float32: an adapter's base comes in the dtype asked for.
    model: Any = load_model(replace(bare.model, lora=bare.model.lora or LoRAConfig()))
    model.to(ALONE.device)
    is_small = sum(p.numel() for p in model.parameters()) < _SMALL
    settings = {
        "prompt.instruction": _SMALL_INSTRUCTION if is_small else "P2",
        "prompt.max_tokens": -(-problems.longest // 64) * 64,
        **_of_data(list(problems.problems), bare.train.steps, on_gpu),
        **settings,
    }
    if "rollout.max_new_tokens" not in settings:
        settings["rollout.max_new_tokens"] = horizon(model, tokenizer, problems, bare)
    config, limit = _config(settings), longest_sequence(model)
    twice = 2 * config.rollout.max_new_tokens
    room = limit[0] - problems.longest if limit else twice
    settings.setdefault("eval.max_new_tokens", max(min(twice, room), 1))
    architecture = model.config
    del model
    settings = _fitted(settings, architecture, is_small, on_gpu)
    config, order = _config(settings), list(fields_of(OPSDCConfig))
    # In the order of the page of settings, and a number given as a flag as a number.
    tree: dict[str, Any] = {}
    for key in sorted(settings, key=order.index):
        value = {} if key == "model.lora" else attrgetter(key)(config)
        tree = with_settings(tree, {key: list(value) if isinstance(value, tuple) else value})
    return tree


def _config(settings: Mapping[str, Any]) -> OPSDCConfig:
    return OPSDCConfig.from_dict(with_settings({}, settings), "compress")


def _start(given: Mapping[str, Any], on_gpu: bool) -> dict[str, Any]:
    """Return the settings that follow from nothing, with the given ones over them."""
    name = given["model.name_or_path"]
    settings = {
        "output_dir": f"runs/{re.split('[/:]', name.rstrip('/'))[-1] or 'model'}-concise",
        "model.name_or_path": name,
        "model.dtype": "bfloat16" if on_gpu else "float32",
        "rollout.temperature": 0.7,
        "teacher.mode": "frozen",
        "teacher.target": 0.5,
        # Minutes on a CPU; the paper's number of steps on a GPU.
        "train.steps": 100 if on_gpu else 8,
    }
    if name == demo_model.NAME:
        settings["data.source"] = "embedded:arithmetic"
    return settings | dict(given)


def _fitted(
    settings: dict[str, Any], architecture: PreTrainedConfig, is_small: bool, on_gpu: bool
) -> dict[str, Any]:
    """Return the settings with the first way to train that fits this machine."""
    memory = torch.cuda.get_device_properties(0).total_memory if on_gpu else None
    make = functools.partial(make_plan, memory_bytes=memory, architecture=architecture)
    for change in _ways(_config(settings), is_small):
        config = _config({**change, **settings})
        rows = largest_rows(config, make)
        if rows and make(config, rows=1).fits:
            break
    else:
        name = config.model.name_or_path
        raise ConfigError(
            f"{name} does not fit this machine, not even with an adapter and checkpointing; "
            f"opsdc plan --model {name} shows why"
        )
    plan = make(config, rows=min(rows, config.rollout.prompts_per_step))
    tokens = min(plan.rows * plan.width, config.train.max_tokens_per_micro_batch)
    how = "all weights" if config.model.lora is None else f"LoRA r {config.model.lora.r}"
    print(f"training: {how} in {config.model.dtype}, {tokens} tokens a forward, on this machine")
    return {"train.max_tokens_per_micro_batch": tokens, **change, **settings}


def _of_data(problems: Sequence[Problem], steps: int, on_gpu: bool) -> dict[str, Any]:
    """Return the settings that follow from the number of problems and from their answers."""
    count, answered = len(problems), all(p.answer is not None for p in problems)
    held_out, gate = min(128, count // 5), min(64, count // 10) if answered else 0
    settings: dict[str, Any] = {
        "data.eval_size": held_out,
        "data.gate_size": gate,
        "rollout.prompts_per_step": max(
            min(32 if on_gpu else 16, (count - held_out - gate) // 2), 1
        ),
        "eval.every": max(steps // 4, 1),
        "train.keep_best": bool(answered and (held_out or gate)),
    }
    print(
        f"data: {count} problems, {held_out} of them for the evaluation"
        + (f", {gate} for decisions" if answered else "; no answers: only lengths are compared")
    )
    if answered:
        settings["eval.scorer"] = _scorer(problems)
    return settings


def _scorer(problems: Sequence[Problem]) -> str:
    """Return the first judge that takes all answers."""
    if all(p.entry is not None for p in problems):
        return "reasoning_gym"
    for scorer in _SCORERS:
        try:
            check_scorer(scorer, problems, "eval.scorer")
        except (ConfigError, DataError):
            continue
        return scorer
    raise DataError("no scorer takes the answers of the data; name one with --eval.scorer")


def _ways(config: OPSDCConfig, is_small: bool) -> Iterator[dict[str, Any]]:
    """Yield the ways to train, from the one that changes most, with the learning rate of each."""
    adapter = {"model.lora": {}, "optim.lr": 2e-4 if is_small else 1e-5}
    if config.model.lora is None:
        yield {"optim.lr": 8e-6 if is_small else 1e-6}
    yield adapter
    yield adapter | {"model.gradient_checkpointing": True}


def horizon(
    model: Any, tokenizer: PreTrainedTokenizerBase, problems: PromptedSet, config: OPSDCConfig
) -> int:
    """Answer a few prompts, ever longer, until most answers end; return that length.

    It ends at 1,024 tokens, and where the model has no more positions.
    """
    limit = longest_sequence(model)
    room = limit[0] - problems.longest if limit else _HORIZONS[-1]
    sampler = HFSampler(model, tokenizer, seed=config.seed)
    sampler.push(model, 0)
    unfinished = [
        Request(key=f"compress/{i}", prompt_ids=problems[i].prompts.student_ids)
        for i in range(min(_PROMPTS, len(problems)))
    ]
    count = len(unfinished)
    for tokens in _HORIZONS:
        tokens = max(min(tokens, room), 1)
        params = SamplingParams(
            max_new_tokens=tokens,
            temperature=config.rollout.temperature,
            top_p=config.rollout.top_p,
            batch_size=config.rollout.batch_size,
        )
        # A response is keyed by its request: sampled longer, it begins as it did.
        rollouts = sampler.generate(unfinished, params, label=f"answers of {tokens} tokens")
        unfinished = [
            request
            for request, rollout in zip(unfinished, rollouts, strict=True)
            if not rollout.finished
        ]
        ended = 1 - len(unfinished) / count
        if ended >= _MOST or tokens == room:
            break
    print(f"answers: {count - len(unfinished)} of {count} end within {tokens} tokens")
    return tokens
