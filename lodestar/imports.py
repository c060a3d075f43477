"""Imports of torch and of what is built on it, and garbage collection beside them. Loads no library."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quick_imports() -> Iterator[None]:
    """Garbage collection is off inside: it takes a fifth of the time of such imports, and frees nothing."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.unfreeze()  # into the oldest generation: the next young collection would go through all that was imported
        if was_enabled:
            gc.enable()


@contextmanager
def imported_uncollected() -> Iterator[None]:
    """Garbage collection inside leaves out what exists now: it would go through all that was imported, half a second.

    Loader workers, which are forks, copy fewer pages then. A `quick_imports` inside ends it early.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
