r"""Scorers that decide whether a response is right, by name, from strict to lenient.

    exact          the whole response is the answer
    answer_line    the last line "Answer: X"; X equals the answer as text or as a number
    boxed          the last \boxed{X}; X equals the answer as text or as a number
    letter         the last line "Answer: X", else the last \boxed{X}; X begins with the answer's
                   letter: "B", "(B)", "B. Paris", "option B"
    number         the last number of the response equals the answer as a rational number
    math_verify    math-verify finds the answer in the response, or the last \boxed{X} equals it
    dual           the last line "Answer: X" passes math-verify, or the whole response does
                   (the paper's scorer; it is lenient: a matching box anywhere may count, but of
                   "Answer: 5 or 6" neither)
    reasoning_gym  the task's own scorer gives 1.0

"Equals as text" ignores what is not content in LaTeX: spacing, \left and \right, \text and fonts,
\dfrac for \frac, dollars, degree and percent signs, a final full stop, brackets around one option
letter. "As a number" is exact: 0.5 is 1/2, 1,234 is 1234, 0.33 is not 1/3. `opsdc.data.notation`
reads both, for all scorers but exact. There is no algebra in either: x+1 and 1+x differ.
math-verify does algebra; like it, `math_verify` and `dual` do not compare units (5 cm is 5 inches),
but unlike it they tell 52_8 from 52_9.

No answer of a model is ever evaluated as Python. math-verify and reasoning-gym run in a process of
their own with a limit on CPU time (see `opsdc.eval.grader`), from any thread; an answer that
exceeds it is scored as not correct with nothing extracted.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from opsdc.data.notation import has_adjacent_numbers, numbers, same_answer, spelled_out, value
from opsdc.data.text import boxes, last_boxed
from opsdc.errors import ConfigError, DataError
from opsdc.eval import grader

if TYPE_CHECKING:
    from opsdc.data.problem import Problem


@dataclass(frozen=True, slots=True)
class Score:
    """The verdict on one response."""

    correct: bool
    """True where the response's answer is the problem's."""
    extracted: str | None
    """The text that was compared; None where the response holds no answer, which is another thing
    than a wrong one."""


def score(response: str, problem: Problem, scorer: str) -> Score:
    """Compare a response with the problem's answer by the scorer of this name.

    Raises ConfigError for an unknown scorer or a missing package, DataError for a problem without
    the answer (or the task entry) that the scorer needs.
    """
    if scorer not in _SCORERS:
        raise ConfigError(f"unknown scorer '{scorer}'; the scorers are {', '.join(SCORERS)}")
    return _SCORERS[scorer](response, problem)


def check_scorer(scorer: str, problems: Sequence[Problem], setting: str) -> None:
    """Check before anything is sampled that a scorer can judge answers to the problems.

    setting: The setting that names the scorer, for the error.

    Raises:
        ConfigError: The scorer is unknown, its package is not installed or fails, or the task's own
            scorer is not to be used.
        DataError: A problem's answer is none that the scorer compares with.
    """
    if scorer not in _SCORERS:
        raise ConfigError(f"{setting}: unknown scorer '{scorer}'; there are {', '.join(SCORERS)}")
    package = _PACKAGES.get(scorer)
    if package is not None and importlib.util.find_spec(package) is None:
        raise ConfigError(
            f"{setting} {scorer} needs the package {package.replace('_', '-')}: pip install "
            '"opsdc[eval]"'
        )
    for problem in problems:
        if scorer == "number":
            _number_gold(problem)
        elif scorer == "letter":
            _letter_gold(problem)
        elif scorer == "reasoning_gym":
            _task_entry(problem)
        elif not same_answer(gold := _gold(problem), gold) and scorer != "exact":
            raise DataError(
                f"problem {problem.id}: nothing is left of the answer {gold!r} to compare with; "
                "give an answer, or use the scorer exact"
            )
    if package is not None and problems:
        # A package that is there may still fail at its first question, and a task have no scorer.
        score(problems[0].answer or "", problems[0], scorer)


def last_answer_line(text: str) -> str | None:
    r"""Return the text behind the last "Answer:" that starts a line, or None.

    Where nothing stands behind it, the next line that is not empty counts. Of a single \boxed{X} in
    it X counts.
    """
    lines = text.splitlines()
    for i in range(len(lines) - 1, -1, -1):
        if label := _ANSWER_LINE.match(lines[i]):
            # Markdown's emphasis may stand around the label or the whole line.
            answer = label[1].strip().strip("*").strip()
            below = (_MARKERS.sub("", line).strip() for line in lines[i + 1 :])
            answer = answer or next((line.rstrip("*") for line in below if line), "")
            boxed = boxes(answer)
            return (boxed[0] if len(boxed) == 1 else answer) or None
    return None


_MARKERS = re.compile(r"^(?:[\s*#>•·]|[-+](?=\s)|\d+[.)](?=\s))*")
"""Markdown in front of a line: headings, quotes, emphasis, bullets, numbers of a list."""

_ANSWER_LINE = re.compile(
    rf"{_MARKERS.pattern}(?:final\s+)?answer\s*\**\s*[:：﹕](.*)", re.IGNORECASE
)
"""A line that starts with "Answer:", whatever Markdown stands before it."""


def _gold(problem: Problem) -> str:
    """Return the problem's answer; raise DataError where it has none."""
    if problem.answer is None or not problem.answer.strip():
        raise DataError(
            f"problem {problem.id} has no answer to score against; name the column that holds it "
            "in data.answer_column"
        )
    return problem.answer


