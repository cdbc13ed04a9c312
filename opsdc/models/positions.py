"""The longest sequence that a model's positions allow."""

from __future__ import annotations

from typing import Any

from torch import nn

from opsdc.models.adapters import unwrap


def longest_sequence(model: Any) -> tuple[int, str] | None:
    """Return the most tokens that a sequence may have, and why; None where nothing is known.

    Rotary positions that depend on the length change for all rows of a batch when one gets longer
    than a switch, and between a sampler's cache and one forward over the same tokens.
    """
    limits = [*_switches(unwrap(model).config.get_text_config()), *_tables(unwrap(model))]
    return min(limits, default=None)


def _switches(config: Any) -> list[tuple[int, str]]:
    """List the lengths above which rotary positions are others than below."""
    rope = getattr(config, "rope_parameters", None) or {}
    # Some architectures have parameters by the kind of layer.
    by_layer = [r for r in rope.values() if isinstance(r, dict)] or [rope]
    limits = []
    for parameters in by_layer:
        kind = str(parameters.get("rope_type", parameters.get("type", "")))
        switch = None
        if kind == "longrope":
            switch = parameters.get("original_max_position_embeddings") or getattr(
                config, "original_max_position_embeddings", config.max_position_embeddings
            )
        elif "dynamic" in kind:
            switch = config.max_position_embeddings
        if switch is not None:
            limits.append((int(switch), f"its rotary positions ({kind}) change with longer ones"))
    return limits


def _tables(base: Any) -> list[tuple[int, str]]:
    """List the lengths of tables that have an entry for each position."""
    most = getattr(base.config.get_text_config(), "max_position_embeddings", None)
    if most is None:
        return []
    tokens = base.get_input_embeddings()
    # Some leave the first one or two entries to padding.
    sizes = {most, most + 1, most + 2}
    tables = [
        *(m.num_embeddings for m in base.modules() if isinstance(m, nn.Embedding) and m != tokens),
        *(size for buffer in base.buffers() if buffer.dim() > 1 for size in buffer.shape),
    ]
    return [(most, "it has a table of so many positions")] if sizes & set(tables) else []
