"""Stage d: one whole step with a random body of the real size, beside what `opsdc plan` foretells.

The body has the real architecture's shapes and random weights, a LoRA adapter, and random tokens of
full length: time and memory depend on nothing else. Nothing is sampled.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.resident import resident_peak

FULL = {
    "rollout.prompts_per_step": 4,
    "rollout.max_new_tokens": 2048,
    "train.max_tokens_per_micro_batch": 4 * 3072,
}
SMALL = {
    "rollout.prompts_per_step": 2,
    "rollout.max_new_tokens": 8,
    "prompt.max_tokens": 16,
    "train.max_tokens_per_micro_batch": 64,
    "model.lora.r": 4,
    "model.lora.alpha": 8,
}
RECIPE = "qwen3-8b-lora"
TINY = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 512,
}  # fmt: skip
PHASES = ("teacher", "loss", "backward", "update")
"""As in `opsdc plan`'s table; `loss` begins with the student's forward."""


def measure(device: torch.device, *, small: bool) -> list[dict[str, Any]]:
    """Seconds and peak memory of each phase, and the plan's bytes of it."""
    from transformers import AutoModelForCausalLM

    from opsdc.config.settings import OPSDCConfig
    from opsdc.method import update as module
    from opsdc.method.batch import Layout, Pair
    from opsdc.method.teacher import Teacher
    from opsdc.models.load import load_architecture, prepare_model
    from opsdc.planner.plan import make_plan

    overrides: dict[str, Any] = {**(SMALL if small else FULL), "eval.problems": 0}
    if device.type == "cpu":
        overrides["model.dtype"] = "float32"
    config = OPSDCConfig.load(RECIPE, overrides)
    shape = load_architecture(config.model)
    for name, size in (TINY if small else {}).items():
        setattr(shape, name, size)
    if small:
        shape.layer_types = shape.layer_types[: TINY["num_hidden_layers"]]
    total = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    plan = make_plan(config, memory_bytes=total, architecture=shape)
    meter = Meter(device)
    torch.manual_seed(0)
    dtype = getattr(torch, config.model.dtype)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(shape, dtype=dtype, attn_implementation="sdpa")
    model = prepare_model(model, config.model).to(device).train()
    teacher = Teacher(model, config.teacher)
    optimizer, _ = module.make_optimizer(model, config)
    layout = Layout(packed=False, max_tokens=plan.rows * plan.width, pad_id=0, dtype=dtype)
    pairs = _pairs(Pair, config, shape.vocab_size)
    seconds: dict[str, float] = {}
    for _ in range(2):  # compilation, first touches and the optimizer's moments come first
        seconds = meter.watch(module, optimizer, lambda: module.update(
            model, teacher, pairs, optimizer, layout, config))  # fmt: skip
    return [
        {
            "phase": phase, "seconds": seconds[phase], "peak_mib": meter.peaks[phase] / 2**20,
            "planned_mib": plan.total(phase) / 2**20,
            "tokens": len(pairs) * plan.width, "response_tokens": sum(
                len(pair.response_ids) for pair in pairs),
        }
        for phase in PHASES
    ]  # fmt: skip


def _pairs(Pair: Any, config: Any, vocab_size: int) -> list[Any]:
    generator = torch.Generator().manual_seed(0)

    def tokens(count: int) -> list[int]:
        return torch.randint(vocab_size, (count,), generator=generator).tolist()

    return [
        Pair(
            student_prompt_ids=tokens(config.prompt.max_tokens),
            teacher_prompt_ids=tokens(config.prompt.max_tokens),
            response_ids=tokens(config.rollout.max_new_tokens),
        )
        for _ in range(config.rollout.prompts_per_step)
    ]


class Meter:
    """Seconds of a step's phases, and the most memory held in each above what there was at first.

    A phase ends with the function that names it: the teacher's pass, the loss, the backward, the
    optimizer's step.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._restart()
        self._before = self._peak()
        self.peaks: dict[str, int] = {}

    def watch(self, module: Any, optimizer: Any, step: Callable[[], object]) -> dict[str, float]:
        """Run `step` and return the seconds of its phases; the peaks are kept."""
        seconds = dict.fromkeys(PHASES, 0.0)
        self.peaks = dict.fromkeys(PHASES, 0)
        with ExitStack() as watching:
            for phase, owner, name in (
                ("teacher", module, "teacher_pass"),
                ("loss", module, "distillation_loss"),
                ("backward", torch.Tensor, "backward"),
                ("update", optimizer, "step"),
            ):
                watching.enter_context(self._ends(phase, owner, name, seconds))
            self._restart()
            self._since = self._now()
            step()
        return seconds

    @contextmanager
    def _ends(self, phase: str, owner: Any, name: str, seconds: dict[str, float]) -> Iterator[None]:
        original = getattr(owner, name)

        def call(*arguments: Any, **keywords: Any) -> Any:
            result = original(*arguments, **keywords)
            now = self._now()
            seconds[phase] += now - self._since
            self.peaks[phase] = max(self.peaks[phase], self._peak() - self._before)
            self._restart()
            self._since = self._now()
            return result

        with mock.patch.object(owner, name, call):
            yield

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def _restart(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            # proc(5): writing 5 resets the high-water mark of the resident set.
            Path("/proc/self/clear_refs").write_text("5")

    def _peak(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return resident_peak()