def _as_latex(answer: str) -> str:
    """Put an answer in a box, unless it is marked as mathematics already."""
    has_math = re.search(r"\\boxed|(?<!\\)\$.*\$", answer, re.DOTALL)
    return answer if has_math else rf"\boxed{{{answer}}}"


def _in_another_base(extracted: str | None, response: str, gold: str) -> bool:
    """Return True where the response's number has another base (52_8) than the gold answer.

    math-verify drops the base, and would take the two for equal.
    """
    gold_base = re.search(rf"\d{_BASE}\W*$", spelled_out(gold))
    number = re.match(r"\d+", spelled_out(extracted or ""))
    if gold_base is None or number is None:
        return False
    bases = re.findall(rf"(?<!\d){number[0]}{_BASE}", spelled_out(response))
    return bool(bases) and bases[-1] != gold_base[1]


_BASE = r"\s*_\s*\{?\s*(\d+)"


def _score_extracted(extracted: str | None, problem: Problem) -> Score:
    gold = _gold(problem)
    return Score(extracted is not None and same_answer(extracted, gold), extracted)


def _exact(response: str, problem: Problem) -> Score:
    text = response.strip()
    return Score(text == _gold(problem).strip(), text or None)


def _answer_line(response: str, problem: Problem) -> Score:
    return _score_extracted(last_answer_line(response), problem)


def _boxed(response: str, problem: Problem) -> Score:
    return _score_extracted(last_boxed(response), problem)


def _letter_gold(problem: Problem) -> str:
    gold = _gold(problem).strip()
    if not re.fullmatch("[A-Z]", gold):
        raise DataError(
            f"problem {problem.id}: scorer 'letter' needs one of A to Z as answer, got "
            f"{problem.answer!r}; use the scorer answer_line or exact"
        )
    return gold


def _letter(response: str, problem: Problem) -> Score:
    """Compare the letter of an option, which stands alone or in front of the option's text."""
    gold, answer = _letter_gold(problem), last_answer_line(response) or last_boxed(response)
    found = _OPTION.match(answer or "")
    return Score(
        found is not None and found[1].upper() == gold, found[1].upper() if found else None
    )


_OPTION = re.compile(
    r"(?:\\text\w*\s*\{|[\s*_$(\[{])*(?:(?:option|choice)\s*[:\s(]\s*)?"
    r"([A-Z])(?![^\W_]|['’]|\s+(?:or|and)\b)(?:(?<![AI])|(?!\s+[a-z]))",
    re.IGNORECASE,
)
"""A letter at the start of an answer, but not "A or B", and not the word in "A dog"."""


