"""Numbers as people read them: the terminal's report and the page write them alike."""

from __future__ import annotations

ARMS = {"base": "base", "prompt_only": "base, told to be concise", "trained": "trained"}
"""Arms by their key in summary.json, with the title of their row."""

FEWEST, TOO_FEW = 10, "too few problems for an interval"
"""Of fewer problems a bootstrap sees too little of what they might have been."""


def percent(share: float | None) -> str:
    """Return a share as percent, a dash where there is none."""
    return "–" if share is None else f"{100 * share:.1f} %"


def points(low: float, high: float) -> str:
    """Return the interval of a difference between shares, in percentage points."""
    return f"{100 * low:+.1f} … {100 * high:+.1f}"


def p_value(p: float) -> str:
    """Return a p-value with its sign; the summary has four places of it."""
    return f"= {p:.2g}" if p else "< 0.0001"
