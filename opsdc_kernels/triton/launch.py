"""How every kernel is launched."""

from __future__ import annotations

import os
from typing import NamedTuple

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# Contraction of a multiply and an add would turn t - s into fma(h, pre, -s): not 0 where teacher
# and student are equal.
ENABLE_FP_FUSION = False


class RowsConfig(NamedTuple):
    """Launch configuration of the row pass, which reads logits from memory."""

    BV: int
    """Columns per step."""
    num_warps: int


ROWS = RowsConfig(512, 4)
"""On every target."""
