"""Training on a stream: rows arrive in the order of the source and are shuffled within windows of whole batches.

What a step holds is still a function of (seed, step) and of the source: going on from step k skips to the window of k.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from lodestar import rng
from lodestar.errors import DataError
from retromae.collate import Collate, StepBatch
from retromae.tokenization import Tokenize

WINDOW = 64
"""Batches that are shuffled among themselves."""


class FromStream:
    """Rows of the current window, by their number in the stream."""

    def __init__(
        self,
        source: Callable[[], Iterator[tuple[str, Mapping[str, Any]]]],
        check: Callable[[str, Mapping[str, Any]], Any],
        tokenize: Tokenize,
        global_size: int,
        seed: int,
    ) -> None:
        self._source, self._check, self._tokenise = source, check, tokenize
        self._size, self._seed = WINDOW * global_size, seed
        self._rows: list[Mapping[str, Any]] = []
        self._window = -1

    def __call__(self, epochs: Tensor, numbers: Tensor) -> list[Mapping[str, Any]]:
        return [self._rows[number % self._size] for number in numbers.tolist()]

    def batches(self, collate: Collate, start: int, total: int) -> Generator[StepBatch]:
        """The batches from step `start` on; the source begins anew where it ends."""
        rows = islice(self._endless(), (start // WINDOW) * self._size, None)
        for window in range(start // WINDOW, -(-total // WINDOW)):
            arrived = list(islice(rows, self._size))
            order = rng.permutation(self._size, self._seed, "window", window)
            self._rows = [arrived[i] for i in order.tolist()]
            for step in range(max(start, window * WINDOW), min(total, (window + 1) * WINDOW)):
                yield collate(step)

    def _endless(self) -> Iterator[Mapping[str, Any]]:
        while True:
            found, source = False, self._source()
            while batch := list(islice(source, 1000)):
                kept = [self._check(where, row) for where, row in batch]
                columns = self._tokenise({"text": [row["text"] for row in kept if row is not None]})
                for ids, words in zip(columns["input_ids"], columns["words"], strict=True):
                    found = True
                    yield {"input_ids": ids, "words": words}
            if not found:
                raise DataError("data.train: the stream holds no text (name files with texts)")


class InOrder:
    """An order that changes nothing: a stream's rows come shuffled already."""

    def __init__(self, global_size: int) -> None:
        self.global_size = global_size

    def batch(self, number: int, part: range) -> tuple[Tensor, Tensor]:
        positions = torch.arange(part.start, part.stop) + number * self.global_size
        return torch.zeros_like(positions), positions
