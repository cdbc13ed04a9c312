r"""Texts: the paper's fixed wordings, characters that none may hold, the last \boxed answer."""

from __future__ import annotations

import re

DAPO_OPENING = "Solve the following math problem step by step. "
"""A DAPO prompt begins with this sentence, which gives way to the teacher's instruction."""

DAPO_FORMAT = (
    "The last line of your response should be of the form Answer: $Answer (without quotes) where "
    "$Answer is the answer to the problem."
)
"""The opening is followed by these words, on the same line."""

DAPO_REMINDER = 'Remember to put your answer on its own line after "Answer:".'
"""The paper's training prompts end in this line."""


def dapo_prompt(question: str, *, reminder: bool = True) -> str:
    """Return the paper's student prompt; its evaluations leave the reminder out."""
    parts = [DAPO_OPENING + DAPO_FORMAT, question]
    return "\n\n".join([*parts, DAPO_REMINDER] if reminder else parts)


def text_fault(text: str) -> str | None:
    """Name the first kind of character in a text that no prompt may hold, or return None."""
    if "\0" in text:
        return "a NUL character"
    if surrogate := re.search("[\ud800-\udfff]", text):
        return f"a lone surrogate (U+{ord(surrogate[0]):04X}, not a character)"
    return None


def last_boxed(text: str) -> str | None:
    r"""Return the content of the last \boxed{...} or \fbox{...} whose braces close, or None."""
    return next(reversed(boxes(text)), None)


def boxes(text: str) -> list[str]:
    r"""Return the contents of all \boxed{...} and \fbox{...} that close and hold no other box."""
    open_groups: list[int | None] = []
    closed: list[tuple[int, str]] = []
    for token in _BOX_TOKEN.finditer(text):
        if token["box"]:
            open_groups.append(token.end())
        elif token[0] == "{":
            open_groups.append(None)
        elif token[0] == "}" and open_groups:
            opened = open_groups.pop()
            if opened is not None and not (closed and opened < closed[-1][0]):
                closed.append((opened, text[opened : token.start()].strip()))
    return [content for _, content in closed]


# Parts of a text that open or close a group; an escaped brace (\{) is a character and no group.
_BOX_TOKEN = re.compile(r"(?P<box>\\(?:boxed|fbox)\s*\{)|\\.|[{}]", re.DOTALL)
