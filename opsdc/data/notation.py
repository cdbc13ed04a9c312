r"""Answers as people write them: the number in one, the numbers in a text, two that say the same.

What a mark means is decided before any is dropped, in three steps:

    characters   digits, signs, spaces and punctuation of any script become ASCII; 5² is 5^{2}
    spacing      of TeX, fonts, dollars, degree and percent signs become a gap, never nothing, so
                 that "3 4", "3\%4" and "$3$ $4$" stay two numbers
    number       a sign, and one of: a decimal, its thousands set apart by commas (1,234) or spaces
                 (1 234); with a power of ten (1e3, 1.5 \times 10^{-3}); a fraction of two decimals,
                 with a slash or \frac; a mixed number (1 1/2, 1\frac{1}{2}). "1, 234" is a list

A number equals a number of the same value (0.5 is 1/2, 0.33 is not 1/3) and nothing else. Other
answers are equal as text: gaps between two digits count, others do not.
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction
from functools import lru_cache
from itertools import groupby

_LONGEST = 1000
"""A longer text is no answer in some notation, and Python refuses to convert huge numbers."""


def same_answer(candidate: str, gold: str) -> bool:
    """Return True where two answers are the same number or the same text; see the module."""
    a, b = _spaced(candidate), _spaced(gold)
    x, y = _value(a), _value(b)
    if x is not None or y is not None:
        return x == y
    text = _without_gaps(a)
    return text != "" and text == _without_gaps(b)


def has_adjacent_numbers(answer: str) -> bool:
    r"""Return True where numbers stand side by side in an answer that is no number itself.

    math-verify joins some of them (3\!4 is 34 to it) and takes the first of others.
    """
    spaced = _spaced(answer)
    return " " in _without_gaps(spaced) and _value(spaced) is None


def value(answer: str) -> Fraction | None:
    """Return the exact value of an answer that is a number; None for any other."""
    return _value(_spaced(answer))


def numbers(text: str) -> list[str]:
    r"""Return the numbers in running text: "1,234" as 1234, "-$5" as -5, 2 1/2, \frac{3}{4}.

    A minus counts as a sign unless it stands between two terms: "5-3" ends in 3. Digits inside a
    word (CO2), exponents and indices (cm^2) are no numbers. A plain space separates numbers here;
    a thin or no-break one groups thousands.
    """
    read = []
    for match in _IN_TEXT.finditer(_marks(text)):
        number = match["number"]
        if number is None:
            continue
        sign = "-" if "-" in match["sign"] else ""
        mixed = _MIXED.fullmatch(number)
        if mixed and value(number) is None:
            sign, number = "", mixed[1] or mixed[2]  # The 4/3 of "in 2021 4/3".
        read.append(sign + re.sub(" ?/ ?", "/", number.replace(",", "").replace(_GLUE, " ")))
    return read


def spelled_out(text: str) -> str:
    """Return a text for math-verify: its characters in ASCII, 1e3 as 1000 and 2 1/2 as 5/2."""

    def replace(match: re.Match[str]) -> str:
        number = value(match[0])
        return match[0] if number is None else str(number)

    return _UNREAD.sub(replace, characters(text))


# --- characters -----------------------------------------------------------------------------------

_GLUE = "\u00a0"
"""The space within a number: thin and no-break ones, and those of TeX."""

_SAME_AS = {
    **dict.fromkeys("‐‑‒–−﹣－⁻₋", "-"),
    **dict.fromkeys("\u00a0\u2007\u2008\u2009\u200a\u202f", _GLUE),
    **dict.fromkeys("。｡।٫", "."),
    **dict.fromkeys("、､،٬", ","),
    **dict.fromkeys("⁄∕÷", "/"),
    **dict.fromkeys("º˚", "°"),
    **dict.fromkeys("·⋅", r"\cdot "),
    "×": r"\times ",
    "√": r"\sqrt ",
    "π": r"\pi ",
    "∞": r"\infty ",
    "٪": "%",
    "\u200b": " ",  # A break between words, unlike the joiners, which are nothing.
}


def characters(text: str) -> str:
    """Return a text with digits, signs, spaces and punctuation of any script in ASCII.

    Raised and lowered characters become powers and indices, ½ becomes 1/2.
    """
    if text.isascii():
        return text
    text = _AFTER_DIGIT.sub(" ", text)
    return "".join(
        f"{mark}{{{''.join(map(_character, run))}}}" if mark else "".join(map(_character, run))
        for mark, run in groupby(text, key=_raised)
    )


_AFTER_DIGIT = re.compile("(?<=\\d)(?=[\u00bc-\u00be\u2150-\u215e])")
"""The place between a digit and a fraction that is one character: 1½ is not 11/2."""


@lru_cache(maxsize=4096)
def _raised(char: str) -> str:
    """Return "^" for a raised character, "_" for a lowered one, "" for others."""
    return {"<super>": "^", "<sub>": "_"}.get(unicodedata.decomposition(char).split(" ")[0], "")


@lru_cache(maxsize=4096)
def _character(char: str) -> str:
    if char in _SAME_AS:
        return _SAME_AS[char]
    kind = unicodedata.category(char)
    if kind == "Nd":
        return str(unicodedata.decimal(char))
    if kind in ("Cf", "Zs"):
        return "" if kind == "Cf" else " "
    compatible = unicodedata.normalize("NFKC", char)
    if compatible == char or unicodedata.decomposition(char).startswith("<circle>"):
        return char
    return "".join(_SAME_AS.get(c, c) for c in compatible)


# --- spacing --------------------------------------------------------------------------------------


def _marks(text: str) -> str:
    r"""Return a text in ASCII, with {,} and ,\! as commas and the spaces of TeX as `_GLUE`."""
    text = re.sub(r"\{,\}|,\s*\\!\s*", ",", characters(text))
    text = re.sub(r"(?<!\\)\\[,;:! ]|~", _GLUE, text)
    return re.sub(rf"[ {_GLUE}]{{2,}}", " ", text)


_GAP = rf"[ \n{_GLUE}]?"
"""A gap that may be there or not."""

_AT_BRACES = (rf"{_GAP}(?<!\\)([{{}}]){_GAP}", r"\1")
"""Gaps beside a brace say nothing."""

_NO_CONTENT = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        # A gap is a space, which may stand within a number, or the end of a line, which may not.
        (r"\\(?:left|right|[bB]igg?[lr]?)(?![A-Za-z])\.?", "\n"),
        (r"\\(?:displaystyle|q?quad)(?![A-Za-z])|(?<!\\)\\[()\[\]]", "\n"),
        (r"\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![A-Za-z]))|\\degree(?![A-Za-z])|°", "\n"),
        (r"\\?[$%]", "\n"),
        (r"\\(?:text|math|mbox)(?:rm|bf|it|sf|normal)?\s*\{([^{}]*)\}", "\n\\1\n"),
        (r"[^\S\n]+", " "),
        (r" ?\n\s*", "\n"),
        _AT_BRACES,
        # \frac12 and \frac1{2} are \frac{1}{2}; x^{2} is x^2; {5} is 5.
        (rf"\\[dtc]?frac(?![A-Za-z]){_GAP}", r"\\frac"),
        (r"\\frac(\d)", r"\\frac{\1}"),
        (rf"(\\frac\{{[^{{}}]*\}}){_GAP}(\d)", r"\1{\2}"),
        (r"([\^_]|\\sqrt)\{(\w)\}(?!\d)", r"\1\2"),
        *[(r"(?<![A-Za-z}\]^_\\])\{((?:[^{}\\]|\\[^{}])*)\}", "\n\\1\n")] * 3,
        (r" ?\n\s*", "\n"),
        _AT_BRACES,
        (r"^\n|\n?\.?\n?$", ""),
        (r"^\(([A-Za-z])\)$", r"\1"),
    )
)
"""Patterns that are not content, or another spelling of it, with their replacements, in order."""


def _spaced(answer: str) -> str:
    """Return an answer stripped of all that is not content, with gaps where something stood."""
    text = answer.strip()
    if len(text) > _LONGEST:
        return text
    text = _marks(text).strip()
    for pattern, replacement in _NO_CONTENT:
        text = pattern.sub(replacement, text)
    return text


def _without_gaps(spaced: str) -> str:
    """Return a text without its gaps, but for those between two digits."""
    return re.sub(r"(?<![\d.])\s+|\s+(?![\d.])", "", spaced).replace("\n", " ")


# --- numbers --------------------------------------------------------------------------------------


def _scaled(space: str) -> str:
    """Return the pattern of an unsigned decimal or power of ten; `space` may group thousands."""
    groups = rf"[1-9]\d{{0,2}}(?:(?:,\d{{3}})+|(?:{space}\d{{3}})+)(?!\d)"
    times = rf"{_GAP}(?:\\times|\\cdot|\*){_GAP}"
    power = rf"10{_GAP}\^{_GAP}(?:\{{[-+]?{_GAP}\d{{1,3}}\}}|[-+]?\d{{1,3}}(?!\d))"
    exponent = rf"(?:[eE][-+]?\d{{1,3}}(?!\w)|{times}{power})"
    return rf"(?:{power}|(?:(?:{groups}|\d+)(?:\.\d+)?|\.\d+){exponent}?)"


def _value(spaced: str) -> Fraction | None:
    match = _NUMBER.fullmatch(spaced) if len(spaced) <= _LONGEST else None
    if match is None:
        return None
    sign, whole, *parts = match.groups()
    over, under = [*(_exact(part) for part in parts if part), Fraction(1)][:2]
    if under == 0 or (whole and over >= under):
        return None
    number = int(whole or 0) + over / under
    return -number if sign == "-" else number


_SIGNED = rf"([-+]?{_GAP}{_scaled(' ')})"

_NUMBER = re.compile(
    rf"([-+]?){_GAP}(?:"
    rf"(\d+)(?:{_GAP}\\frac\{{(\d+)\}}\{{(\d+)\}}| (\d+){_GAP}/{_GAP}(\d+))|"
    rf"\\frac\{{{_SIGNED}\}}\{{{_SIGNED}\}}|"
    rf"({_scaled(' ')})(?:{_GAP}/{_GAP}{_SIGNED})?)",
    re.ASCII,
)
"""A whole answer that is a number: its sign, the whole part of a mixed one, and the rest."""


def _exact(decimal: str) -> Fraction:
    """Return the value of a decimal, with its sign and power of ten."""
    text = re.sub(r"[\s,{}]", "", decimal)
    return Fraction(re.sub(r"(^|\\times|\\cdot|\*)10\^", lambda m: "e" if m[1] else "1e", text))


_FRAC = r"\\[dtc]?frac ?(?:\{-?\d+\}|\d) ?(?:\{-?\d+\}|\d)"

_MIXED = re.compile(rf"\d+(?:[ {_GLUE}]?({_FRAC})|[ {_GLUE}](\d+ ?/ ?\d+(?!\d|\.\d)))", re.ASCII)

_IN_TEXT = re.compile(
    r"[\^_] ?(?:\{[^{}]*\}|-?\w+)|"
    r"(?P<sign>(?:(?<![\w)\]}])-)?(?:(?<=[^\w.])|^)(?:\\?\$)?(?:(?<=\$)-)?)"
    rf"(?P<number>{_MIXED.pattern}|{_FRAC}|"
    rf"{_scaled(_GLUE)}(?: ?/ ?\d+(?!\d|\.\d))?)"
    r"(?!\.?\d| ?\^(?! ?\{? ?\\circ))",
    re.ASCII,
)
"""An exponent or index, which is no number of its own, or a number in running text."""

_UNREAD = re.compile(
    rf"(?<![\w.\\^{{/])(?:\d+(?:\.\d+)?[eE][-+]?\d{{1,2}}|\d+[ {_GLUE}]\d+/\d+)(?![\w/^])", re.ASCII
)
"""Numbers that math-verify reads as others: 1e3 as 1, and 1 1/2 not at all."""
