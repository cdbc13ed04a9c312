"""What a kernel costs on a device: operations, bytes from memory, bytes from L2, and milliseconds.

A kernel that computes tiles of logits cannot end before its products have been computed, before
its operands have come from memory, nor before every tile has read its own from L2. The last of the
three is what small tiles are bound by: of a step over BK hidden units, a tile of BM rows and BN
columns reads (BM + BN)·BK numbers per head and multiplies BM·BN·BK of them.
"""

from __future__ import annotations

from math import ceil
from typing import NamedTuple

from opsdc_kernels.fused.configs import Config


class Device(NamedTuple):
    """Rates of a device, the vendor's but for `l2`."""

    name: str
    half: float
    """TFLOP/s, dense, of 16-bit operands with fp32 sums."""
    single: float
    """TFLOP/s of fp32."""
    memory: float
    """TB/s."""
    l2: float
    """TB/s read from L2 by all processors together, measured."""
    l2_source: str
    """On what it was measured."""


GPU_BENCHES = "gpu-benches' gpu-l2-cache on "
"""Published outputs of github.com/RRZE-HPC/gpu-benches: the plateau of buffers that fit into L2."""
DEVICES = {
    "sm_80": Device("A100 80GB SXM", 312.0, 19.5, 2.04, 5.4, GPU_BENCHES + "an A100 80GB"),
    # An H200 is the same chip with faster memory.
    "sm_90": Device("H100 SXM", 989.0, 67.0, 3.35, 9.7, GPU_BENCHES + "an H200"),
    "sm_100": Device("B200", 2250.0, 75.0, 8.0, 18.8, GPU_BENCHES + "a GB200"),
    "sm_120": Device("RTX 5090", 209.5, 104.8, 1.79, 5.2, GPU_BENCHES + "an L40, for want of one"),
    "gfx942": Device("MI300X", 1307.0, 163.4, 5.3, 27.0, "gpu-benches' gpu-cache on an MI300X"),
}
"""By target of the compiler."""
H200 = DEVICES["sm_90"]._replace(name="H200 SXM", memory=4.8)
SUSTAINED = 0.74
"""The share of the vendor's TFLOP/s that a library's large products reach: 730 of 989 on an
H100."""
STREAMED = 0.9
"""The share of the vendor's TB/s that reading and writing in order reaches."""


class Size(NamedTuple):
    """A call: tokens, hidden size, vocabulary."""

    tokens: int
    dim: int
    vocab_size: int

    def __str__(self) -> str:
        return f"N {self.tokens}, D {self.dim}, V {self.vocab_size}"


SIZES = (Size(8192, 4096, 151936), Size(8192, 4096, 128256), Size(16384, 2048, 151936))
"""Those that the audit forecasts: a Qwen3-8B head, a Llama-3 one, a Qwen3-1.7B one."""


class Cost(NamedTuple):
    """Milliseconds that a kernel cannot end before, by what bounds it."""

    tensor: float = 0.0
    """Products, at the rate that a library's reach."""
    memory: float = 0.0
    l2: float = 0.0

    @property
    def milliseconds(self) -> float:
        """The forecast: what bounds it, as if the rest were hidden behind."""
        return max(self)

    @property
    def bound_by(self) -> str:
        """The name of the largest."""
        return self._fields[self.index(max(self))]


class Kernel(NamedTuple):
    """What a kernel that computes tiles of logits multiplies, and what it leaves in memory."""

    products: int
    """Operands of BM rows: one per head; for one head of 16 bits the student's, and the difference
    in two parts."""
    weights: int
    """Heads."""
    item: int
    """Bytes of an operand's element."""
    written: int = 0
    """Bytes per logit."""

    @classmethod
    def of(cls, name: str, *, shared: bool, item: int) -> Kernel:
        """`name`: statistics | jsd | gradient."""
        products = 3 if shared and item == 2 else 2
        return cls(products, 1 if shared else 2, item, item if name == "gradient" else 0)

    def step_flop(self, config: Config) -> int:
        """Operations of one step of a tile."""
        return 2 * self.products * config.BM * config.BN * config.BK

    def step_bytes(self, config: Config) -> int:
        """Bytes that one step of a tile reads from L2."""
        return self.item * config.BK * (self.products * config.BM + self.weights * config.BN)

    def cost(self, config: Config, device: Device, size: Size) -> Cost:
        """Of one pass over all tokens and columns."""
        blocks, tiles = ceil(size.tokens / config.BM), ceil(size.vocab_size / config.BN)
        steps = blocks * tiles * ceil(size.dim / config.BK)
        logits = size.tokens * size.vocab_size
        # Weights come from memory once per group of row blocks, hidden states once.
        groups = ceil(blocks / config.GROUP)
        moved = self.weights * size.vocab_size * groups + self.products * size.tokens
        moved = self.item * size.dim * moved + self.written * logits
        rate = device.single if self.item == 4 else device.half
        return Cost(
            tensor=steps * self.step_flop(config) / (SUSTAINED * rate * 1e9),
            memory=moved / (STREAMED * device.memory * 1e9),
            l2=(steps * self.step_bytes(config) + self.written * logits) / (device.l2 * 1e9),
        )


def product_cost(device: Device, size: Size, item: int, moved: float = 0.0) -> Cost:
    """Of one head GEMM by a library, whose tiles are as large as L2 needs; it moves so many bytes
    from and to memory."""
    rate = device.single if item == 4 else device.half
    flop = 2 * size.tokens * size.dim * size.vocab_size
    return Cost(tensor=flop / (SUSTAINED * rate * 1e9), memory=streaming_cost(device, moved).memory)


def streaming_cost(device: Device, moved: float) -> Cost:
    """Of a pass that reads and writes so many bytes in order."""
    return Cost(memory=moved / (STREAMED * device.memory * 1e9))


def device_of(target: str, name: str = "") -> Device:
    """The device of a target; `name` as the driver gives it tells an H200 from an H100."""
    return H200 if target == "sm_90" and "H200" in name else DEVICES[target]
