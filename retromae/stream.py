"""Training on a stream: texts come in the order of the source and are shuffled within windows of whole batches.

A batch is a function of (seed, step) and of the source: a run that resumes at step k skips to the window of k.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Iterator
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from lodestar import rng
from lodestar.data.micro_batches import Indices
from lodestar.data.readers import Row
from lodestar.errors import DataError
from retromae.collate import Collate, EncodedText, StepBatch
from retromae.tokenization import Tokenize

WINDOW = 64
"""Batches whose texts are shuffled together."""


class StreamWindow:
    """The texts of the current window, by their row in the stream."""

    def __init__(
        self,
        read: Callable[[], Iterator[tuple[str, Row]]],
        check: Callable[[str, Row], Row | None],
        tokenize: Tokenize,
        global_size: int,
        seed: int,
        counts: Counter[str] | None = None,
    ) -> None:
        """counts   gets what was read so far, until the source ends for the first time"""
        self._read, self._check, self._tokenize = read, check, tokenize
        self.counts = Counter[str]() if counts is None else counts
        self._size, self._seed = WINDOW * global_size, seed
        self._texts: list[EncodedText] = []

    def __call__(self, epochs: Tensor, rows: Tensor) -> list[EncodedText]:
        return [self._texts[row % self._size] for row in rows.tolist()]

    def lengths(self, epochs: Tensor, rows: Tensor) -> Indices:
        """(G,) tokens of each text."""
        return np.array([len(text.input_ids) for text in self(epochs, rows)])

    def batches(self, collate: Collate, start: int, total: int) -> Generator[StepBatch]:
        """The batches from step `start` on; the source restarts where it ends."""
        texts = islice(self._endless_texts(), (start // WINDOW) * self._size, None)
        for window in range(start // WINDOW, -(-total // WINDOW)):
            window_texts = list(islice(texts, self._size))
            order = rng.permutation(self._size, self._seed, "window", window)
            self._texts = [window_texts[i] for i in order.tolist()]
            for step in range(max(start, window * WINDOW), min(total, (window + 1) * WINDOW)):
                yield collate(step)

    def _endless_texts(self) -> Iterator[EncodedText]:
        """The source's texts, again and again; raises DataError where it has none."""
        counts = self.counts
        while True:
            empty, source = True, self._read()
            while block := list(islice(source, 1000)):
                texts = [row["text"] for row in (self._check(where, row) for where, row in block) if row is not None]
                columns = self._tokenize({"text": texts})
                counts["rows"] += len(columns["tokens"])
                counts["dropped"] += len(block) - columns["part"].count(0)
                counts["without_tokens"] += sum(columns["without_tokens"]) + len(texts) - columns["part"].count(0)
                counts["tokens"] += sum(columns["tokens"])
                counts["truncated"] += sum(columns["truncated"])
                for ids, words in zip(columns["input_ids"], columns["words"], strict=True):
                    empty = False
                    yield EncodedText(ids, words)
            if empty:
                raise DataError("data.train: the stream holds no text (name files with texts)")
            counts = Counter[str]()  # each row counts once


class SequentialSampler:
    """Rows in their order: the texts of a window are shuffled already."""

    def __init__(self, global_size: int) -> None:
        self.global_size = global_size

    def batch(self, index: int, positions: range) -> tuple[Tensor, Tensor]:
        rows = torch.arange(positions.start, positions.stop) + index * self.global_size
        return torch.zeros_like(rows), rows
