"""The errors that a caller can act on; each is also the standard library's error it refines."""


class OPSDCError(Exception):
    """The base of all errors that OPSDC raises on purpose."""


class ConfigError(OPSDCError, ValueError):
    """A setting is unknown, mistyped or out of range."""


class DataError(OPSDCError, ValueError):
    """A problem, a column or a prompt cannot be used."""


class ModelError(OPSDCError, ValueError):
    """The model or its head has a feature that the loss does not describe."""


class CheckpointError(OPSDCError, OSError):
    """A checkpoint, or the record of a run, cannot be written or read."""


class TrainingError(OPSDCError, RuntimeError):
    """Training cannot go on."""


class OutOfMemoryError(TrainingError, MemoryError):
    """One of several ranks found no memory, and the others cannot go on without it."""


class RolloutError(OPSDCError, RuntimeError):
    """The sampler gave no answer, or none that can be trained on."""


class WeightSyncError(OPSDCError, RuntimeError):
    """The sampler did not prove that it has the weights it was given."""
