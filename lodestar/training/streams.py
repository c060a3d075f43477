"""Training data that is read during training: the streams of a run, on all its ranks."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import datasets

from lodestar.config.schema import TrainingDataConfig, TrainingRecipe
from lodestar.data.file_record import FileRecord
from lodestar.data.loader import StepBatch, step_batches
from lodestar.data.parallel_tokenize import Tokenize
from lodestar.data.readers import Row, Source
from lodestar.data.stream_windows import Windows, WindowStart, WindowStarts, window_batches
from lodestar.data.stream_writer import WindowWriter, stream_folder, written_ahead
from lodestar.distributed.collectives import on_main
from lodestar.distributed.runtime import Runtime


class Streams:
    """A stream for each list of sources. The first rank of each node writes their windows, all its ranks read them."""

    def __init__(
        self,
        recipe: TrainingRecipe,
        data: TrainingDataConfig,
        runtime: Runtime,
        sources: Sequence[Sequence[Source]],
        *,
        check: Callable[[str, Row], Row | None],
        tokenize: Tokenize,
        features: datasets.Features,
        settings: Mapping[str, Any],
    ) -> None:
        """settings   everything besides the rows that determines their examples; JSON values"""
        self._data, self._runtime, self._total = data, runtime, recipe.schedule.steps or 0
        self._sources, self._batches = sources, window_batches(recipe.batch.global_size)
        size = recipe.batch.global_size
        self.sizes = [[source.size_bytes for source in of_stream] for of_stream in sources]
        self.samples: list[list[str | None]] = on_main(lambda: _samples(data, sources))
        """Hashes of parts of each file: hashing all of it would take as long as reading it."""
        self.counts = Counter[str]()
        """Of the rows that were read, by the names of DatasetStats."""
        self._counts: dict[int, Mapping[str, int]] = {}
        names = [f"stream-{i}.json" for i in range(len(sources))] if len(sources) > 1 else ["stream.json"]
        self._starts = [
            WindowStarts(Path(recipe.run.output_dir) / name, _key([sample, size, dict(settings)]))
            for name, sample in zip(names, self.samples, strict=True)
        ]
        known, run = on_main(lambda: ([starts.read() for starts in self._starts], uuid4().hex[:12]))
        folder = stream_folder(data.cache_dir, run)
        self.windows = [Windows(folder / str(i)) for i in range(len(sources))]
        self._writers = [
            WindowWriter(
                windows,
                of_stream,
                check,
                tokenize,
                features,
                data.processes,
                self._batches,
                size,
                starts=of_starts,
                add_start=starts.add if runtime.is_main else lambda number, start: None,
            )
            for windows, of_stream, starts, of_starts in zip(self.windows, sources, self._starts, known, strict=True)
        ]

    def batches(
        self, collate: Callable[[int], StepBatch], start: int, batch_at: Callable[[int], tuple[int, int]]
    ) -> Generator[StepBatch]:
        """`collate(step)` for each step from `start` on; `batch_at` says step -> (stream, batch of that stream)."""
        is_gpu = self._runtime.device.type == "cuda"
        return written_ahead(
            lambda: step_batches(collate, start=start, total=self._total, workers=self._data.workers, pin=is_gpu),
            self._writers if self._runtime.local_rank == 0 else [],
            start,
            self._total,
            batch_at,
            self._count,
        )

    def examples_at(self, stream: int, batch: int) -> list[str]:
        """Where the window of a batch begins, by FILE:LINE: all of its examples are shuffled."""
        window = batch // self._batches
        start = self._starts[stream].read().get(window, WindowStart() if window == 0 else None)
        if start is None:
            return []
        path, line = self._sources[stream][start.cursor.source].path, start.cursor.line + 1
        return [f"those of {self._batches} batches from {path}:{line} on"]

    def _count(self, stream: int, window: int) -> None:
        """Note what was counted up to the end of a window."""
        if self._runtime.is_main and (start := self._starts[stream].read().get(window + 1)):
            self._counts[stream] = start.counts
            self.counts.clear()
            for counts in self._counts.values():
                self.counts.update(counts)


def _samples(data: TrainingDataConfig, sources: Sequence[Sequence[Source]]) -> list[list[str | None]]:
    with FileRecord(Path(data.cache_dir)) as record:
        return [[source.known_sample(record) for source in of_stream] for of_stream in sources]


def _key(values: Any) -> str:
    return hashlib.blake2b(json.dumps(values, sort_keys=True).encode(), digest_size=12).hexdigest()
