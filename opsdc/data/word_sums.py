"""The demo's problems: one-step word problems that a 135M model can follow and often solve."""

from __future__ import annotations

import random
from typing import Any

# A problem is a sentence filled with a name, a thing and two numbers, the larger one first. The
# answer is the sum in sentences of _MORE and the difference in those of _LESS.
_NAMES = ("Anna", "Ben", "Clara", "David", "Ella", "Finn", "Grace", "Hugo", "Ida", "Jonas")
_THINGS = ("apples", "books", "coins", "eggs", "flowers", "marbles", "pencils", "stamps", "toys")
_MORE = (
    "{name} has {a} {things} and gets {b} more. How many {things} does {name} have now?",
    "There are {a} {things} in a box. {name} puts {b} more {things} into it. "
    "How many {things} are in the box now?",
    "{name} found {a} {things} on Monday and {b} {things} on Tuesday. "
    "How many {things} did {name} find in all?",
)
_LESS = (
    "{name} has {a} {things} and gives {b} of them away. How many {things} are left?",
    "There are {a} {things} on the table. {name} takes {b} of them. "
    "How many {things} are still on the table?",
)


def word_sums(size: int, seed: int) -> list[dict[str, Any]]:
    """Return `size` different problems as rows with `problem` and `answer`, drawn by the seed.

    Numbers are 1 to 20. Raises ValueError for more problems than a quarter of those that exist.
    """
    possible = (len(_MORE) + len(_LESS)) * len(_NAMES) * len(_THINGS) * 190
    if not 1 <= size <= possible // 4:
        raise ValueError(f"size must be 1 to {possible // 4}, got {size}")
    draw = random.Random(f"word sums {seed}")
    rows: dict[str, dict[str, Any]] = {}
    while len(rows) < size:
        template = draw.choice(_MORE + _LESS)
        b, a = sorted(draw.sample(range(1, 21), 2))
        text = (
            template.replace("{name}", draw.choice(_NAMES))
            .replace("{things}", draw.choice(_THINGS))
            .replace("{a}", str(a))
            .replace("{b}", str(b))
        )
        rows[text] = {"problem": text, "answer": str(a + b if template in _MORE else a - b)}
    return list(rows.values())
