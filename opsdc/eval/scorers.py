r"""Scorers that decide whether a response is right, by name, from strict to lenient.

    exact          the whole response is the answer
    answer_line    the last line "Answer: X"; X equals the answer as text or as a number
    boxed          the last \boxed{X}; X equals the answer as text or as a number
    number         the last number of the response equals the answer as a rational number
    math_verify    math-verify finds the answer in the response, or the last \boxed{X} equals it
    dual           the last line "Answer: X" passes math-verify, or the whole response does
                   (the paper's scorer; it is lenient: a matching box anywhere may count)
    reasoning_gym  the task's own scorer gives 1.0

"Equals as text" ignores what is not content in LaTeX: spacing, \left and \right, \text and fonts,
\dfrac for \frac, dollars, degree and percent signs, a final full stop, brackets around one option
letter. "As a number" is exact: 0.5 is 1/2, 1,234 is 1234, 0.33 is not 1/3. There is no algebra in
either: x+1 and 1+x differ. math-verify does algebra; like it, `math_verify` and `dual` do not
compare units (5 cm is 5 inches), but unlike it they tell 52_8 from 52_9.

No answer of a model is ever evaluated as Python. math-verify and reasoning-gym run in a process of
their own with a limit on CPU time (see `opsdc.eval.grader`), from any thread; an answer that
exceeds it is scored as not correct with nothing extracted.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

from opsdc.data.text import last_boxed
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


def last_answer_line(text: str) -> str | None:
    """Return the text behind the last "Answer:" that starts a line, or None.

    Where nothing stands behind it, the next line that is not empty counts.
    """
    lines = text.splitlines()
    for i in range(len(lines) - 1, -1, -1):
        if label := _ANSWER_LINE.match(lines[i]):
            # Markdown's emphasis may stand around the label or the whole line.
            answer = label[1].strip().strip("*").strip()
            below = (line.strip() for line in lines[i + 1 :])
            return answer or next((line for line in below if line), None)
    return None


_ANSWER_LINE = re.compile(r"[\s*#>]*(?:final\s+)?answer\s*\**\s*:(.*)", re.IGNORECASE)
"""A line that starts with "Answer:", whatever Markdown stands before it."""


def last_number(text: str) -> str | None:
    r"""Return the last number: "1,234" → 1234, "-$5" → -5, 3/4, \frac{3}{4}, .5, "12." → 12.

    A minus counts as a sign unless it stands between two terms: "5-3" ends in 3. Digits inside a
    word (CO2) are no number.
    """
    number = None
    for match in _NUMBER.finditer(text.replace("{,}", ",").replace(r"\!", "")):
        number = match[0]
    return None if number is None else re.sub(r"[$,]|\\(?=\$)", "", number.replace("−", "-"))


_DECIMAL = r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
"""A decimal number without a sign, commas between thousands allowed."""

_NUMBER = re.compile(
    r"(?:(?<![\w)\]}])[-−])?(?:(?<=[^\w.])|^)(?:\\?\$)?(?:(?<=\$)[-−])?"
    rf"(?:\\d?frac\{{\d+\}}\{{\d+\}}|{_DECIMAL}(?:/\d+(?!\d|\.\d))?)",
    re.ASCII,
)
"""A number or a fraction in running text, with its sign and dollar."""


def same_answer(candidate: str, gold: str) -> bool:
    """Return True where two answers equal as text or as rational numbers; see the module."""
    a, b = _plain(candidate), _plain(gold)
    if a == b:
        return a != ""
    x, y = _rational(a), _rational(b)
    return x is not None and x == y


def _plain(text: str) -> str:
    """Strip a LaTeX answer of all that is not content."""
    text = text.strip().removesuffix(".")
    for pattern, replacement in _NOT_CONTENT:
        text = pattern.sub(replacement, text)
    return text


_NOT_CONTENT = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\(?:left|right|[bB]igg?[lr]?)(?![A-Za-z])\.?", ""),
        (r"\\(?:displaystyle|q?quad)(?![A-Za-z])|\\[,;:! ()\[\]]|~", ""),
        (r"\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![A-Za-z]))|\\degree(?![A-Za-z])|°", ""),
        (r"\\?[$%]", ""),
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"\\(?:text|mbox|math|text)(?:rm|bf|it|sf|normal)?\s*\{([^{}]*)\}", r"\1"),
        (r"\{,\}", ","),
        (r"\s+", ""),
        (r"−", "-"),
        # \frac12 and \frac1{2} are \frac{1}{2}; x^{2} is x^2.
        (r"\\frac(\d)", r"\\frac{\1}"),
        (r"(\\frac\{[^{}]*\})(\d)", r"\1{\2}"),
        (r"([\^_]|\\sqrt)\{(\w)\}", r"\1\2"),
        (r"^\(([A-Za-z])\)$", r"\1"),
    )
)
"""Patterns that are not content, or another spelling of it, with their replacements, in order."""


def _rational(plain: str) -> Fraction | None:
    """Return the exact value of a number or of a fraction of two, or None."""
    # Longer texts are no answer, and Python refuses to convert huge ones.
    match = _RATIONAL.fullmatch(plain) if len(plain) < 1000 else None
    if match is None:
        return None
    over, under = (
        Fraction((match[latex] or match[text] or "1").replace(",", ""))
        for latex, text in (("frac_over", "over"), ("frac_under", "under"))
    )
    if under == 0:
        return None
    return (-1 if match["sign"] == "-" else 1) * over / under


_RATIONAL = re.compile(
    rf"(?P<sign>[-+]?)(?:\\frac\{{(?P<frac_over>-?{_DECIMAL})\}}\{{(?P<frac_under>{_DECIMAL})\}}|"
    rf"(?P<over>{_DECIMAL})(?:/(?P<under>{_DECIMAL}))?)",
    re.ASCII,
)
"""A whole answer that is a number, or a fraction of two in LaTeX or with a slash."""


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
    gold_base = re.search(r"\d_\{?(\d+)\}?\W*$", gold)
    number = re.match(r"\d+", extracted or "")
    if gold_base is None or number is None:
        return False
    bases = re.findall(rf"(?<!\d){number[0]}_\{{?(\d+)", response)
    return bool(bases) and bases[-1] != gold_base[1]


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


def _number(response: str, problem: Problem) -> Score:
    gold = _rational(_plain(_gold(problem)))
    if gold is None:
        raise DataError(
            f"problem {problem.id}: scorer 'number' needs a number as answer, got "
            f"{problem.answer!r}; use eval.scorer math_verify, answer_line or exact"
        )
    number = last_number(response)
    return Score(number is not None and _rational(_plain(number)) == gold, number)


def _math_verify(response: str, problem: Problem) -> Score:
    gold = _gold(problem)
    ((correct, extracted),) = grader.math_verify(_as_latex(gold), [response])
    box = last_boxed(response)
    if box is not None and same_answer(box, gold):
        return Score(True, box)
    return Score(
        correct and not _in_another_base(extracted, response, gold),
        box if extracted is None else extracted,
    )


def _dual(response: str, problem: Problem) -> Score:
    gold, line = _gold(problem), last_answer_line(response)
    of_response = _math_verify(response, problem)
    if line is None or of_response.correct:
        return of_response
    # Once as LaTeX that lacks its dollars, once as an ordinary sentence.
    readings = grader.math_verify(_as_latex(gold), [rf"\boxed{{{line}}}", f"Answer: {line}"])
    verified = any(correct for correct, _ in readings) and not _in_another_base(line, line, gold)
    return Score(verified or same_answer(line, gold), line)


def _reasoning_gym(response: str, problem: Problem) -> Score:
    """Let the task score the text behind the last "Answer:", else the last box, number or line.

    The number counts only where the problem's answer is one, and goes to the task in plain form
    (1234 for $1,234).
    """
    if problem.entry is None:
        raise DataError(
            f"problem {problem.id} is not from reasoning-gym, so scorer 'reasoning_gym' cannot "
            "score it; use eval.scorer number, answer_line, boxed or math_verify"
        )
    answer = last_answer_line(response) or last_boxed(response)
    if problem.answer is not None and _rational(_plain(problem.answer)) is not None:
        answer = last_number(answer or response)
    elif answer is None:
        lines = [line.strip() for line in response.splitlines() if line.strip()]
        answer = lines[-1] if lines else None
    if answer is None:
        return Score(False, None)
    return Score(grader.reasoning_gym(problem.entry, answer) == 1.0, answer)


_SCORERS: dict[str, Callable[[str, Problem], Score]] = {
    "math_verify": _math_verify,
    "answer_line": _answer_line,
    "boxed": _boxed,
    "exact": _exact,
    "dual": _dual,
    "reasoning_gym": _reasoning_gym,
    "number": _number,
}
SCORERS = tuple(_SCORERS)
"""The names of the scorers."""
