"""Imports without garbage collection."""

from __future__ import annotations

import gc

import pytest

from lodestar.imports import imported_uncollected, quick_imports


def test_garbage_collection_is_off_inside_and_then_as_before() -> None:
    with quick_imports():
        assert not gc.isenabled()
        with quick_imports():
            pass
        assert not gc.isenabled()  # what was so before stays
    assert gc.isenabled()
    with pytest.raises(ImportError), quick_imports():
        raise ImportError
    assert gc.isenabled()


def test_the_next_collections_leave_out_what_was_imported() -> None:
    with quick_imports():
        imported = [[] for _ in range(10_000)]
    assert any(each is imported for each in gc.get_objects(generation=2))
    with imported_uncollected():
        assert gc.get_freeze_count() >= len(imported)
    assert gc.get_freeze_count() == 0  # garbage among them is found again
