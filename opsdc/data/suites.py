"""Named suites of public problem sets: from a local folder, else from the Hub.

`suites.yaml` says of each set where it is, its columns, its scorer and its licence. Every problem
ends in the same line about the form of its answer; multiple choice gets its options above it, each
behind a letter.
"""

from __future__ import annotations

import random
import re
import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from opsdc.config.mistakes import meant
from opsdc.config.yaml_file import parse_yaml
from opsdc.data import columns
from opsdc.data.problem import Problem, ProblemSet
from opsdc.data.sources import problems_from_rows
from opsdc.errors import ConfigError, DataError

FORM = "{problem}\n\nThe last line of your answer must be: Answer: X, where X is the result alone."
"""The prompt of a problem, unless data.options.prompt_template is another one."""

CHOICE_FORM = (
    "{problem}\n\nThe last line of your answer must be: Answer: X, where X is the letter of the "
    "right option."
)
"""The same of a question with options."""


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class SuiteSet:
    """One set of a suite; `suites.yaml` says what its fields mean."""

    name: str
    hub: str
    split: str
    question: str
    answer: str
    scorer: str
    licence: str
    note: str
    config: str | None = None
    revision: str | None = None
    options: str | None = None
    labels: str | None = None
    wrong: tuple[str, ...] = ()
    sample: Annotated[int | None, Field(ge=1)] = None

    @property
    def is_choice(self) -> bool:
        """True for multiple choice."""
        return self.options is not None or bool(self.wrong)


def load_suite(name: str) -> list[SuiteSet]:
    """Return the sets of a suite; raises ConfigError, naming the suites that there are."""
    tree = parse_yaml((resources.files("opsdc") / "data" / "suites.yaml").read_text("utf-8"))
    if name not in tree:
        hint = meant(name, tree) or f" (there are {', '.join(tree)})"
        raise ConfigError(f"--suite: unknown suite '{name}'{hint}")
    return [SuiteSet(name=key, **fields) for key, fields in tree[name].items()]


def local_file(s: SuiteSet, folder: Path | None) -> Path | None:
    """Return the file of a folder that is named like the set: MATH-500.jsonl or math500.csv.gz.

    Raises DataError for a folder that is not there, and where two files have the name.
    """
    if folder is None:
        return None
    if not folder.is_dir():
        raise DataError(f"--suite_dir (or OPSDC_DATA): there is no folder {folder}")

    def plain(text: str) -> str:
        return re.sub(r"[\W_]", "", text).lower()

    found = [
        path
        for path in sorted(folder.iterdir())
        if columns.file_type(path) in columns.FILE_TYPES
        and plain(path.name.partition(".")[0]) == plain(s.name)
    ]
    if len(found) > 1:
        raise DataError(f"{found[0]} and {found[1].name} are both named like {s.name}: keep one")
    return found[0] if found else None


def read_set(s: SuiteSet, file: Path | None, seed: int, template: str | None) -> ProblemSet:
    """Return the problems of a set out of a local file, or from the Hub without one.

    Raises DataError for rows without the columns, and where the Hub does not give the set.
    """
    if file is not None:
        numbered: Iterable[tuple[int, Any]] = columns.read_file(file)
        origin = str(file)
    else:
        options = {"name": s.config, "revision": s.revision}
        given = {key: value for key, value in options.items() if value is not None}
        numbered, origin = enumerate(columns.read_dataset(s.hub, s.split, given), 1), s.hub
    problems = problems_from_rows(
        list(_rows(s, numbered, origin)),
        origin=s.name,
        prompt_column="problem",
        answer_column="answer",
        seed=seed,
        template=template or (CHOICE_FORM if s.is_choice else FORM),
    )
    if s.sample is not None and s.sample < len(problems):
        # Drawn by no seed of the user's: two evaluations with other seeds ask the same questions.
        drawn: list[Problem] = list(ProblemSet(list(problems), seed=0).held_out(s.sample))
        return ProblemSet(drawn, seed=seed)
    return problems


def _rows(
    s: SuiteSet, numbered: Iterable[tuple[int, Any]], origin: str
) -> Iterator[dict[str, Any]]:
    """Yield each row as one with `problem` and `answer`."""
    for number, row in numbered:
        where = f"{origin}, row {number}"
        if not isinstance(row, Mapping):
            raise DataError(f"{where} must be an object with columns, not {type(row).__name__}")
        # A local file may have the usual names in the place of the dataset's own.
        _, question = columns.pick(
            row, None, (s.question, *columns.PROMPT_COLUMNS), "prompt", where
        )
        _, answer = columns.pick(row, None, (s.answer, *columns.ANSWER_COLUMNS), "answer", where)
        if s.is_choice:
            question, answer = _with_options(s, row, question, answer, where)
        yield {"problem": question, "answer": answer}


def _with_options(
    s: SuiteSet, row: Mapping[str, Any], question: Any, answer: Any, where: str
) -> tuple[str, str]:
    """Return a question with its options behind letters, and the right one's letter."""
    question, answer = columns.text(question, where).strip(), str(answer).strip()
    if s.options is not None:
        options = columns.column(row, s.options, where)
        labels = columns.column(row, s.labels, where) if s.labels else None
    else:
        wrong = [columns.column(row, name, where) for name in s.wrong]
        options, labels = None, None
        if None not in wrong:
            options = [answer, *(str(option).strip() for option in wrong)]
            # The right one must not always be the first; the order is the question's own, so that
            # it is the same in every file and every run.
            random.Random(question).shuffle(options)
            answer = string.ascii_uppercase[options.index(answer)]
    if options is None and re.fullmatch("[A-Z]", answer):
        return question, answer  # A file that has the options in its question already.
    if not isinstance(options, Sequence) or isinstance(options, str) or len(options) < 2:
        raise DataError(f"{where} has no list of options in {s.options or s.wrong}")
    letters = list(string.ascii_uppercase[: len(options)])
    names = [str(label) for label in labels] if labels is not None else letters
    if answer not in names or len(names) != len(letters):
        raise DataError(f"{where}: the answer {answer!r} is none of the options {names}")
    lines = (f"{letter}. {option}" for letter, option in zip(letters, options, strict=True))
    return "\n".join([question, "", *lines]), letters[names.index(answer)]
