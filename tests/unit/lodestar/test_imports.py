"""Imports without garbage collection."""

from __future__ import annotations

import gc

import pytest

from lodestar.imports import quick_imports


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
