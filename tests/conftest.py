"""The order of tests."""

from __future__ import annotations

import pytest

FIRST = ("tests/slurm/test_slurm.py", "tests/faults/test_soak.py", "tests/e2e/test_launchers.py")
"""Files that take longest: started last, one worker would end alone with them."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """As collected, but for the files that take longest."""
    items.sort(key=lambda item: not item.nodeid.startswith(FIRST))
