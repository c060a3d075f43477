"""What was once computed from the bytes of files, remembered by their path, size and time of last change.

Loads without torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from lodestar.files import read_object, write_json

RECORD = "files.json"
_FORMAT, _MAX_FILES = 1, 100_000
_SETTLED_NS = 2 * 10**9
"""A file that changed less than two seconds ago can change again without a new time: file systems count coarsely."""

Value = TypeVar("Value", str, int)


@dataclass(frozen=True)
class FileState:
    """How a file was when one looked; equal for a file that did not change since."""

    size_bytes: int
    mtime_ns: int
    seen_ns: int = field(compare=False)

    @classmethod
    def of(cls, path: str | Path) -> FileState:
        """Of a file that cannot be looked at: one that no record holds."""
        seen_ns = time.time_ns()
        try:
            status = os.stat(path)
        except OSError:
            return cls(-1, 0, 0)
        return cls(status.st_size, status.st_mtime_ns, seen_ns)

    @property
    def is_settled(self) -> bool:
        """Whether a later change gives the file another size or time."""
        return self.mtime_ns < self.seen_ns - _SETTLED_NS


class FileRecord:
    """Values by file, in one file of a folder: empty where that is missing or damaged, forgotten where it is read-only.

    with FileRecord(folder) as record:                                  # written at the end
        digest = record.value(path, "sha256", lambda: sha256(path))     # computed once until the file changes
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / RECORD
        self._files, self._new = read_values(self._path), dict[str, dict[str, Any]]()

    def get(self, path: str | Path, name: str) -> Any:
        """The value, where it is known of the file as it is now; otherwise none."""
        return self._values(path, FileState.of(path)).get(name)

    def value(self, path: str | Path, name: str, compute: Callable[[], Value]) -> Value:
        """The value, computed where it is not known of the file as it is now."""
        state = FileState.of(path)
        known = self._values(path, state).get(name)
        if known is not None:
            return known
        value = compute()
        self.remember(path, state, name, value)
        return value

    def remember(self, path: str | Path, state: FileState, name: str, value: str | int) -> None:
        """Keep a value that was computed since the file was in `state`, unless it may have changed meanwhile."""
        if state.is_settled and FileState.of(path) == state:
            values = self._values(path, state) or {"bytes": state.size_bytes, "mtime_ns": state.mtime_ns}
            self._new[os.path.realpath(path)] = {**values, name: value}

    def _values(self, path: str | Path, state: FileState) -> dict[str, Any]:
        """What is known of the file in this state."""
        key = os.path.realpath(path)
        values = self._new.get(key) or self._files.get(key, {})
        is_same = (values.get("bytes"), values.get("mtime_ns")) == (state.size_bytes, state.mtime_ns)
        return values if is_same else {}

    def __enter__(self) -> FileRecord:
        return self

    def __exit__(self, *error: object) -> None:
        """Add what is new to what other processes wrote meanwhile."""
        if not self._new:
            return
        others = {path: values for path, values in read_values(self._path).items() if path not in self._new}
        write_values(self._path, dict([*others.items(), *self._new.items()][-_MAX_FILES:]))


def read_values(path: Path) -> dict[str, Any]:
    """What `write_values` wrote; empty where the file is missing, or not as it was written."""
    try:
        content = read_object(path)
        values = content["values"]
        return values if content["format"] == _FORMAT and content["sha256"] == _hash_of(values) else {}
    except (ValueError, KeyError, RecursionError):
        return {}


def write_values(path: Path, values: dict[str, Any]) -> None:
    """Write JSON values atomically, with their hash. What can be computed again is not worth an error: a full or
    read-only disk is none, nor is a name that is no text.
    """
    with suppress(OSError, UnicodeError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"format": _FORMAT, "values": values, "sha256": _hash_of(values)})


def _hash_of(values: Any) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()
