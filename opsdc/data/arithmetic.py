"""The demo's problems: single questions of arithmetic that a 135M model can often answer."""

from __future__ import annotations

from typing import Any

# The model's own answers ramble on past the result; told to be direct it gives it, and is right
# more often. Other wordings ("Calculate 7 x 8.") get worse when told, so they are not here.
_TEMPLATES = (
    ("What is {a} times {b}?", int.__mul__),
    ("How much is {a} multiplied by {b}?", int.__mul__),
    ("What is {a} plus {b}?", int.__add__),
)

_NUMBERS = range(2, 13)


def arithmetic() -> list[dict[str, Any]]:
    """Return all questions as rows with `problem`, `answer` and `group`: the pair of numbers.

    There are 363: three wordings for each of the 121 ordered pairs from 2 to 12. The two orders of
    a pair are one group, so that no held-out sum or product is trained on in the other order.
    """
    return [
        {
            "problem": wording.replace("{a}", str(a)).replace("{b}", str(b)),
            "answer": str(operation(a, b)),
            "group": f"{min(a, b)} {max(a, b)}",
        }
        for a in _NUMBERS
        for b in _NUMBERS
        for wording, operation in _TEMPLATES
    ]
