"""The order of tests, and garbage collection around them."""

from __future__ import annotations

import gc

import pytest

FIRST = ("tests/slurm/test_slurm.py", "tests/faults/test_soak.py", "tests/e2e/test_launchers.py")
"""Files that take longest: started last, one worker would end alone with them."""

gc.disable()  # until all is imported, which then stays uncollected: each collection would go through it


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """As collected, but for the files that take longest."""
    items.sort(key=lambda item: not item.nodeid.startswith(FIRST))


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()
