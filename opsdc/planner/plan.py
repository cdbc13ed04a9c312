"""Where the bytes of a run go, before it starts: what `opsdc plan` prints and preflight warns by.

Parameters are counted on the model itself, built without memory; activations are traced on it
(`opsdc.planner.activations`); the loss is planned by the kernels' own planner. Everything is per
device.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedConfig

from opsdc.config.settings import LoRAConfig, ModelConfig, OPSDCConfig
from opsdc.errors import ConfigError
from opsdc.models.adapters import unwrap
from opsdc.models.head import read_head
from opsdc.models.load import VARIABLE_LENGTH, load_architecture
from opsdc.models.quantize import BYTES, elements
from opsdc.planner.activations import activations, on_meta, read_architecture, read_model
from opsdc_kernels import plan as kernels

USABLE = 0.92
"""Share of a device's memory that a plan may fill: the rest goes to its context and to gaps."""
_MOST_ROWS = 1 << 14
PHASES = ("sampling", "teacher", "loss", "backward", "update")
_UNITS = {"": 1, "B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """Elements of a model, and what they are made of."""

    trained: int
    frozen: int
    in_4_bits: int
    """of the frozen ones"""
    head: int
    """V·D"""
    vocab_size: int
    dim: int
    largest_layer: int
    largest_matrix: int
    trains_head: bool
    tied: bool
    item: int
    """bytes of an element that the forward computes with"""


def sizes_of(model: Any, config: ModelConfig) -> Sizes:
    """Of a model on any device, "meta" included, ready to be trained as `config` says."""
    base, head = unwrap(model), read_head(model).weight
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    layers = set(base._no_split_modules or ())
    matrices = [
        elements(m.weight)
        for m in base.modules()
        if isinstance(m, torch.nn.Linear) and m.weight is not head and not m.weight.requires_grad
    ]
    return Sizes(
        trained=trained,
        frozen=sum(elements(p) for p in model.parameters()) - trained,
        in_4_bits=sum(matrices) if config.quantize else 0,
        head=head.numel(),
        vocab_size=head.shape[0],
        dim=head.shape[1],
        largest_layer=max(
            (
                sum(p.numel() for p in module.parameters())
                for module in base.modules()
                if type(module).__name__ in layers
            ),
            default=0,
        ),
        largest_matrix=max(matrices, default=0),
        trains_head=head.requires_grad,
        tied=head is base.get_input_embeddings().weight,
        item=getattr(torch, config.dtype).itemsize,
    )


@functools.cache
def _sizes(architecture: str, model: str) -> Sizes:
    config = read_model(model)
    return sizes_of(on_meta(read_architecture(architecture), config), config)


def loss_plan(
    sizes: Sizes, config: OPSDCConfig, tokens: int, device: torch.device, workspace: int | None
) -> kernels.Plan:
    """The kernels' plan of the loss over `tokens` response tokens at once, all columns kept."""
    plan = kernels.estimate(
        tokens=tokens,
        vocab_size=sizes.vocab_size,
        student_dim=sizes.dim,
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
    rows: int
    """sequences of full length in one forward"""
    width: int
    """tokens of a sequence of full length"""
    parts: dict[str, dict[str, float]]
    """what → phase → bytes"""
    loss: kernels.Plan
    loss_flop: float
    """of the loss of a whole step, on this device"""

    def total(self, phase: str) -> float:
        """Bytes in one phase of a step."""
        return sum(part.get(phase, 0) for part in self.parts.values())

    @property
    def peak_bytes(self) -> float:
        return max(map(self.total, PHASES))

    @property
    def fits(self) -> bool:
        return self.peak_bytes <= USABLE * self.memory_bytes

    @property
    def phase(self) -> str:
        """Where the peak is."""
        return max(PHASES, key=self.total)

    def __str__(self) -> str:
        lines = [f"{'GiB per device':<34}" + "".join(f"{phase:>10}" for phase in PHASES)]
        for name, part in self.parts.items():
            cells = (part.get(phase, 0) / 2**30 for phase in PHASES)
            shown = "".join(f"{cell:>10.2f}" if cell else f"{'–':>10}" for cell in cells)
            lines.append(f"{name:<34}{shown}")
        total = "".join(f"{self.total(phase) / 2**30:>10.2f}" for phase in PHASES)
        lines.append(f"{'together':<34}{total}")
        return "\n".join(lines)


def report(
    config: OPSDCConfig, *, memory_bytes: int | None, gpus: int, tflops: float
) -> tuple[Plan, str]:
    """The plan of a configuration, and it with a table, a verdict and alternatives as text.

    `tflops`: rate of the head's GEMMs that the time of the loss is stated for.
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
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    if not plan.fits and plan.phase == "sampling":
        verdict += " (lower rollout.batch_size and eval.batch_size)"
    most = largest_rows(config, make)
    lines = [
        f"{config.model.name_or_path}, {adapter}, {config.model.dtype}; {devices}",
        "",
        str(plan),
        "",
        f"{verdict}: peak {plan.peak_bytes / 2**30:.1f} GiB ({plan.phase}) of the "
        f"{USABLE * plan.memory_bytes / 2**30:.1f} GiB that may be filled",
        f"a forward: {plan.rows} x {plan.width:,} tokens; the most that fits: "
        f"{most} x {plan.width:,} (train.max_tokens_per_micro_batch {most * plan.width})",
        f"loss of a step: {plan.loss.gemm_units:g} head GEMMs"
        f"{' at most (loss.skip_tolerance)' if config.loss.skip_tolerance else ''}, "
        f"{plan.loss_flop / 1e15:.2f} PFLOP, "
        f"{plan.loss_flop / tflops / 1e12:.2f} s at {tflops:g} TFLOP/s",
        "",
        f"{'instead':<34}{'peak GiB':>10}{'fits':>6}  most per forward",
    ]
    for name, other in _alternatives(config, gpus).items():
        found, rows = make(other), largest_rows(other, make)
        lines.append(
            f"{name:<34}{found.peak_bytes / 2**30:>10.1f}{'yes' if found.fits else 'no':>6}  "
            f"{rows} x {plan.width:,}"
        )
    return plan, "\n".join(lines)


def largest_rows(config: OPSDCConfig, make: Callable[..., Plan]) -> int:
    """Sequences of full length of which one forward has room; 0 where it has for not even one."""

    def fits(rows: int) -> bool:
        plan = make(config, rows=rows)
        training = ("teacher", "loss", "backward", "update")
        return max(map(plan.total, training)) <= USABLE * plan.memory_bytes

    heights = range(1, _MOST_ROWS + 1)
    return bisect.bisect_left(heights, True, key=lambda rows: not fits(rows))


def _alternatives(config: OPSDCConfig, gpus: int) -> dict[str, OPSDCConfig]:
    """Neighbours of a configuration that a user would ask about next."""
    model = config.model
    full = replace(model, lora=None, quantize=None)
    adapter = replace(model, lora=model.lora or LoRAConfig())
    checkpointed = replace(model, gradient_checkpointing=not model.gradient_checkpointing)
    found = {
        "an adapter (model.lora)" if model.lora is None else "full fine-tuning": replace(
            config, model=adapter if model.lora is None else full
        ),
        "gradient_checkpointing " + ("off" if model.gradient_checkpointing else "on"): replace(
            config, model=checkpointed
        ),
    }
    sharded = gpus > 1 and config.distributed.strategy == "fsdp"
    if model.quantize is not None:
        found[f"a base in {model.dtype}"] = replace(config, model=replace(model, quantize=None))
    elif model.lora is not None and config.distributed.strategy == "ddp":
        found["a base in 4 bits (model.quantize)"] = replace(
            config, model=replace(model, quantize="nf4")
        )
    if model.lora is None and config.teacher.mode != "live" and not sharded:
        offload = not config.teacher.offload
        found[f"teacher.offload {str(offload).lower()}"] = replace(
            config, teacher=replace(config.teacher, offload=offload)
        )
    if config.rollout.engine == "hf":
        found["rollout.engine vllm"] = replace(
            config, rollout=replace(config.rollout, engine="vllm")
        )
    return found


def parse_bytes(text: str) -> int:
    """ "80GB" → 80·10⁹, "76GiB" → 76·2³⁰; raises ConfigError."""
    number = text.upper().rstrip("KMGTIB")
    try:
        return int(float(number) * _UNITS[text.upper()[len(number) :].strip()])
    except (ValueError, KeyError):
        raise ConfigError(f"--gpu-memory must be like 80GB or 76GiB, got '{text}'") from None


def make_plan(
    config: OPSDCConfig,
    *,
    memory_bytes: int | None,
    gpus: int = 1,
    architecture: PreTrainedConfig | None = None,
    rows: int | None = None,
) -> Plan:
    """What a step of this configuration takes at its worst: every sequence at its full length.

    Args:
        memory_bytes: of one GPU; None plans for this machine's CPU.
        gpus: data-parallel ranks.
        architecture: of the model; read from the config's name where not given.
        rows: sequences per forward; from `train.max_tokens_per_micro_batch` where not given.
    """
    device = torch.device("cpu" if memory_bytes is None else "cuda")
    if memory_bytes is None:
        memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if architecture is None:
        architecture = load_architecture(config.model.name_or_path, revision=config.model.revision)
    shape = architecture.to_json_string(use_diff=False)
    sizes = _sizes(shape, json.dumps(dataclasses.asdict(config.model)))
    # Neither changes what is traced, so that one trace serves.
    traced = replace(config.model, compile=False, liger=False, quantize=None)
    keys = (shape, json.dumps(dataclasses.asdict(traced)))
    response, width = _lengths(config)
    sequences = -(-config.rollout.prompts_per_step * config.rollout.samples_per_prompt // gpus)
    if rows is None:
        rows = min(max(config.train.max_tokens_per_micro_batch // width, 1), sequences)
    workspace = config.loss.workspace_bytes
    if workspace is None and device.type == "cuda":
        # The default of a device that is not here.
        workspace = memory_bytes // 64
    loss = loss_plan(sizes, config, rows * response, device, workspace)
    whole_step = loss_plan(sizes, config, sequences * response, device, workspace)
    context = _Context(
        config=config,
        architecture=architecture,
        keys=keys,
        sizes=sizes,
        gpus=gpus,
        memory_bytes=memory_bytes,
        on_gpu=device.type == "cuda",
    )
    return Plan(
        memory_bytes=memory_bytes,
        rows=rows,
        width=width,
        parts={
            name: part
            for name, part in _parts(context, rows, width, sequences * response, loss)
            if any(part.values())
        },
        loss=loss,
        loss_flop=2.0 * whole_step.gemm_units * sequences * response * sizes.head,
    )


def _lengths(config: OPSDCConfig) -> tuple[int, int]:
    """Tokens of the longest response that is trained on, and of it behind the longest prompt."""
    sampled = config.rollout.max_new_tokens
    response = min(sampled, config.train.max_train_tokens or sampled)
    return response, config.prompt.max_tokens + response


@dataclass(frozen=True, kw_only=True, slots=True)
class _Context:
    config: OPSDCConfig
    architecture: PreTrainedConfig
    keys: tuple[str, str]
    sizes: Sizes
    gpus: int
    memory_bytes: int
    on_gpu: bool

    @property
    def sharded(self) -> bool:
        return self.gpus > 1 and self.config.distributed.strategy == "fsdp"


def _parts(
    c: _Context, rows: int, width: int, step_tokens: int, loss: kernels.Plan
) -> Iterator[tuple[str, dict[str, float]]]:
    """Every holder of memory, by phase."""
    config, sizes = c.config, c.sizes
    cut = c.gpus if c.sharded else 1
    always = dict.fromkeys(PHASES, 1.0)

    def during(size: float, *phases: str) -> dict[str, float]:
        return dict.fromkeys(phases or always, float(size))

    yield "weights, trained (float32)", during(4 * sizes.trained / cut)
    plain = sizes.item * (sizes.frozen - sizes.in_4_bits)
    yield f"weights, frozen ({config.model.dtype})", during(plain / cut)
    yield "weights, frozen (4 bits)", during(BYTES * sizes.in_4_bits)
    if sizes.in_4_bits:
        matrix = sizes.item * sizes.largest_matrix
        yield "a matrix, dequantized", during(matrix, "sampling", "teacher", "loss", "backward")
    yield "AdamW moments (float32)", during(8 * sizes.trained / cut)
    if config.teacher.mode != "live":
        # Paged: its values take the student's place for the teacher's pass, but for the head.
        head = 4 * sizes.head * sizes.trains_head
        paged = {"loss": float(head), "backward": float(head)}
        copy = during(4 * sizes.trained / cut)
        yield "teacher's copy (float32)", paged if config.teacher.offload else copy
    gradients = during(4 * sizes.trained / cut, "loss", "backward", "update")
    if c.sharded and not config.distributed.reduce_every_micro_batch:
        # Added over the ranks once a step: until then each rank's own are of the whole model.
        gradients |= during(4 * sizes.trained, "loss", "backward")
    yield "gradients (float32)", gradients

    masked = config.model.attn_implementation not in VARIABLE_LENGTH
    one, more = activations(*c.keys, width=width, masked=masked)
    found = one + more * (rows - 1)
    # What does not grow with rows: weights that autocast has cast.
    cast = config.model.dtype != "float32"
    copies = max(one.kept - more.kept, 0.0) * cast
    if c.sharded:
        # FSDP computes with gathered 16-bit parameters instead: two layers and the root.
        gathered = sizes.item * (2 * sizes.largest_layer + 2 * sizes.head)
        yield "gathered layers and head", during(gathered, "teacher", "loss", "backward")
        whole = sizes.item * (sizes.trained + sizes.frozen)
        if config.rollout.engine == "hf":
            yield "whole model, gathered to sample", during(whole, "sampling")
        else:
            yield "a tensor, gathered to push", during(sizes.item * sizes.head, "sampling")
    elif copies:
        kept = copies if not config.model.gradient_checkpointing else 0.0
        held = {"teacher": copies, "loss": copies, "backward": kept}
        yield f"weights cast to {config.model.dtype}", held
    embedding = 4 * sizes.head * sizes.trains_head
    backward = max(
        found.backward
        - (0 if config.model.gradient_checkpointing else copies)
        + embedding * sizes.tied,
        embedding * (1 + sizes.tied),
    )
    yield (
        "activations",
        {
            "teacher": max(found.teacher - copies, 0.0),
            "loss": max(found.kept, found.forward - loss.peak_bytes) - copies,
            "backward": backward,
        },
    )
    hidden = step_tokens * sizes.dim * (sizes.item if sizes.frozen or c.sharded else 4)
    yield "teacher's hidden states", during(hidden, "teacher", "loss", "backward")
    yield "loss: scratch and its gradients", during(loss.peak_bytes, "loss")
    # AdamW for all tensors at once (a GPU's way) holds a root per element; else one tensor's.
    temporary = 4 * sizes.trained / cut if c.on_gpu else 4 * sizes.head * sizes.trains_head
    yield "AdamW's temporaries", during(temporary, "update")
    yield from _sampling(c)


def _sampling(c: _Context) -> Iterator[tuple[str, dict[str, float]]]:
    rollout, evaluation, text = c.config.rollout, c.config.eval, c.architecture.get_text_config()
    if rollout.engine != "hf":
        share = rollout.memory_share * c.memory_bytes
        # In this process vLLM sleeps while the model trains; a server of one's own is elsewhere.
        phases = ("sampling",) if rollout.engine == "vllm" else PHASES
        if rollout.server_address is None:
            yield f"vLLM ({rollout.engine})", dict.fromkeys(phases, share)
        return
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    item = c.sizes.item if c.sizes.frozen or c.sharded else 4
    per_layer = 2 * heads * size * item
    prompts = c.config.prompt.max_tokens

    def together(batch: int, sequences: int) -> int:
        return min(batch, -(-sequences // c.gpus))

    step = rollout.prompts_per_step * rollout.samples_per_prompt
    asked = [(together(rollout.batch_size, step), rollout.max_new_tokens)]
    held_out = c.config.data.eval_size if evaluation.problems is None else evaluation.problems
    if held_out:
        batch = together(evaluation.batch_size, held_out * evaluation.samples)
        asked.append((batch, evaluation.max_new_tokens))
    # Transformers' cache grows by copying a layer's keys and values.
    cache = max(
        batch * (prompts + new) * per_layer * (text.num_hidden_layers + 1) for batch, new in asked
    )
    logits = max(batch for batch, _ in asked) * c.sizes.vocab_size * 4 * 4
    yield "keys, values and logits (hf)", {"sampling": float(cache + logits)}
