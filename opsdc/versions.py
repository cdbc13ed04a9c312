"""What a record says of the software and the machine that made it."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

import torch

_PACKAGES = ("opsdc", "torch", "transformers", "triton", "peft", "tokenizers", "safetensors")


def versions() -> dict[str, Any]:
    """Package versions, Python, device and threads."""
    found: dict[str, Any] = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    cuda = torch.cuda.is_available()
    return found | {
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if cuda else f"cpu {platform.machine()}",
        "threads": torch.get_num_threads(),
    }
