"""On-policy self-distillation of reasoning models (OPSDC / CRISP): a thin training loop.

The names are imported when first used, so that `opsdc --help` answers at once.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opsdc.config.settings import OPSDCConfig
    from opsdc.method.batch import Pair
    from opsdc.method.distiller import Distiller, collate
    from opsdc.train import OPSDCTrainer

# transformers imports bitsandbytes through peft, wherever it is installed, and bitsandbytes warns
# that it lacks a kernel which nothing here uses. Its other warnings stay.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
    lambda record: "gemm_4bit_forward" not in record.getMessage()
)

__version__ = "0.1.0"
__all__ = ["Distiller", "OPSDCConfig", "OPSDCTrainer", "Pair", "__version__", "collate"]


def __getattr__(name: str) -> Any:
    """Import a public name at its first use."""
    if name == "OPSDCConfig":
        from opsdc.config.settings import OPSDCConfig

        return OPSDCConfig
    if name == "OPSDCTrainer":
        from opsdc.train import OPSDCTrainer

        return OPSDCTrainer
    if name in ("Distiller", "Pair", "collate"):
        from opsdc.method import distiller

        return getattr(distiller, name)
    raise AttributeError(f"module 'opsdc' has no attribute '{name}'")


def __dir__() -> list[str]:
    """List the public names, imported or not."""
    return sorted({*globals(), *__all__})
