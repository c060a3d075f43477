"""What is in the files of training data: every mistake with its line, and statistics. Loads without torch."""

from __future__ import annotations

import multiprocessing
import os
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from lodestar.data.findings import Findings
from lodestar.data.readers import Row, Source, read_rows
from lodestar.data.training_examples import content_hash
from lodestar.errors import DataError

MAX_ERRORS = 20
"""Of one file that are listed; the others are counted."""
SMALL_BYTES = 16 << 20
"""Fewer bytes are read before other processes have started."""
_BATCH = 1000  # rows

Texts = Callable[[str, Row, Findings], Mapping[str, Sequence[tuple[str, str]]] | None]
"""(FILE:LINE, row, findings) -> for each role the (instruction, text) pairs of a row; none where it is dropped."""


@dataclass
class Inspection:
    """What one file holds, or several together."""

    errors: list[str] = field(default_factory=list[str])
    num_errors: int = 0
    findings: Findings = field(default_factory=Findings)
    rows: int = 0
    dropped: int = 0
    lengths: dict[str, np.ndarray] = field(default_factory=dict[str, np.ndarray])
    """By role, for each text: tokens, special ones included; characters where there is no tokenizer."""
    hashes: dict[str, np.ndarray] = field(default_factory=dict[str, np.ndarray])
    """By role, for each text: its content hash."""

    def add_error(self, error: DataError) -> None:
        self.num_errors += 1
        if len(self.errors) < MAX_ERRORS:
            self.errors.append(str(error))
            self.errors.sort(key=_line_of)  # rows are checked some at a time, after their lines

    def add(self, other: Inspection) -> None:
        self.errors += other.errors
        self.num_errors += other.num_errors
        self.findings.merge(other.findings.by_problem)
        self.rows, self.dropped = self.rows + other.rows, self.dropped + other.dropped
        for mine, others in ((self.lengths, other.lengths), (self.hashes, other.hashes)):
            for role, values in others.items():
                mine[role] = np.concatenate([mine[role], values]) if role in mine else values


def inspect(sources: Sequence[Source], texts: Texts, tokenizer: Path | None, processes: int) -> Inspection:
    """Read all files whole, several at a time; the result does not depend on `processes`.

    tokenizer   a tokenizer.json; none: lengths are in characters
    """
    inspect_one = partial(_inspect_file, texts=texts, tokenizer=tokenizer)
    total = Inspection()
    processes = min(processes, len(sources))
    sizes_bytes = [SMALL_BYTES if source.size_bytes is None else source.size_bytes for source in sources]
    if processes > 1 and sum(sizes_bytes) >= SMALL_BYTES:
        with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
            for one in pool.map(inspect_one, sources):
                total.add(one)
    else:
        for source in sources:
            total.add(inspect_one(source))
    return total


def _inspect_file(source: Source, texts: Texts, tokenizer: Path | None) -> Inspection:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    backend = Tokenizer.from_file(str(tokenizer)) if tokenizer else None
    if backend is not None:
        backend.no_truncation()
        backend.no_padding()
    result, lengths, hashes = Inspection(), dict[str, list[int]](), dict[str, list[int]]()
    try:
        rows = read_rows(source, result.add_error)
        while block := list(islice(rows, _BATCH)):
            by_role: dict[str, list[tuple[str, str]]] = {}
            for where, row in block:
                result.rows += 1
                try:
                    row_texts = texts(where, row, result.findings)
                except DataError as error:
                    result.add_error(error)
                    continue
                result.dropped += row_texts is None
                for role, pairs in (row_texts or {}).items():
                    by_role.setdefault(role, []).extend(pairs)
            for role, pairs in by_role.items():
                lengths.setdefault(role, []).extend(_lengths([a + b for a, b in pairs], backend))
                hashes.setdefault(role, []).extend(content_hash(text) for _, text in pairs)
    except DataError as error:  # the file cannot be read further
        result.add_error(error)
    if not result.rows and not result.num_errors:
        result.findings.add_empty(source)
    result.lengths = {role: np.array(values, dtype=np.int32) for role, values in lengths.items()}
    result.hashes = {role: np.array(values, dtype=np.int64) for role, values in hashes.items()}
    return result


def _line_of(error: str) -> int:
    """Of FILE:LINE at the start of a message."""
    number = re.search(r":(\d+): ", error)
    return int(number[1]) if number else 0


def _lengths(texts: Sequence[str], tokenizer: Tokenizer | None) -> list[int]:
    return list(map(len, tokenizer.encode_batch(texts) if tokenizer else texts))
