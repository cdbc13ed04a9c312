"""The plan of a run's memory, before it starts: bytes per device in each phase of a step.

Parameters are counted on the model itself, built without memory (`opsdc.planner.sizes`);
activations are traced on it (`opsdc.planner.activations`); the kernels' own planner plans the loss.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedConfig

from opsdc.config.settings import ModelConfig, OPSDCConfig
from opsdc.models.load import VARIABLE_LENGTH, load_architecture
from opsdc.models.other import settings_of_other
from opsdc.planner.activations import Activations, count_activations
from opsdc.planner.holders import PHASES, Run, holders
from opsdc.planner.sizes import Sizes, planned_sizes
from opsdc_kernels import plan as kernels

USABLE = 0.92
"""A plan may fill this share of a device's memory; the rest goes to its context and to gaps."""


def loss_plan(
    sizes: Sizes,
    config: OPSDCConfig,
    tokens: int,
    device: torch.device,
    workspace: int | None,
    teacher_dim: int,
) -> kernels.Plan:
    """Return the kernels' plan of the loss over `tokens` response tokens, all columns kept.

    `workspace` is its limit in bytes; None takes the kernels' default for the device. `teacher_dim`
    is the width of the states that the teacher scores with, see `Sizes.teacher_dim`.
    """
    plan = kernels.estimate(
        tokens=tokens,
        vocab_size=sizes.vocab_size,
        student_dim=sizes.dim,
        teacher_dim=teacher_dim,
        dtype=getattr(torch, config.model.dtype),
        device=device,
        trainable_head=sizes.trains_head,
        divergence=config.loss.divergence,
        backend=config.loss.backend,
        workspace_bytes=workspace,
    )
    share = config.loss.token_share
    # All tokens are scored without gradients first.
    return plan if share == 1 else replace(plan, gemm_units=2 + share * plan.gemm_units)


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Bytes per device of one configuration; `str` gives the table."""

    memory_bytes: int
    """The memory of one device."""
    rows: int
    """The number of sequences of full length in one forward."""
    width: int
    """The number of tokens of a sequence of full length."""
    parts: dict[str, dict[str, float]]
    """The bytes of each holder of memory, by its name and then by phase."""
    loss: kernels.Plan
    """The kernels' plan of the loss over the responses of one forward."""
    loss_flop: float
    """The operations of the loss of a whole step on one device."""
    unknown: str | None
    """Why activations are unknown and not counted; None where they are."""

    def total(self, phase: str) -> float:
        """Return the bytes in one phase of a step."""
        return sum(part.get(phase, 0) for part in self.parts.values())

    @property
    def peak_bytes(self) -> float:
        """The most bytes in any phase."""
        return max(map(self.total, PHASES))

    @property
    def fits(self) -> bool:
        """True where the peak leaves the device the room that it needs."""
        return self.peak_bytes <= USABLE * self.memory_bytes

    @property
    def phase(self) -> str:
        """The phase of the peak."""
        return max(PHASES, key=self.total)

    def __str__(self) -> str:
        lines = [f"{'GiB per device':<34}" + "".join(f"{phase:>10}" for phase in PHASES)]
        for name, part in self.parts.items():
            cells = (part.get(phase, 0) / 2**30 for phase in PHASES)
            shown = "".join(f"{cell:>10.2f}" if cell else f"{'–':>10}" for cell in cells)
            lines.append(f"{name:<34}{shown}")
        total = "".join(f"{self.total(phase) / 2**30:>10.2f}" for phase in PHASES)
        lines.append(f"{'together':<34}{total}")
        if self.unknown is not None:
            lines.append(f"activations unknown, and not in these sums: {self.unknown}")
        return "\n".join(lines)


def make_plan(
    config: OPSDCConfig,
    *,
    memory_bytes: int | None,
    gpus: int = 1,
    architecture: PreTrainedConfig | None = None,
    rows: int | None = None,
) -> Plan:
    """Plan a step of this configuration at its worst: every sequence at its full length.

    Args:
        memory_bytes: The memory of one GPU; None plans for this machine's CPU.
        gpus: The number of data-parallel ranks.
        architecture: The model's config; None loads it by the name in the settings.
        rows: Sequences per forward; None takes them from `train.max_tokens_per_micro_batch`.

    Raises ModelError where the architecture cannot be loaded.
    """
    device = torch.device("cpu" if memory_bytes is None else "cuda")
    if memory_bytes is None:
        memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if architecture is None:
        architecture = load_architecture(config.model)
    response, width = _lengths(config)
    sequences = -(-config.rollout.prompts_per_step * config.rollout.samples_per_prompt // gpus)
    if rows is None:
        rows = min(max(config.train.max_tokens_per_micro_batch // width, 1), sequences)
    workspace = config.loss.workspace_bytes
    if workspace is None and device.type == "cuda":
        # The kernels' default asks the device, which may not be on this machine.
        workspace = memory_bytes // 64
    sizes, activations = _count(architecture, config.model, width)
    other, its_activations = None, activations
    if (settings := settings_of_other(config)) is not None:
        its_architecture = load_architecture(settings, setting="teacher.model")
        other, its_activations = _count(its_architecture, settings, width)
    teacher_dim = sizes.teacher_dim(config.teacher, other)
    loss = loss_plan(sizes, config, rows * response, device, workspace, teacher_dim)
    whole_step = loss_plan(sizes, config, sequences * response, device, workspace, teacher_dim)
    # One of the GEMMs is the teacher's, whose states may have another width.
    units = whole_step.gemm_units + teacher_dim / sizes.dim - 1
    run = Run(
        config=config,
        architecture=architecture,
        sizes=sizes,
        other=other,
        gpus=gpus,
        memory_bytes=memory_bytes,
        on_gpu=device.type == "cuda",
        rows=rows,
        width=width,
        step_tokens=sequences * response,
        loss=loss,
        activations=activations,
        its_activations=its_activations,
    )
    return Plan(
        memory_bytes=memory_bytes,
        rows=rows,
        width=width,
        parts={name: part for name, part in holders(run) if any(part.values())},
        loss=loss,
        loss_flop=2.0 * units * sequences * response * sizes.head,
        unknown=next((a for a in (activations, its_activations) if isinstance(a, str)), None),
    )


def _count(
    architecture: PreTrainedConfig, config: ModelConfig, width: int
) -> tuple[Sizes, tuple[Activations, Activations] | str]:
    """Count a model's elements and its activations, see `count_activations`."""
    as_json = architecture.to_json_string(use_diff=False)
    # These settings do not change what is traced, so that one trace serves all of their values.
    traced = replace(config, compile=False, liger=False, quantize=None)
    masked = config.attn_implementation not in VARIABLE_LENGTH
    activations = count_activations(as_json, traced, width=width, masked=masked)
    return planned_sizes(as_json, config), activations


def _lengths(config: OPSDCConfig) -> tuple[int, int]:
    """Return the tokens of the longest response trained on, alone and behind the longest prompt."""
    sampled = config.rollout.max_new_tokens
    response = min(sampled, config.train.max_train_tokens or sampled)
    return response, config.prompt.max_tokens + response
