"""Errors that a user can fix, each printed as one line: where, what is wrong, what to do."""

from __future__ import annotations

import json
import re
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from difflib import get_close_matches
from importlib import import_module
from itertools import islice
from types import ModuleType

from lodestar.secrets import hidden

_CONTROL = re.compile("\n(?!error: )|[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029]")
"""What would break a line or steer a terminal; a message may hold several lines, each with its `error: `."""
_AT_LINE = re.compile(r"[^\n]*?:\d+: ")
"""FILE:LINE at the beginning of a message."""


class LodestarError(Exception):
    """An error that the user can fix; printed as `error: ...`, exit code 2."""

    exit_code = 2

    def __init__(self, message: str, *, print_on_this_rank: bool | None = None) -> None:
        super().__init__(_CONTROL.sub(" ", hidden(message)))
        self.print_on_this_rank = print_on_this_rank
        """Whether this process prints it; none: only rank 0 does."""


class ConfigError(LodestarError):
    """A recipe, or an override of it, is not valid."""


class LaunchError(LodestarError):
    """The launcher's environment is incomplete or contradicts itself."""


class DataError(LodestarError):
    """A data file is missing, or a row does not match its format."""


class ModelError(LodestarError):
    """A model folder lacks tensors or files, or does not fit its configuration."""


class CheckpointError(LodestarError):
    """A checkpoint is damaged, or belongs to another run."""


class TrainingError(LodestarError):
    """Training cannot continue, as when the gradient stays NaN."""


class PeerLostError(LodestarError):
    """Other ranks are lost; printed once on each remaining host."""

    exit_code = 4


@contextmanager
def naming(field: str) -> Generator[None]:
    """Errors raised inside begin with this key of the recipe, but for those that name a line of a file."""
    try:
        yield
    except LodestarError as error:
        if str(error).startswith(field) or _AT_LINE.match(str(error)):
            raise
        raise type(error)(f"{field}: {error}", print_on_this_rank=error.print_on_this_rank) from None


def did_you_mean(name: str, known: Iterable[str], otherwise: str) -> str:
    """For the end of a message: the known name that resembles `name`, or what to do where none does."""
    return otherwise if (close := closest(name, known)) is None else f"did you mean '{close}'?"


def closest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known name that resembles `name` most; none where none does.

    cutoff   how much it must, from 0 to 1, as in difflib
    """
    return next(iter(get_close_matches(name, list(known), n=1, cutoff=cutoff)), None)


def shown(value: object) -> str:
    """A value in one short line, for a message; secrets are hidden before it is cut."""
    try:
        text = hidden(json.dumps(value, ensure_ascii=True, default=str)[:2000])
    except (ValueError, RecursionError):
        text = type(value).__name__
    return text if len(text) <= 40 else f"{text[:37]}..."


def names(values: Iterable[str]) -> str:
    """Names from a file in one short line, for a message."""
    first = [value if value.isprintable() and len(value) <= 40 else shown(value) for value in islice(values, 13)]
    return ", ".join([*first[:12], *(["..."] if first[12:] else [])]) or "none"


def first_line(error: BaseException) -> str:
    """The first line of a library's message, to quote it in ours; the error's class where it has none."""
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
