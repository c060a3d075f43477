"""The rows of an endless stream in chunks, from any place on; what is before that place is not read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import NamedTuple

from lodestar.data.lines import Place
from lodestar.data.readers import Row, Source, stream_rows
from lodestar.errors import DataError

CHUNK_ROWS = 1000


class Cursor(NamedTuple):
    """Before an example of the stream."""

    epoch: int = 0
    """How often all sources were read before."""
    source: int = 0
    line: int = 0
    offset: int = 0
    """With the line: where the chunk of rows with that example begins in the source, as in Place."""
    examples: int = 0
    """Examples of that chunk before it."""


class Chunk(NamedTuple):
    """Some rows that the check kept."""

    start: Cursor
    rows: list[Row]
    dropped: int
    """Rows among them that the check dropped."""


def read_chunks(sources: Sequence[Source], check: Callable[[str, Row], Row | None], start: Cursor) -> Iterator[Chunk]:
    """The chunks from the one on that begins at `start`, without end; one ends where the sources do.

    Raises DataError, also where no row is kept.
    """
    rows, dropped, cursor = list[Row](), 0, start._replace(examples=0)
    first, place, is_empty = start.source, Place(start.line, start.offset), cursor[1:] == Cursor()[1:]
    for epoch in count(start.epoch):
        for number in range(first, len(sources)):
            for after, where, row in stream_rows(sources[number], place):
                if (checked := check(where, row)) is None:
                    dropped += 1
                    continue
                rows.append(checked)
                if len(rows) == CHUNK_ROWS:
                    yield Chunk(cursor, rows, dropped)
                    rows, dropped, cursor, is_empty = [], 0, Cursor(epoch, number, *after), False
            place = Place()
        if rows:
            yield Chunk(cursor, rows, dropped)
        elif is_empty:
            raise no_text()
        rows, dropped, cursor, first, is_empty = [], 0, Cursor(epoch + 1), 0, True


def no_text() -> DataError:
    return DataError("data.train: the stream holds no text (name files with texts)")
