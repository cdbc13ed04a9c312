"""The choice of `auto` between `chunked` and `fused`.

On a GPU it takes the one that was faster at about these sizes, where this package holds
measurements of the GPU's kind (`measured.json`, as `make gpu-day` writes it), and otherwise the one
that the cost model foretells to be faster. Everywhere else, and for what `fused` cannot compute, it
takes `chunked`.
"""

from __future__ import annotations

import functools
import json
import math
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from opsdc_kernels.fused.configs import config_for, target_of
from opsdc_kernels.fused.cost import (
    DEVICES,
    Device,
    Kernel,
    Size,
    device_of,
    product_cost,
    streaming_cost,
)

MEASURED = Path(__file__).with_name("measured.json")
"""Rows of target, dtype, tokens, dim, vocab_size, mode, chunked_ms and fused_ms."""
MODES = {(True, True): "trainable head", (False, True): "frozen head"}
"""The mode of a measurement, by trainable head and gradient; without a gradient "forward only"."""
NEAR = 4.0
"""Measurements hold for sizes up to so many times larger or smaller."""
MARGIN = 1.1
"""So many times faster `fused` must be by the model alone, which no GPU has confirmed yet."""
UNMEASURED = "sm_90"
"""The target that stands for a GPU which is not on this machine."""
STATISTICS_BYTES = 8
"""Per logit, read from memory by the row pass: both models' in fp32."""
GRADIENT_BYTES = 12
"""Per logit: both are read again, and the gradient is written."""
ROUNDING_BYTES = 28
"""Per logit, by `products.rounded_tile` for bf16 operands (fp16 takes more, for its scale): the
copy, and the sum of what it rounded, in four passes of torch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """What the choice depends on."""

    tokens: int
    vocab_size: int
    dims: tuple[int, int]
    """Hidden sizes of student and teacher."""
    dtype: torch.dtype
    device: torch.device
    trainable: bool
    """The head asks for a gradient."""
    gradient: bool
    """Anything does."""
    divergence: str
    shared_head: bool
    recomputes: bool
    """`chunked` runs twice: per-token values with a trainable head."""
    extras: bool
    """Soft-cap, bias or targets, for which `fused` has smaller tiles."""
    rows: int
    """Tokens of a chunk of `chunked` within the scratch allowed; 0 where not one fits."""
    workspace_bytes: int
    sharded: bool = False
    """A vocabulary that is cut over ranks, or columns left out: `chunked` alone."""


def choose(call: Call) -> tuple[str, str]:
    """The backend, and the reason."""
    if call.device.type != "cuda":
        return "chunked", f"auto: chunked on a {call.device.type.upper()}"
    if call.sharded or call.dtype == torch.float64 or find_spec("triton") is None:
        return "chunked", "auto: fused does not compute this"
    target, device = _device(call.device)
    if call.gradient and call.workspace_bytes < _least_tile(call, target):
        return "chunked", "auto: the scratch allowed is less than a gradient tile of fused"
    if call.rows == 0:
        return "fused", "auto: not one row of chunked fits the scratch allowed"
    measured = _measured(call, target)
    if measured is not None:
        chunked, fused = measured
        best = "fused" if fused < chunked else "chunked"
        return best, f"auto: measured, chunked {chunked:.1f} ms and fused {fused:.1f} ms"
    chunked, fused = chunked_ms(call, device), fused_ms(call, device, target)
    best = "fused" if MARGIN * fused < chunked else "chunked"
    return best, f"auto: forecast, chunked {chunked:.1f} ms and fused {fused:.1f} ms"


def forecast(call: Call, backend: str) -> float | None:
    """Milliseconds of forward and backward by the cost model; None where it says nothing: not on a
    GPU, float64, a sharded vocabulary, columns left out, no room for a row."""
    if call.device.type != "cuda" or call.sharded or call.dtype == torch.float64:
        return None
    target, device = _device(call.device)
    if backend == "fused":
        return fused_ms(call, device, target)
    return chunked_ms(call, device) if call.rows else None


def chunked_ms(call: Call, device: Device) -> float:
    """Forecast of `chunked`, forward and backward, in chunks of `rows` tokens."""
    item, rows, columns = call.dtype.itemsize, call.rows, call.vocab_size
    student, teacher = (Size(rows, dim, columns) for dim in call.dims)
    head, logits = item * columns, rows * columns
    # Per chunk, each head is read and the logits are written in fp32.
    forward = sum(
        product_cost(device, size, item, head * size.dim + 4 * logits).milliseconds
        for size in (student, teacher)
    )
    per_logit = STATISTICS_BYTES * (1 + (call.divergence == "jsd"))
    forward += streaming_cost(device, per_logit * logits).milliseconds
    backward = 0.0
    if call.gradient:
        per_logit = GRADIENT_BYTES + ROUNDING_BYTES * (item == 2)
        backward = streaming_cost(device, per_logit * logits).milliseconds
        tile = item * logits
        backward += product_cost(device, student, item, tile + head * student.dim).milliseconds
        if call.trainable:
            # The head's gradient is read and written in fp32.
            moved = tile + 8 * columns * student.dim
            backward += product_cost(device, student, item, moved).milliseconds
    chunks = call.tokens / rows
    return chunks * (forward * (1 + call.recomputes) + backward)


def fused_ms(call: Call, device: Device, target: str) -> float:
    """Forecast of `fused`, forward and backward."""
    item, size = call.dtype.itemsize, Size(call.tokens, max(call.dims), call.vocab_size)

    def tiles(kernel: str, config: str) -> float:
        chosen = config_for(
            config, target, "fp32" if item == 4 else "16-bit",
            shared=call.shared_head, extras=call.extras,
            by_teacher=call.divergence == "forward_kl",
        )  # fmt: skip
        made = Kernel.of(kernel, shared=call.shared_head, item=item)
        return made.cost(chosen, device, size).milliseconds

    jsd = call.divergence == "jsd"
    total = tiles("statistics", "statistics") + (tiles("jsd", "jsd") if jsd else 0.0)
    if not call.gradient:
        return total
    total += tiles("gradient", "jsd" if jsd else "gradient")
    height = min(max(call.workspace_bytes // (item * call.vocab_size), 1), max(call.tokens, 1))
    chunk, tile = Size(height, call.dims[0], call.vocab_size), item * height * call.vocab_size
    head = call.vocab_size * call.dims[0]
    products = product_cost(device, chunk, item, tile + item * head).milliseconds
    if call.trainable:
        products += product_cost(device, chunk, item, tile + 8 * head).milliseconds
    return total + products * call.tokens / height


def _device(device: torch.device) -> tuple[str, Device]:
    """Target and rates of the device; of an H100 where there is no GPU on this machine."""
    if not torch.cuda.is_available():
        return UNMEASURED, DEVICES[UNMEASURED]
    target = target_of(device)
    return target, device_of(target, torch.cuda.get_device_name(device))


def _least_tile(call: Call, target: str) -> int:
    """Bytes of the lowest gradient tile of `fused`."""
    kernel = "jsd" if call.divergence == "jsd" else "gradient"
    dtype = "fp32" if call.dtype.itemsize == 4 else "16-bit"
    config = config_for(kernel, target, dtype, shared=call.shared_head, extras=call.extras)
    return config.BM * call.vocab_size * call.dtype.itemsize


def _measured(call: Call, target: str) -> tuple[float, float] | None:
    """Milliseconds of both at the nearest sizes that were measured, scaled to these by their
    products; None where nothing near was. Measurements are of two heads without extras, of the
    reverse KL, at the default scratch."""
    plain = call.divergence == "reverse_kl" and not (call.shared_head or call.extras)
    if not plain or call.recomputes:
        return None
    mode = MODES[call.trainable, True] if call.gradient else "forward only"
    dtype = str(call.dtype).removeprefix("torch.")
    sizes = call.tokens, call.dims[0], call.vocab_size

    def distance(row: dict[str, Any]) -> float:
        there = row["tokens"], row["dim"], row["vocab_size"]
        return max(abs(math.log(a / b)) for a, b in zip(sizes, there, strict=True))

    rows = [
        row
        for row in measurements(MEASURED)
        if (row["target"], row["dtype"], row["mode"]) == (target, dtype, mode)
    ]
    if not rows or min(sizes) < 1 or call.dims[0] != call.dims[1]:
        return None
    nearest = min(rows, key=distance)
    if distance(nearest) > math.log(NEAR):
        return None
    scale = math.prod(sizes) / (nearest["tokens"] * nearest["dim"] * nearest["vocab_size"])
    return nearest["chunked_ms"] * scale, nearest["fused_ms"] * scale


@functools.cache
def measurements(path: Path) -> tuple[dict[str, Any], ...]:
    """The rows of a table of measurements; none where there is no such file."""
    if not path.is_file():
        return ()
    return tuple(json.loads(path.read_text("utf-8"))["rows"])
