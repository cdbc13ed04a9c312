"""Sources of problems: files, datasets, procedural tasks and rows in memory.

Sources: .jsonl, .json, .csv or .parquet files (also as .gz, by a pattern such as data/*.jsonl, or
several in a list); a Hub dataset (or a local dataset folder); a procedural task,
`reasoning_gym:TASK`; the demo's `embedded:arithmetic`, or `embedded:word_sums`. Columns, the first
that exists unless one is named:

    prompt   `messages` or `prompt` (a chat: role and content; trailing assistant turns are
             dropped), `prompt`, `problem` or `question` (text)
    answer   `answer`, `solution`, `ground_truth`, `reward_model.ground_truth` (a dot goes into a
             nested column); optional, and only metrics look at it
    teacher  `teacher_prompt` (text or a chat): the teacher's whole prompt; the instruction is then
             not added
    group    `group` (a text or a number): problems of one group are held out together

A worked solution as answer is reduced to its boxed expression (boxes that differ are an error), or
to what follows "####". A chat, and an object that holds the answer, may be JSON text.

Every row becomes a problem or an error that says where: rows are never skipped or repaired. The one
exception is counted and said: training rows whose prompt is also held out (`ProblemSet.split`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from opsdc.config.places import is_local
from opsdc.data import columns
from opsdc.data.arithmetic import arithmetic
from opsdc.data.notation import same_answer
from opsdc.data.problem import Problem, ProblemSet
from opsdc.data.text import boxes, dapo_prompt
from opsdc.data.word_sums import word_sums
from opsdc.errors import ConfigError, DataError

_GYM = "reasoning_gym:"
"""The name of a procedural task follows this prefix."""

_EMBEDDED = ("embedded:arithmetic", "embedded:word_sums")
"""Sources inside the package: the demo's questions, and a harder set."""


def load_problems(
    source: str | Sequence[str],
    *,
    split: str | None,
    options: dict[str, Any],
    prompt_column: str | None,
    answer_column: str | None,
    seed: int,
) -> ProblemSet:
    """Load all problems of a source; the module's docstring names sources and columns.

    Args:
        split: The split of a Hub dataset; None means train. No other source has one.
        options: Passed on to `datasets.load_dataset` or to the reasoning-gym task (`size` and its
            own settings, but for the seed). `prompt_template`, for every source, is a text in which
            {problem} stands for the problem, or DAPO or DAPO-no-reminder, the paper's training and
            evaluation prompts.

    Raises DataError, naming file and line or row, the columns that exist, and the remedy;
    ConfigError for an option that is unknown or a package that is missing.
    """
    options = dict(options)
    layout = _layout(options.pop("prompt_template", None))
    read = functools.partial(
        _make_problems, prompt_column=prompt_column, answer_column=answer_column, layout=layout
    )
    files = columns.files_of(source)
    if files:
        if options or split is not None:
            given = f"data.options {sorted(options)}" if options else f"data.split {split!r}"
            raise ConfigError(f"{given} means nothing to the file {files[0]}; unset it")
        problems = []
        # Ids are short unless two files have one name.
        names = [path.name for path in files]
        for path in files:
            unit = "line" if columns.file_type(path) == ".jsonl" else "row"
            name = path.name if names.count(path.name) == 1 else str(path)
            problems += read(columns.read_file(path), str(path), name, unit)
        return ProblemSet(problems, seed=seed)
    # A list holds files only.
    assert isinstance(source, str)
    if source.startswith(_GYM):
        if split is not None:
            raise ConfigError(f"data.split {split!r}: {source} has no splits; unset it")
        task = source.removeprefix(_GYM)
        return ProblemSet(_gym_problems(task, options, layout, seed), seed=seed)
    if source in _EMBEDDED:
        rows: Iterable[Any] = _embedded_rows(source, split, options, seed)
        name = source.partition(":")[2]
    else:
        split = split or "train"
        rows, name = columns.read_dataset(source, split, options), f"{source}:{split}"
    return ProblemSet(read(enumerate(rows, 1), source, name, "row"), seed=seed)


def is_on_hub(source: str | Sequence[str]) -> bool:
    """Return True for a source that is asked for over the network."""
    return (
        isinstance(source, str)
        and not source.startswith((_GYM, *_EMBEDDED))
        and not columns.files_of(source)
        and not is_local(source)
    )


def problems_from_rows(
    rows: Iterable[Mapping[str, Any]],
    *,
    origin: str,
    prompt_column: str | None,
    answer_column: str | None,
    seed: int,
    template: str | None = None,
) -> ProblemSet:
    """Make problems of rows in memory: a list of mappings or a `datasets.Dataset`.

    `origin` names them in ids and errors. `template` is `load_problems`' option `prompt_template`,
    and columns and errors are those of that function.
    """
    layout = _layout(template)
    problems = _make_problems(
        enumerate(rows, 1), origin, origin, "row",
        prompt_column=prompt_column, answer_column=answer_column, layout=layout,
    )  # fmt: skip
    return ProblemSet(problems, seed=seed)


