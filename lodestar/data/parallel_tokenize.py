"""Rows, tokenized by several processes, in their order."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import datasets
import pyarrow as pa

from lodestar.data.loader import STOP_SIGNALS, begin_worker
from lodestar.data.readers import Row
from lodestar.errors import DataError

Columns = Mapping[str, list[Any]]
Tokenize = Callable[[Columns], Columns]

_COUNTS = ("tokens", "truncated", "without_tokens")


@dataclass(frozen=True)
class _Encode:
    """Rows -> a table of tokenized rows, and its counts."""

    tokenize: Tokenize
    schema: pa.Schema

    def __call__(self, rows: Sequence[Row]) -> tuple[pa.Table, Counter[str]]:
        columns = self.tokenize({name: [row[name] for row in rows] for name in rows[0]})
        table = pa.Table.from_pydict(dict(columns), self.schema)
        names = table.column_names
        counts = Counter[str](rows=len(rows), examples=len(table))
        counts["texts"] = int((table["part"].to_numpy() == 0).sum()) if "part" in names else len(table)
        counts.update({name: int(table[name].to_numpy().sum()) for name in _COUNTS if name in names})
        return table, counts


def encoded(
    chunks: Iterator[Sequence[Row]], tokenize: Tokenize, features: datasets.Features, processes: int
) -> Generator[tuple[pa.Table, Counter[str]]]:
    """(table of the tokenized rows, counts) of each chunk, in their order; by this process alone where they are few.

    The counts are the numbers of `rows`, of `texts` that have a token and of `examples`, the rows of the table, and the
    sums of its columns `tokens`, `truncated` and `without_tokens`.
    """
    encode = _Encode(tokenize, features.arrow_schema)
    first = list(islice(chunks, 2))
    if processes == 1 or len(first) < 2:
        yield from map(encode, chain(first, chunks))
        return
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    executor = ProcessPoolExecutor(processes, context, initializer=_begin, initargs=(encode,))
    pending = deque[Future[tuple[pa.Table, Counter[str]]]]()
    try:
        for chunk in chain(first, chunks):
            with inherited_by_processes():  # they start at the first chunk
                pending.append(executor.submit(_encode_chunk, chunk))
            if len(pending) >= 4 * processes:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool:
        raise DataError(
            "data.processes: a process that tokenized was killed (if the host ran out of memory, lower data.processes)"
        ) from None
    finally:
        executor.shutdown(cancel_futures=True)


@contextmanager
def inherited_by_processes() -> Iterator[None]:
    """The stop signals are blocked, and tokenizers starts no threads: its own do not survive a fork."""
    previous_mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    name = "TOKENIZERS_PARALLELISM"
    previous = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        del os.environ[name]
        os.environ.update({} if previous is None else {name: previous})
        signal.pthread_sigmask(signal.SIG_SETMASK, previous_mask)


_encode: _Encode | None = None
"""Of a process that tokenizes."""


def _begin(encode: _Encode) -> None:
    global _encode
    begin_worker()
    _encode = encode


def _encode_chunk(rows: Sequence[Row]) -> tuple[pa.Table, Counter[str]]:
    assert _encode is not None
    return _encode(rows)
