"""On-policy self-distillation of reasoning models (OPSDC / CRISP): a thin training loop.

The names are imported when first used, so that `opsdc --help` answers at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opsdc.config import OPSDCConfig
    from opsdc.train import OPSDCTrainer

__version__ = "0.1.0"
__all__ = ["OPSDCConfig", "OPSDCTrainer", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "OPSDCConfig":
        from opsdc.config import OPSDCConfig

        return OPSDCConfig
    if name == "OPSDCTrainer":
        from opsdc.train import OPSDCTrainer

        return OPSDCTrainer
    raise AttributeError(f"module 'opsdc' has no attribute '{name}'")
