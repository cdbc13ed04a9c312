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
\dfrac for \frac, dollars, degree and percent signs, thousands commas, a final full stop, brackets
around one option letter. "As a number" is exact: 0.5 is 1/2, 0.33 is not 1/3. There is no algebra in
either: x+1 and 1+x differ. math-verify does algebra; like it, `math_verify` and `dual` do not compare
units (5 cm is 5 inches), but unlike it they tell 52_8 from 52_9.

No answer of a model is ever evaluated as Python. math-verify and reasoning-gym run in a process of
their own with a limit on CPU time (see `opsdc.grader`), from any thread; what exceeds it is scored
as not correct with nothing extracted.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from opsdc.errors import ConfigError

if TYPE_CHECKING:
    from opsdc.tasks import Problem


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


def last_boxed(text: str) -> str | None:
    r"""The content of the last \boxed{...} or \fbox{...} whose braces close, or None."""
    for opening in reversed(list(re.finditer(r"\\f?box(?:ed)?\s*\{", text))):
        depth, i = 1, opening.end()
        for i in range(opening.end(), len(text)):
            # An escaped brace is a character, not a group.
            if text[i] in "{}" and (len(text[:i]) - len(text[:i].rstrip("\\"))) % 2 == 0:
                depth += 1 if text[i] == "{" else -1
                if depth == 0:
                    return text[opening.end() : i].strip()
    return None
