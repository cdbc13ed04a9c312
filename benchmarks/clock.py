"""Splits one update into phases, whoever's it is, by watching both backbones."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

PHASES = ("teacher", "forward", "loss", "backward")


def phases(update: Callable[[], float], student: nn.Module, teacher: nn.Module) -> dict[str, float]:
    """Seconds of `update`, which runs each backbone once and then backward.

    `teacher` and `forward` are spent inside the two backbones; `backward` from the moment at which
    the gradient reaches the student's hidden states; `loss` is the rest: both heads, the divergence
    and its gradients. What comes before the first backbone (batching) is left out.
    """
    entered: dict[str, float] = {}
    spent: dict[str, float] = {}
    arrived: list[float] = []

    def enter(name: str, module: nn.Module, arguments: Any) -> None:
        entered[name] = time.perf_counter()

    def leave(name: str, module: nn.Module, arguments: Any, output: Any) -> None:
        spent[name] = time.perf_counter() - entered[name]
        hidden: Tensor = output.last_hidden_state
        if hidden.requires_grad:
            hidden.register_hook(lambda gradient: arrived.append(time.perf_counter()))

    hooks = []
    for name, backbone in (("forward", student), ("teacher", teacher)):
        hooks.append(backbone.register_forward_pre_hook(partial(enter, name)))
        hooks.append(backbone.register_forward_hook(partial(leave, name)))
    try:
        update()
        ended = time.perf_counter()
    finally:
        for hook in hooks:
            hook.remove()
    spent["backward"] = ended - arrived[0]
    spent["loss"] = ended - min(entered.values()) - sum(spent.values())
    return {name: spent[name] for name in PHASES}
