"""Any models on the same problems: answers, scores, and differences paired by problem.

An arm is a model with one of the two prompts. All arms get the same problems, the same cap, the
same seed and the same noise per problem; each model has its own tokenizer and chat template.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from opsdc.config.settings import OPSDCConfig
from opsdc.data.problem import ProblemSet
from opsdc.data.prompted import Prompted, PromptedSet, read_all
from opsdc.data.suites import load_suite, local_file, read_set
from opsdc.errors import ConfigError, DataError
from opsdc.eval.answers import Answer, answer, headline, one_line, write_answers
from opsdc.eval.compare import compare, in_characters, pass_at_1
from opsdc.eval.scorers import check_scorer
from opsdc.models.given import GivenModel
from opsdc.ranks.talk import ALONE
from opsdc.record.lines import write_json
from opsdc.record.versions import versions
from opsdc.rollout.start import start_sampler


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A model with one of the two prompts."""

    key: str
    """Name of its files."""
    title: str
    """Name in tables."""
    model: GivenModel
    prompt: str = "student"
    """"student": the plain prompt; "teacher": the one with the instruction."""


@dataclass(frozen=True, kw_only=True)
class Questions:
    """Problems under a name, with the judge of their answers."""

    name: str
    problems: ProblemSet
    scorer: str


def arms_of(models: Sequence[GivenModel], trained: GivenModel | None = None) -> list[Arm]:
    """Return the arms: of one model plain and told, of two models one each.

    `trained` is what training made of the one model, as a third arm.
    """
    if len(models) == 1:
        told = Arm(key="told", title="base, told to be concise", model=models[0], prompt="teacher")
        last = [] if trained is None else [Arm(key="trained", title="trained", model=trained)]
        return [Arm(key="base", title="base", model=models[0]), told, *last]
    titles = [model.short_name for model in models]
    if titles[0] == titles[1]:
        titles = [f"{key}: {model.name}" for key, model in zip("ab", models, strict=True)]
    return [
        Arm(key=key, title=title, model=model)
        for key, title, model in zip("ab", titles, models, strict=True)
    ]


def read_questions(config: OPSDCConfig, *, everything: bool) -> Questions:
    """Return the problems of `data.source`: as many as the settings say, or all of them.

    Raises DataError for more than there are, and the errors of `read_all`.
    """
    problems, limit = read_all(config), config.eval.problems
    if limit is not None and limit > len(problems):
        raise DataError(
            f"eval.problems {limit} of {len(problems)} problems; lower it or give more problems"
        )
    size = len(problems) if everything else config.data.eval_size
    drawn = problems.held_out(size)
    return Questions(name="", problems=_first(drawn, limit), scorer=config.eval.scorer)


def read_suite(
    name: str, config: OPSDCConfig, folder: Path | None, template: str | None
) -> tuple[list[Questions], dict[str, str]]:
    """Return the sets of a suite that are here or on the Hub, and why each other one is left out.

    Args:
        folder: Local files, which win over the Hub.
        template: Layout of all prompts, in the place of the suite's own.

    Raises DataError for a local file that cannot be used, and where no set is left.
    """
    found: list[Questions] = []
    skipped: dict[str, str] = {}
    with _remembering_that_it_is_offline() as remember:
        for s in load_suite(name):
            file = local_file(s, folder)
            try:
                problems = read_set(s, file, config.seed, template)
            except DataError as error:
                if file is not None:
                    raise
                remember(error)
                skipped[s.name] = (
                    f"the Hub does not give {s.hub} ({_reason(error)}); put {s.name}.jsonl into a "
                    "folder for --suite_dir or OPSDC_DATA"
                )
                print(f"{s.name} left out: {skipped[s.name]}", file=sys.stderr, flush=True)
                continue
            limit = config.data.eval_size if config.eval.problems is None else config.eval.problems
            drawn = problems.held_out(min(limit, len(problems)))
            found.append(Questions(name=s.name, problems=drawn, scorer=s.scorer))
            origin = file or s.hub
            print(f"{s.name}: {len(drawn)} of {len(problems)} problems, {origin}", flush=True)
    if not found:
        raise DataError(f"--suite {name}: no set of it is here; see the lines above")
    return found, skipped


