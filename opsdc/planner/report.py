"""The text that `opsdc plan` prints: the plan's table, a verdict, and neighbouring settings."""

from __future__ import annotations

import bisect
import functools
from collections.abc import Callable
from dataclasses import replace

from opsdc.config.settings import LoRAConfig, OPSDCConfig
from opsdc.errors import ConfigError
from opsdc.planner.plan import USABLE, Plan, make_plan

_MOST_ROWS = 1 << 14
"""No forward is planned with more sequences than this."""

_UNITS = {"B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
"""Sizes of memory are written with these units, in any case of letters."""


def report(
    config: OPSDCConfig, *, memory_bytes: int | None, gpus: int, tflops: float
) -> tuple[Plan, str]:
    """Return the plan of a configuration and the text about it.

    `tflops` is the rate of the head's GEMMs, for which the text states the time of the loss. Raises
    ModelError where the architecture cannot be loaded.
    """
    make = functools.partial(make_plan, memory_bytes=memory_bytes, gpus=gpus)
    plan = make(config)
    devices = f"one device of {plan.memory_bytes / 1e9:.0f} GB"
    if gpus > 1:
        strategy = config.distributed.strategy
        devices = f"{gpus} devices of {plan.memory_bytes / 1e9:.0f} GB, {strategy}"
    adapter = "full fine-tuning" if config.model.lora is None else f"LoRA r {config.model.lora.r}"
    if config.model.quantize is not None:
        adapter += f" on {config.model.quantize}"
    if config.teacher.model is not None:
        adapter += f", taught by {config.teacher.model}"
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    if plan.fits and plan.unknown:
        verdict = "fits, but for the activations"
    if not plan.fits and plan.phase == "sampling":
        verdict += " (lower rollout.batch_size and eval.batch_size)"
    most = f"{(rows := largest_rows(config, make))} x {plan.width:,}"
    most += f" (train.max_tokens_per_micro_batch {rows * plan.width})"
    lines = [
        f"{config.model.name_or_path}, {adapter}, {config.model.dtype}; {devices}",
        "",
        str(plan),
        "",
        f"{verdict}: peak {plan.peak_bytes / 2**30:.1f} GiB ({plan.phase}) of the "
        f"{USABLE * plan.memory_bytes / 2**30:.1f} GiB that may be filled",
        f"a forward: {plan.rows} x {plan.width:,} tokens; the most that fits: "
        f"{'unknown' if plan.unknown else most}",
        f"loss of a step: {plan.loss.gemm_units:g} head GEMMs"
        f"{' at most (columns are left out)' if config.loss.leaves_columns_out else ''}, "
        f"{plan.loss_flop / 1e15:.2f} PFLOP, "
        f"{plan.loss_flop / tflops / 1e12:.2f} s at {tflops:g} TFLOP/s",
        "",
        f"{'instead':<34}{'peak GiB':>10}{'fits':>6}  most per forward",
    ]
    for name, neighbour in _neighbours(config, gpus).items():
        its_plan, rows = make(neighbour), largest_rows(neighbour, make)
        lines.append(
            f"{name:<34}{its_plan.peak_bytes / 2**30:>10.1f}{'yes' if its_plan.fits else 'no':>6}  "
            + ("unknown" if its_plan.unknown else f"{rows} x {plan.width:,}")
        )
    return plan, "\n".join(lines)


def largest_rows(config: OPSDCConfig, make: Callable[..., Plan]) -> int:
    """Return how many sequences of full length one forward has room for, 0 for none."""

    def fits(rows: int) -> bool:
        plan = make(config, rows=rows)
        training = ("teacher", "loss", "backward", "update")
        return max(map(plan.total, training)) <= USABLE * plan.memory_bytes

    heights = range(1, _MOST_ROWS + 1)
    return bisect.bisect_left(heights, True, key=lambda rows: not fits(rows))


def _neighbours(config: OPSDCConfig, gpus: int) -> dict[str, OPSDCConfig]:
    """Return configurations that a user would ask about next, by the change that makes them."""
    model = config.model
    full = replace(model, lora=None, quantize=None)
    adapter = replace(model, lora=model.lora or LoRAConfig())
    checkpointed = replace(model, gradient_checkpointing=not model.gradient_checkpointing)
    neighbours = {
        "an adapter (model.lora)" if model.lora is None else "full fine-tuning": replace(
            config, model=adapter if model.lora is None else full
        ),
        "gradient_checkpointing " + ("off" if model.gradient_checkpointing else "on"): replace(
            config, model=checkpointed
        ),
    }
    sharded = gpus > 1 and config.distributed.strategy == "fsdp"
    if model.quantize is not None:
        unquantized = replace(model, quantize=None)
        neighbours[f"a base in {model.dtype}"] = replace(config, model=unquantized)
    elif model.lora is not None and config.distributed.strategy == "ddp":
        quantized = replace(model, quantize="nf4")
        neighbours["a base in 4 bits (model.quantize)"] = replace(config, model=quantized)
    if model.lora is None and config.teacher.mode != "live" and not sharded:
        teacher = replace(config.teacher, offload=not config.teacher.offload)
        name = f"teacher.offload {str(teacher.offload).lower()}"
        neighbours[name] = replace(config, teacher=teacher)
    if config.rollout.engine == "hf":
        rollout = replace(config.rollout, engine="vllm")
        neighbours["rollout.engine vllm"] = replace(config, rollout=rollout)
    return neighbours


def parse_bytes(text: str) -> int:
    """Read a size of memory, such as "80GB" (80·10⁹ bytes) or "76GiB" (76·2³⁰).

    Raises ConfigError for anything else, such as a number without its unit.
    """
    number = text.upper().rstrip("KMGTIB")
    try:
        size = float(number) * _UNITS[text.upper()[len(number) :].strip()]
        if not 0 < size < 1 << 62:
            raise ValueError(text)
        return int(size)
    except (ValueError, KeyError):
        raise ConfigError(f"--gpu-memory must be like 80GB or 76GiB, got '{text}'") from None
