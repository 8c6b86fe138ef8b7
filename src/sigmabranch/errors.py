"""The errors a user can meet: one line each, saying what was wrong, where, and what to do.

The command line prints the message and exits with :attr:`SigmaBranchError.exit_code`.
"""

from __future__ import annotations


class SigmaBranchError(Exception):
    """Base of every error that is the input's fault, not the program's."""

    exit_code = 2


class ConfigError(SigmaBranchError):
    """An unknown name, key or value in a task, tree, recipe or command."""


class DataError(SigmaBranchError):
    """A data set that is missing, damaged, or does not fit the network."""


class CheckpointError(SigmaBranchError):
    """A checkpoint or saved network that is missing, damaged, or belongs to something else."""


class StorageError(SigmaBranchError):
    """A file of weights that cannot be read, or has changed, while it is in use."""


class UnsupportedOperation(SigmaBranchError):
    """The model runs an operation through which channels cannot be followed."""


class ConversionError(SigmaBranchError):
    """A cut that is impossible, or that fails its check against the masked dense network."""


class NumericError(SigmaBranchError):
    """A NaN or infinity in a latent, a statistic or a loss."""


class MemoryExhausted(SigmaBranchError):
    """A training step that needs more memory than the device has."""


class ProcessLost(SigmaBranchError):
    """Another process of the run has ended or gone silent; the last checkpoint is whole."""

    exit_code = 3


class MissingDependency(SigmaBranchError):
    """An optional package that this step needs is not installed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package {package}: pip install 'sigma-branch[{extra}]'"
        )