@contextlib.contextmanager
def _remembering_that_it_is_offline() -> Iterator[Callable[[DataError], None]]:
    """Give a function that takes errors: after one of the network only the Hub's cache is asked.

    Else each set would wait half a minute for a network that is not there.
    """
    import datasets

    before = datasets.config.HF_HUB_OFFLINE

    def remember(error: DataError) -> None:
        if isinstance(error.__cause__, ConnectionError):
            datasets.config.HF_HUB_OFFLINE = True

    try:
        yield remember
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _reason(error: BaseException) -> str:
    """Return the first words of what went wrong below an error."""
    cause = error.__cause__ or error
    text = " ".join(str(cause).split())
    return f"{type(cause).__name__}: {text[:80]}{'…' if len(text) > 80 else ''}"


def check_free(folder: Path) -> None:
    """Raise ConfigError where a folder holds something already, such as another evaluation."""
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise ConfigError(
            f"output_dir {folder} is there already, with another evaluation perhaps: name another "
            "--output_dir, or remove it"
        )


def evaluate(
    arms: Sequence[Arm],
    questions: Sequence[Questions],
    config: OPSDCConfig,
    *,
    cap_is_given: bool,
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """Answer all questions in all arms, into `config.output_dir`; write and return the summary.

    Everything that needs no weights is checked before any are loaded. Raises ConfigError for a cap
    (if it `cap_is_given`) beyond a model's positions, DataError where no problem is left,
    ModelError for a model that does not load, and the errors of `answer`.
    """
    for asked in questions:
        answered = [p for p in asked.problems if p.answer is not None]
        check_scorer(asked.scorer, answered, "eval.scorer")
    tokenizers: dict[str, PreTrainedTokenizerBase] = {}
    prompts: dict[str, list[list[Prompted]]] = {}
    for arm in arms:
        if arm.model.name not in prompts:
            tokenizers[arm.model.name] = arm.model.tokenizer()
            prompts[arm.model.name] = [
                _prompted(asked, tokenizers[arm.model.name], config) for asked in questions
            ]
    _keep_common(prompts, questions)
    config = _capped(arms, prompts, config, cap_is_given)
    found: dict[tuple[int, str], list[Answer]] = {}
    for _, group in groupby(arms, key=lambda arm: arm.model.name):
        of_model = list(group)
        name = of_model[0].model.name
        found |= _answer(of_model, questions, prompts[name], tokenizers[name], config)
    summary = {
        **facts,
        "models": {arm.key: {"title": arm.title, "name": arm.model.name} for arm in arms},
        "same_tokens": _same(list(tokenizers.values()), questions),
        "sets": [
            {
                "name": asked.name,
                "scorer": asked.scorer,
                **_compared({arm.key: found[i, arm.key] for arm in arms}, config.seed),
            }
            for i, asked in enumerate(questions)
        ],
        "eval": dataclasses.asdict(config.eval),
        "versions": versions(),
        "settings": config.to_dict(),
    }
    write_json(Path(config.output_dir) / "summary.json", summary)
    return summary


def _first(problems: ProblemSet, limit: int | None) -> ProblemSet:
    return ProblemSet(list(problems)[:limit], seed=problems.seed)


def _prompted(
    asked: Questions, tokenizer: PreTrainedTokenizerBase, config: OPSDCConfig
) -> list[Prompted]:
    prompted = PromptedSet(asked.problems, tokenizer, config).within_limit(asked.name or "data")
    return [prompted[i] for i in range(len(prompted))]


def _keep_common(prompts: dict[str, list[list[Prompted]]], questions: Sequence[Questions]) -> None:
    """Keep the problems whose prompts are short enough for every model: all get the same ones."""
    for i, asked in enumerate(questions):
        sets = [{item.problem.id for item in of_model[i]} for of_model in prompts.values()]
        common = set.intersection(*sets)
        if not common:
            raise DataError(f"no problems of {asked.name or 'data.source'} are left to answer")
        for of_model in prompts.values():
            of_model[i] = [item for item in of_model[i] if item.problem.id in common]


def _capped(
    arms: Sequence[Arm],
    prompts: Mapping[str, list[list[Prompted]]],
    config: OPSDCConfig,
    cap_is_given: bool,
) -> OPSDCConfig:
    """Return the settings with a cap that leaves room for the longest prompt in every model."""
    cap, reason = config.eval.max_new_tokens, ""
    for model in {arm.model.name: arm.model for arm in arms}.values():
        text_config = model.architecture().get_text_config()
        positions = getattr(text_config, "max_position_embeddings", None)
        sides = (
            side
            for items in prompts[model.name]
            for item in items
            for side in (item.prompts.student_ids, item.prompts.teacher_ids)
        )
        longest = max(map(len, sides))
        if positions is not None and positions - longest < cap:
            cap = positions - longest
            reason = f"{model.name} has {positions} positions, the longest prompt {longest} tokens"
    if reason and (cap_is_given or cap < 1):
        raise ConfigError(
            f"eval.max_new_tokens {config.eval.max_new_tokens} is too long: {reason}; "
            + (f"at most {cap}" if cap > 0 else "lower prompt.max_tokens")
        )
    if reason:
        print(f"answers have at most {cap} tokens: {reason}", flush=True)
    rollout = replace(config.rollout, max_new_tokens=cap)
    return replace(config, eval=replace(config.eval, max_new_tokens=cap), rollout=rollout)


def _answer(
    arms: Sequence[Arm],
    questions: Sequence[Questions],
    prompts: Sequence[Sequence[Prompted]],
    tokenizer: PreTrainedTokenizerBase,
    config: OPSDCConfig,
) -> dict[tuple[int, str], list[Answer]]:
    """Answer with one model in all its arms; {(number of the set, arm): answers}."""
    model = arms[0].model.load().to(ALONE.device)
    config = replace(config, model=arms[0].model.config)
    sampler = start_sampler(config, model, tokenizer, prompts[0][0].prompts.student_ids)
    sampler.push(model, 0)
    found = {}
    for i, asked in enumerate(questions):
        settings = replace(config.eval, scorer=asked.scorer)
        for arm in arms:
            label = f"{asked.name} {arm.key}".strip()
            answers = answer(sampler, tokenizer, prompts[i], settings, arm=arm.prompt, label=label)
            path = Path(config.output_dir, asked.name, "eval", f"{arm.key}.jsonl")
            write_answers(path, answers)
            print(f"eval {label}: {one_line(answers)}", flush=True)
            found[i, arm.key] = answers
    sampler.close()
    # Before the next model is loaded: both need not fit at once.
    del model, sampler
    gc.collect()
    return found


def _compared(arms: Mapping[str, list[Answer]], seed: int) -> dict[str, Any]:
    """Summarise the arms of one set, and compare each with the first one."""
    first, *others = arms
    compared = {}
    for key in others:
        characters = compare(in_characters(arms[first]), in_characters(arms[key]), seed=seed)
        compared[key] = compare(arms[first], arms[key], seed=seed) | {
            "character_reduction": characters["token_reduction"],
            "character_reduction_ci95": characters["token_reduction_ci95"],
        }
    return {
        "problems": len({a.problem_id for a in arms[first]}),
        "arms": {
            key: headline(answers)
            | {"characters_mean": headline(in_characters(answers))["tokens_mean"]}
            | pass_at_1(answers, seed=seed)
            for key, answers in arms.items()
        },
        "compared": compared,
    }


def _same(tokenizers: Sequence[PreTrainedTokenizerBase], questions: Sequence[Questions]) -> bool:
    """Return True where all tokenizers cut the questions into the same tokens of one vocabulary."""
    texts = [p.messages[-1]["content"] for asked in questions for p in asked.problems]
    first, *others = ((t.get_vocab(), t(texts)["input_ids"]) for t in tokenizers)
    return all(other == first for other in others)