def _make_problems(
    numbered: Iterable[tuple[int, Any]],
    source: str,
    name: str,
    unit: str,
    *,
    prompt_column: str | None,
    answer_column: str | None,
    layout: Callable[[str], str],
) -> list[Problem]:
    """Make a problem of every numbered row.

    Errors name a row as "{source}, {unit} {number}", ids as "{name}:{number}".
    """
    problems = []
    for number, row in numbered:
        where = f"{source}, {unit} {number}"
        if not isinstance(row, Mapping):
            raise DataError(f"{where} must be an object with columns, not {type(row).__name__}")
        column, value = columns.pick(row, prompt_column, columns.PROMPT_COLUMNS, "prompt", where)
        messages = _laid_out(columns.chat(value, f"{where}, column {column}"), layout)
        teacher, group = row.get("teacher_prompt"), row.get("group")
        place = f"{where}, column teacher_prompt"
        problems.append(
            Problem(
                id=f"{name}:{number}",
                messages=messages,
                answer=_answer(row, answer_column, where),
                teacher_messages=None if teacher is None else columns.chat(teacher, place),
                group=None if group is None else columns.number_or_text(group, f"{where}, group"),
            )
        )
    if not problems:
        raise DataError(f"{source} holds no problems; check data.source and data.split")
    return problems


def _answer(row: Mapping[str, Any], answer_column: str | None, where: str) -> str | None:
    """Return a row's answer as text; None where no column holds one and none is named."""
    usual = (columns.column(row, name, where) for name in columns.ANSWER_COLUMNS)
    if answer_column is None and all(value is None for value in usual):
        return None
    column, value = columns.pick(row, answer_column, columns.ANSWER_COLUMNS, "answer", where)
    answer = columns.number_or_text(value, f"{where}, column {column}")
    # In a worked solution the answer is in the last box (MATH) or behind #### (GSM8K).
    _, mark, behind = answer.rpartition("####")
    boxed = boxes(answer)
    if differ := [box for box in boxed[:-1] if not same_answer(box, boxed[-1])]:
        raise DataError(
            f"{where}, column {column} holds boxed answers that differ, {differ[0]!r} and "
            f"{boxed[-1]!r}; put the whole answer into one box or into a column of its own, and "
            "name that in data.answer_column"
        )
    return (boxed[-1] if boxed else "") or (behind.strip() if mark else "") or answer


def _layout(template: Any) -> Callable[[str], str]:
    """Return the function that turns a problem's text into the user turn."""
    if template is None:
        return lambda problem: problem
    if template == "DAPO":
        return dapo_prompt
    if template == "DAPO-no-reminder":
        return lambda problem: dapo_prompt(problem, reminder=False)
    if not isinstance(template, str) or template.count("{problem}") != 1:
        raise ConfigError(
            "data.options.prompt_template must be DAPO, DAPO-no-reminder or a text with {problem} "
            f"once in it, not {template!r}"
        )
    return lambda problem: template.replace("{problem}", problem)


def _laid_out(
    messages: tuple[dict[str, str], ...], layout: Callable[[str], str]
) -> tuple[dict[str, str], ...]:
    """Return a chat with its last turn in the layout."""
    last = messages[-1]
    return (*messages[:-1], {**last, "content": layout(last["content"])})


def _gym_problems(
    task: str, options: dict[str, Any], layout: Callable[[str], str], seed: int
) -> list[Problem]:
    """Make the problems of a reasoning-gym task."""
    try:
        import reasoning_gym
    except ImportError as error:
        raise ConfigError(
            f'data.source {_GYM}{task} needs the package reasoning-gym: pip install "opsdc[eval]"'
        ) from error
    if "seed" in options:
        raise ConfigError("data.options.seed: the task's seed is the top-level seed; unset it")
    options = {"seed": seed, **options}
    try:
        dataset = reasoning_gym.create_dataset(task, **options)
        rows = [dataset[i] for i in range(len(dataset))]
    except Exception as error:  # Its checks are assertions, TypeErrors and ValueErrors alike.
        raise ConfigError(
            f"data.source {_GYM}{task} with data.options {options}: {error or repr(error)}; "
            "check the task's name and its settings in reasoning-gym's gallery"
        ) from error
    problems = []
    for i, row in enumerate(rows):
        where = f"{_GYM}{task}, problem {i}"
        answer = row["answer"]
        problems.append(
            Problem(
                id=f"{task}:{seed}:{i}",
                messages=_laid_out(columns.chat(row["question"], where), layout),
                answer=None if answer is None else columns.number_or_text(answer, where),
                entry={"task": task, "options": options, "index": i},
            )
        )
    if not problems:
        raise DataError(f"{_GYM}{task} makes no problems; set data.options.size above 0")
    return problems


def _embedded_rows(
    source: str, split: str | None, options: dict[str, Any], seed: int
) -> list[dict[str, Any]]:
    """Return the rows of a source inside the package; the only option is `size` of word sums."""
    known = {"embedded:word_sums": {"size": 500}}.get(source, {})
    if split is not None or not options.keys() <= known.keys():
        given = f"data.options {sorted(options)}" if options else f"data.split {split!r}"
        knows = f", which knows {', '.join(known)}" if known else ""
        raise ConfigError(f"{given} means nothing to {source}{knows}; unset it")
    if source == "embedded:arithmetic":
        return arithmetic()
    size = options.get("size", known["size"])
    if isinstance(size, bool) or not isinstance(size, int):
        raise ConfigError(f"data.options.size must be a whole number, got {size!r}")
    try:
        return word_sums(size, seed)
    except ValueError as error:
        raise ConfigError(f"data.options.size: {error}") from error
