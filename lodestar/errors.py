"""Mistakes of a user, each told in one line: where, what, what to do."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType


class LodestarError(Exception):
    """A mistake that the person at the keyboard can mend; printed as `error: ...`, exit code 2."""

    exit_code = 2

    def __init__(self, message: str, *, print_on_this_rank: bool | None = None) -> None:
        super().__init__(message)
        self.print_on_this_rank = print_on_this_rank
        """Whether this process prints it; none: rank 0 does."""


class ConfigError(LodestarError):
    """A recipe, or an override of it, says something that cannot be done."""


class LaunchError(LodestarError):
    """The launcher's environment is incomplete or contradicts itself."""


class DataError(LodestarError):
    """A file of texts is missing, or a row in it is not what its format says."""


class ModelError(LodestarError):
    """A model folder lacks tensors, or holds others than its configuration names."""


class CheckpointError(LodestarError):
    """A checkpoint is damaged, or belongs to another run."""


class TrainingError(LodestarError):
    """Training cannot go on, as when the loss is no longer a number."""


class PeerLostError(LodestarError):
    """Other ranks are gone; told once on each host that is left."""

    exit_code = 4


def first_line(error: BaseException) -> str:
    """Of what a library says, for a message of ours; the error's class where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def require(module: str, *, field: str, extra: str) -> ModuleType:
    """The imported module, an optional library or one of ours that imports one; ConfigError if that is not installed.

    field   what of the recipe or the command needs it
    extra   of pyproject.toml, that installs it
    """
    try:
        return import_module(module)
    except ImportError as error:
        absent = isinstance(error, ModuleNotFoundError)
        problem = f"{error.name} is not installed" if absent else f"{module} cannot be imported: {first_line(error)}"
        raise ConfigError(f"{field}: {problem} (pip install 'lodestar-embeddings[{extra}]')") from None
