"""Rows of a corpus as a database stores them."""

from __future__ import annotations

import pytest

from lodestar.errors import DataError
from retrieval.search.corpus import as_row


def test_rows_of_any_spelling_become_text() -> None:
    row = {"_id": 7, "text": "x", "title": None, "tmp": False, "metadata": {"tags": ["a", "é"], "year": 2026}}
    expected = {"id": "7", "title": "", "text": "x", "tmp": "false", "tags": '["a", "é"]', "year": "2026"}
    assert as_row("f:1", row) == expected
    assert as_row("f:1", {"id": "7", "text": "x"}) == {"id": "7", "title": "", "text": "x"}


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"text": "x"}, "f:3: id: must be text or a whole number"),
        ({"_id": None, "text": "x"}, "f:3: _id: must be"),
        ({"id": "1", "text": 5}, "f:3: text: must be text"),
        ({"id": "1", "text": "x", "a.b": 1}, "f:3: a.b: not a name for metadata"),
        ({"id": "1", "text": "x", "vector": [1]}, "f:3: vector: not a name for metadata"),
    ],
)
def test_a_row_that_cannot_be_stored_is_named(row: dict[str, object], complaint: str) -> None:
    with pytest.raises(DataError, match=complaint):
        as_row("f:3", row)
