"""The order of tests, and garbage collection around them."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

FIRST = ("tests/slurm/test_slurm.py", "tests/faults/test_soak.py", "tests/e2e/test_launchers.py")
"""Files that take longest: started last, one worker would end alone with them."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """As collected, but for the files that take longest."""
    items.sort(key=lambda item: not item.nodeid.startswith(FIRST))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Without garbage collection, which afterwards leaves out what was imported: each would go through it."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()
