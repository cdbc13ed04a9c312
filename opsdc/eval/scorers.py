r"""Is a response right? Scorers by name, from strict to lenient.

    exact          the whole response is the answer
    answer_line    the last line "Answer: X"; X equals the answer as text or as a number
    boxed          the last \boxed{X}; X equals the answer as text or as a number
    number         the last number of the response equals the answer as a rational number
    math_verify    math-verify finds the answer in the response, or the last \boxed{X} equals it
    dual           the last line "Answer: X" passes math-verify, or the whole response does
                   (the paper's scorer; lenient: a matching boxed expression anywhere may count)
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
    """`extracted` is what was compared; None: no answer was found, which is not a wrong answer."""

    correct: bool
    extracted: str | None


def score(response: str, problem: Problem, scorer: str) -> Score:
    """Compare a response with the problem's answer.

    Raises ConfigError for an unknown scorer or a missing package, DataError for a problem without
    the answer (or the task entry) that the scorer needs.
    """
    if scorer not in _SCORERS:
        raise ConfigError(f"unknown scorer '{scorer}'; the scorers are {', '.join(SCORERS)}")
    return _SCORERS[scorer](response, problem)


def last_answer_line(text: str) -> str | None:
    """What follows the last "Answer:" that starts a line (or stands on the line below), or None."""
    lines = text.splitlines()
    for i in range(len(lines) - 1, -1, -1):
        if found := _ANSWER_LINE.match(lines[i]):
            # Markdown's emphasis around the label or the whole line.
            answer = found[1].strip().strip("*").strip()
            below = (line.strip() for line in lines[i + 1 :])
            return answer or next((line for line in below if line), None)
    return None


_ANSWER_LINE = re.compile(r"[\s*#>]*(?:final\s+)?answer\s*\**\s*:(.*)", re.IGNORECASE)


def last_number(text: str) -> str | None:
    r"""The last number: "1,234" → 1234, "-$5" → -5, 3/4, \frac{3}{4}, .5, "12." → 12.

    A minus counts as a sign unless it stands between two terms: "5-3" ends in 3. Digits inside a
    word (CO2) are no number.
    """
    found = None
    for match in _NUMBER.finditer(text.replace("{,}", ",").replace(r"\!", "")):
        found = match[0]
    return None if found is None else re.sub(r"[$,]|\\(?=\$)", "", found.replace("−", "-"))


_DECIMAL = r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
_NUMBER = re.compile(
    r"(?:(?<![\w)\]}])[-−])?(?:(?<=[^\w.])|^)(?:\\?\$)?(?:(?<=\$)[-−])?"
    rf"(?:\\d?frac\{{\d+\}}\{{\d+\}}|{_DECIMAL}(?:/\d+(?!\d|\.\d))?)",
    re.ASCII,
)


def same_answer(candidate: str, gold: str) -> bool:
    """Equal as text or as rational numbers; see the module's docstring."""
    a, b = _plain(candidate), _plain(gold)
    if a == b:
        return a != ""
    x, y = _rational(a), _rational(b)
    return x is not None and x == y


def _plain(text: str) -> str:
    """A LaTeX answer without what is not content."""
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


def _rational(plain: str) -> Fraction | None:
    """The exact value of a number or a fraction of two, or None."""
    # Longer texts are no answer, and Python refuses to convert huge ones.
    found = _RATIONAL.fullmatch(plain) if len(plain) < 1000 else None
    if found is None:
        return None
    over, under = (
        Fraction((found[a] or found[b] or "1").replace(",", ""))
        for a, b in (("frac_over", "over"), ("frac_under", "under"))
    )
    if under == 0:
        return None
    return (-1 if found["sign"] == "-" else 1) * over / under


_RATIONAL = re.compile(
    rf"(?P<sign>[-+]?)(?:\\frac\{{(?P<frac_over>-?{_DECIMAL})\}}\{{(?P<frac_under>{_DECIMAL})\}}|"
    rf"(?P<over>{_DECIMAL})(?:/(?P<under>{_DECIMAL}))?)",
    re.ASCII,
)


def _gold(problem: Problem) -> str:
    if problem.answer is None or not problem.answer.strip():
        raise DataError(
            f"problem {problem.id} has no answer to score against; name the column that holds it "
            "in data.answer_column"
        )
    return problem.answer


def _as_latex(answer: str) -> str:
    has_math = re.search(r"\\boxed|(?<!\\)\$.*\$", answer, re.DOTALL)
    return answer if has_math else rf"\boxed{{{answer}}}"


def _other_base(found: str | None, response: str, gold: str) -> bool:
    """math-verify drops the base of a number (52_8); two different ones are different numbers."""
    gold_base = re.search(r"\d_\{?(\d+)\}?\W*$", gold)
    number = re.match(r"\d+", found or "")
    if gold_base is None or number is None:
        return False
    bases = re.findall(rf"(?<!\d){number[0]}_\{{?(\d+)", response)
    return bool(bases) and bases[-1] != gold_base[1]


def _extracted(found: str | None, problem: Problem) -> Score:
    gold = _gold(problem)
    return Score(found is not None and same_answer(found, gold), found)


def _exact(response: str, problem: Problem) -> Score:
    text = response.strip()
    return Score(text == _gold(problem).strip(), text or None)


def _answer_line(response: str, problem: Problem) -> Score:
    return _extracted(last_answer_line(response), problem)


def _boxed(response: str, problem: Problem) -> Score:
    return _extracted(last_boxed(response), problem)


def _number(response: str, problem: Problem) -> Score:
    gold = _rational(_plain(_gold(problem)))
    if gold is None:
        raise DataError(
            f"problem {problem.id}: scorer 'number' needs a number as answer, got "
            f"{problem.answer!r}; use eval.scorer math_verify, answer_line or exact"
        )
    found = last_number(response)
    return Score(found is not None and _rational(_plain(found)) == gold, found)


def _math_verify(response: str, problem: Problem) -> Score:
    gold = _gold(problem)
    ((correct, found),) = grader.math_verify(_as_latex(gold), [response])
    box = last_boxed(response)
    if box is not None and same_answer(box, gold):
        return Score(True, box)
    return Score(
        correct and not _other_base(found, response, gold), box if found is None else found
    )


def _dual(response: str, problem: Problem) -> Score:
    gold, line = _gold(problem), last_answer_line(response)
    whole = _math_verify(response, problem)
    if line is None or whole.correct:
        return whole
    # As LaTeX without its dollars, and as the sentence that it is.
    readings = grader.math_verify(_as_latex(gold), [rf"\boxed{{{line}}}", f"Answer: {line}"])
    verified = any(correct for correct, _ in readings) and not _other_base(line, line, gold)
    return Score(verified or same_answer(line, gold), line)


def _reasoning_gym(response: str, problem: Problem) -> Score:
    """The task scores what follows the last "Answer:", else the last box, number, or line.

    The number only where the answer is one, and in plain form (1234 for $1,234).
    """
    if problem.entry is None:
        raise DataError(
            f"problem {problem.id} is not from reasoning-gym, so scorer 'reasoning_gym' cannot "
            "score it; use eval.scorer number, answer_line, boxed or math_verify"
        )
    found = last_answer_line(response) or last_boxed(response)
    if problem.answer is not None and _rational(_plain(problem.answer)) is not None:
        found = last_number(found or response)
    elif found is None:
        lines = [line.strip() for line in response.splitlines() if line.strip()]
        found = lines[-1] if lines else None
    if found is None:
        return Score(False, None)
    return Score(grader.reasoning_gym(problem.entry, found) == 1.0, found)


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
