"""Settings: frozen dataclasses, filled from YAML, overridden by dotted command-line flags.

Unknown keys, duplicate keys and mistyped values are errors that name the place; so are the names
other trainers use for the same thing, answered with ours.
"""

from opsdc.config.describe import flags, ignored_settings, section_title  # noqa: F401
from opsdc.config.settings import (  # noqa: F401
    DataConfig,
    DistributedConfig,
    EvalConfig,
    GuardConfig,
    LogConfig,
    LoRAConfig,
    LossConfig,
    ModelConfig,
    OPSDCConfig,
    OptimConfig,
    PromptConfig,
    RolloutConfig,
    TeacherConfig,
    TrainConfig,
)
from opsdc.config.yaml_file import recipe_names  # noqa: F401
