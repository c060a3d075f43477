"""The process that reads a stream, tokenizes it, and writes its windows ahead of training."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import shutil
import socket
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, TypeVar

import datasets
import pyarrow as pa

from lodestar.data.loader import begin_worker
from lodestar.data.parallel_tokenize import Tokenize, encoded, inherited_by_processes
from lodestar.data.readers import Row, Source
from lodestar.data.row_stream import Chunk, no_text, read_chunks
from lodestar.data.stream_windows import FAILED, STARTED, Windows, WindowStart
from lodestar.data.tokenized_shards import ShardWriter
from lodestar.errors import LodestarError, first_line
from lodestar.files import make_folder, write_text

_FIELD = "data.cache_dir"
StepBatch = TypeVar("StepBatch")


@dataclass(frozen=True)
class WindowWriter:
    """Reads a stream and writes its windows."""

    windows: Windows
    sources: Sequence[Source]
    check: Callable[[str, Row], Row | None]
    tokenize: Tokenize
    features: datasets.Features
    processes: int
    batches: int
    """Of a window."""
    global_size: int
    starts: Mapping[int, WindowStart]
    """Where some windows begin."""
    add_start: Callable[[int, WindowStart], None]
    """Remembers where a window begins, and what was counted before."""

    def write(self, first: int, may_write: Callable[[int], bool]) -> None:
        """Write the windows from `first` on, each when it may be written; without end."""
        number = max((known for known in self.starts if known <= first), default=0)
        pieces = self._pieces(self.starts.get(number, WindowStart()))
        for skipped in range(number, first):
            next_start = next(start for _, start in pieces if start is not None)
            self.add_start(skipped + 1, next_start)
        while True:
            while not may_write(first):
                time.sleep(0.02)
            path = self.windows.path(first)
            tmp = path.with_suffix(".tmp")
            with ShardWriter(tmp, self.features) as writer:
                for table, next_start in pieces:
                    writer.write(table)
                    if next_start is not None:
                        self.add_start(first + 1, next_start)
                        break
            tmp.rename(path)
            first += 1

    def _pieces(self, start: WindowStart) -> Iterator[tuple[pa.Table, WindowStart | None]]:
        """Examples from `start` on, and with the last ones of a window where the next one begins."""
        read = deque[Chunk]()

        def rows() -> Iterator[list[Row]]:
            for chunk in read_chunks(self.sources, self.check, start.cursor):
                read.append(chunk)
                yield chunk.rows

        counts, size, num_examples = Counter(start.counts), self.batches * self.global_size, 0
        position, last_epoch = start.cursor.examples, start.cursor.epoch
        with closing(encoded(rows(), self.tokenize, self.features, self.processes)) as tables:
            for table, of_chunk in tables:
                chunk = read.popleft()
                if chunk.start.epoch > last_epoch + 1:
                    raise no_text()
                last_epoch = chunk.start.epoch if len(table) else last_epoch
                if chunk.start.epoch == 0 and not position:  # each row counts once
                    counts.update(_counts(of_chunk, chunk.dropped))
                while position < len(table):
                    piece = table.slice(position, size - num_examples)
                    position, num_examples = position + len(piece), (num_examples + len(piece)) % size
                    next_start = WindowStart(chunk.start._replace(examples=position), dict(counts))
                    yield piece, next_start if num_examples == 0 else None
                position = 0


def _counts(of_chunk: Counter[str], dropped: int) -> dict[str, int]:
    without = of_chunk["rows"] - of_chunk["texts"]
    return {
        "rows": of_chunk["examples"],
        "tokens": of_chunk["tokens"],
        "truncated": of_chunk["truncated"],
        "dropped": dropped + without,
        "without_tokens": of_chunk["without_tokens"] + without,
    }


# --- the process -----------------------------------------------------------------------------


def stream_folder(cache_dir: str, run: str) -> Path:
    """For the windows of a run on this node. `run` is the same on all ranks, and differs from that of other runs."""
    host = socket.gethostname().replace("-", "_")
    return Path(cache_dir) / f".stream-{run}-{host}.tmp"


@contextmanager
def writing(writer: WindowWriter, first_batch: int) -> Iterator[Any]:
    """A process writes windows from that of the first batch on; yields a shared number to set to the batch in training.

    At the end the process is gone, and its folder.
    """
    folder = writer.windows.folder
    _delete_abandoned(folder.parent)
    make_folder(folder, _FIELD)
    (folder / STARTED).write_text(str(os.getpid()))
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    batch = context.Value("q", first_batch)
    process = context.Process(target=_write, args=(writer, batch))
    with inherited_by_processes():
        process.start()
    atexit.register(process.kill)  # or Python would wait for it
    teller = threading.Thread(target=_tell_end, args=(process, folder), daemon=True)
    teller.start()
    try:
        yield batch
    finally:
        atexit.unregister(process.kill)
        process.kill()
        process.join()
        teller.join()  # or it could tell of this end in a folder of the same name
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):  # another stream of this run has its own folder there
            folder.parent.rmdir()


def _tell_end(process: Any, folder: Path) -> None:
    """All loaders of this node wait for windows: tell them of the end of the process that writes them."""
    wait([process.sentinel])
    _fail(
        folder,
        "data.streaming: the process that reads the stream was killed (if the host ran out of memory, lower "
        "data.processes; the same command resumes the run)",
    )


def _fail(folder: Path, message: str) -> None:
    """The first message counts."""
    with suppress(OSError):  # the folder is gone, as at the end of a run
        if not (folder / FAILED).exists():
            write_text(folder / FAILED, message)


def _write(writer: WindowWriter, batch: Any) -> None:
    """In the process of its own: until that is ended."""
    begin_worker()
    windows, deleted = writer.windows, batch.value // writer.batches

    def may_write(number: int) -> bool:
        """The window in training and the next may be there; another rank may still be in the one before."""
        nonlocal deleted
        current = batch.value // writer.batches
        for old in range(deleted, current - 1):
            shutil.rmtree(windows.path(old), ignore_errors=True)
            deleted = old + 1
        return number <= current + 1

    try:
        writer.write(deleted, may_write)
    except LodestarError as error:
        _fail(windows.folder, str(error))
    except OSError as error:
        problem = error.strerror or first_line(error)
        _fail(windows.folder, f"{_FIELD}: {windows.folder}: {problem} (make room there, or name another folder)")


def written_ahead(
    batches: Callable[[], Generator[StepBatch]],
    writers: Sequence[WindowWriter],
    start: int,
    total: int,
    batch_at: Callable[[int], tuple[int, int]],
    begin_window: Callable[[int, int], None],
) -> Generator[StepBatch]:
    """`batches()`, of the steps from `start` to `total`, while the windows that they need are written.

    writers        of each stream; none where another rank of this node has them
    batch_at       step -> (stream, batch of that stream)
    begin_window   (stream, window) -> None, for each one that is written
    """
    with ExitStack() as stack:
        first: dict[int, int] = {}
        for stream, batch in map(batch_at, range(start, total) if writers else ()):
            first.setdefault(stream, batch)
            if len(first) == len(writers):
                break
        numbers = {
            stream: stack.enter_context(writing(writers[stream], batch)) for stream, batch in sorted(first.items())
        }
        windows: dict[int, int] = {}
        for step, step_batch in enumerate(stack.enter_context(closing(batches())), start):
            if writers:
                stream, batch = batch_at(step)
                numbers[stream].value = batch
                window = batch // writers[stream].batches
                if windows.get(stream) != window:
                    windows[stream] = window
                    begin_window(stream, window)
            yield step_batch


def _delete_abandoned(folder: Path) -> None:
    """Delete the windows of runs on this node that were killed."""
    host = folder.name.rpartition("-")[2]
    for started in folder.parent.glob(f".stream-*-{host}/*/{STARTED}"):
        with suppress(OSError, ValueError):
            try:
                os.kill(int(started.read_text()), 0)
            except ProcessLookupError:
                shutil.rmtree(started.parent.parent)