def _number_gold(problem: Problem) -> Fraction:
    gold = value(_gold(problem))
    if gold is None:
        raise DataError(
            f"problem {problem.id}: scorer 'number' needs a number as answer, got "
            f"{problem.answer!r}; use the scorer math_verify, answer_line or exact"
        )
    return gold


def _number(response: str, problem: Problem) -> Score:
    gold = _number_gold(problem)
    number = next(reversed(numbers(response)), None)
    return Score(number is not None and value(number) == gold, number)


def _math_verify(response: str, problem: Problem) -> Score:
    gold = _gold(problem)
    ((correct, extracted),) = _verify(gold, [response])
    box = last_boxed(response)
    if box is not None and (same_answer(box, gold) or has_adjacent_numbers(box)):
        return Score(same_answer(box, gold), box)
    return Score(
        correct and not _in_another_base(extracted, response, gold),
        box if extracted is None else extracted,
    )


def _verify(gold: str, texts: list[str]) -> list[tuple[bool, str | None]]:
    """Ask math-verify, which would join adjacent numbers of the gold answer."""
    readings = grader.math_verify(
        _as_latex(spelled_out(gold)), [spelled_out(text) for text in texts]
    )
    joins = has_adjacent_numbers(gold)
    return [(correct and not joins, extracted) for correct, extracted in readings]


def _dual(response: str, problem: Problem) -> Score:
    gold, line = _gold(problem), last_answer_line(response)
    if line is None:
        return _math_verify(response, problem)
    if same_answer(line, gold):
        return Score(True, line)
    # As LaTeX that lacks its dollars; an ordinary sentence counts, and with it the whole response,
    # unless math-verify would take the first of several numbers.
    readings = [] if has_adjacent_numbers(line) else [rf"\boxed{{{line}}}"]
    if len(numbers(line)) <= 1 or last_boxed(response) is not None:
        of_response = _math_verify(response, problem)
        if of_response.correct:
            return of_response
        readings.append(f"Answer: {line}")
    verified = any(correct for correct, _ in _verify(gold, readings))
    return Score(verified and not _in_another_base(line, line, gold), line)


def _task_entry(problem: Problem) -> dict[str, Any]:
    if problem.entry is None:
        raise DataError(
            f"problem {problem.id} is not from reasoning-gym, so scorer 'reasoning_gym' cannot "
            "score it; use the scorer number, answer_line, boxed or math_verify"
        )
    return problem.entry


def _reasoning_gym(response: str, problem: Problem) -> Score:
    """Let the task score the text behind the last "Answer:", else the last box, number or line.

    The number counts only where the problem's answer is one, and goes to the task in plain form
    (1234 for $1,234).
    """
    entry = _task_entry(problem)
    answer = last_answer_line(response) or last_boxed(response)
    if problem.answer is not None and value(problem.answer) is not None:
        answer = next(reversed(numbers(answer or response)), None)
    elif answer is None:
        lines = [line.strip() for line in response.splitlines() if line.strip()]
        answer = lines[-1] if lines else None
    if answer is None:
        return Score(False, None)
    return Score(grader.reasoning_gym(entry, answer) == 1.0, answer)


_SCORERS: dict[str, Callable[[str, Problem], Score]] = {
    "math_verify": _math_verify,
    "answer_line": _answer_line,
    "boxed": _boxed,
    "letter": _letter,
    "exact": _exact,
    "dual": _dual,
    "reasoning_gym": _reasoning_gym,
    "number": _number,
}
SCORERS = tuple(_SCORERS)

_PACKAGES = {
    "math_verify": "math_verify",
    "dual": "math_verify",
    "reasoning_gym": "reasoning_gym",
}
"""The module that a scorer needs, where it needs one."""
"""The names of the scorers."""
