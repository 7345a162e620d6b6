"""Everything perdure raises on purpose.

PerdureError
├── UsageError            a name, key, value or combination that is not allowed (the command line exits with 2)
│   ├── UnknownNameError  a name that no registry knows; says the nearest one
│   └── IncompatibleError parts that cannot work together; says both parties and what to do instead
├── DataError             examples that cannot be read or used: NaN, labels outside the classes, a missing column
├── ModelError            a model or optimizer that cannot be used: lazy parameters, wrong output width, ...
├── CapacityExhausted     a network whose weights are all taken, so that no further task can be learned
├── DivergedError         training whose loss became NaN or infinite
├── StorageError          a file that cannot be written or read: a full disk, a folder without permission
│   └── CheckpointError   a checkpoint that is damaged, foreign, or newer than this version
└── MissingExtraError     an optional dependency that is not installed; says how to install it

`PerdureWarning` is the category of every warning.
"""

from __future__ import annotations


class PerdureError(Exception):
    """Base class of every error that perdure raises on purpose."""


class UsageError(PerdureError, ValueError):
    """A name, key, value or combination that is not allowed."""


class UnknownNameError(UsageError):
    """A name that no registry knows."""


class IncompatibleError(UsageError):
    """Parts that cannot work together."""


class DataError(PerdureError, ValueError):
    """Examples that cannot be read or used."""


class ModelError(PerdureError, ValueError):
    """A model or an optimizer that cannot be used."""


class CapacityExhausted(PerdureError, RuntimeError):  # noqa: N818
    """A network in which no weight is left for a further task."""


class DivergedError(PerdureError, ArithmeticError):
    """Training whose loss became NaN or infinite."""


class StorageError(PerdureError, OSError):
    """A file or folder that cannot be written or read."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class CheckpointError(StorageError):
    """A checkpoint that is damaged, foreign, or newer than this version."""


class MissingExtraError(PerdureError, ImportError):
    """An optional dependency that is not installed."""


class PerdureWarning(UserWarning):
    """Something that will run but probably does not do what was meant."""
