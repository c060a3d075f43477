"""Texts from files: tokenised once into an Arrow cache, put in order by arithmetic, loaded step by step.

Rows of an epoch are shuffled by address, so the rows of any step are known without reading those before it, and any
number of loader workers or ranks sees the same batches.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import datasets
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from chassis import chance
from chassis.errors import DataError
from chassis.files import damage, sync, write_manifest
from chassis.sources import Row, Source, read_rows

StepBatch = TypeVar("StepBatch")

ABANDONED_SECONDS = 7 * 24 * 3600
"""Age at which the draft of a run that was killed is deleted."""

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""What launchers, terminals and batch systems send to stop a run."""
_PR_SET_PDEATHSIG = 1  # of Linux' prctl: the signal that a process gets when its parent ends

# --- the tokenised cache ---------------------------------------------------------------------


@dataclass(frozen=True)
class Facts:
    """What became of the texts; nothing is cut or dropped without being counted here."""

    fingerprint: str
    rows: int
    tokens: int
    truncated: int
    dropped: int


@dataclass(frozen=True)
class Corpus:
    """Tokenised rows, mapped from the disk."""

    rows: datasets.Dataset
    facts: Facts


def tokenised(
    sources: Sequence[Source],
    *,
    cache_dir: Path,
    settings: Mapping[str, Any],
    tokenise: Callable[[Mapping[str, list[Any]]], Mapping[str, list[Any]]],
    check: Callable[[str, Row], Row | None],
    row_features: datasets.Features,
    features: datasets.Features,
    processes: int,
    first_on_node: bool = True,
) -> Corpus:
    """The sources' rows, checked and tokenised; from the cache if the same content met the same settings before.

    settings       everything besides the content that decides the result
    check          (where, row) -> the columns to keep, none to drop the row; raises DataError
    row_features   types of those columns: never guessed from the first rows of a file
    tokenise       a batch of columns -> columns of `features`, where `tokens` and `truncated` are counts for each row
    first_on_node  this process checks every byte of the cache, and builds it anew where one is wrong
    """
    contents = [source.fingerprint for source in sources]
    address = json.dumps([contents, dict(settings)], sort_keys=True)
    folder = cache_dir.expanduser() / hashlib.blake2b(address.encode(), digest_size=12).hexdigest()
    if first_on_node and folder.exists() and (wrong := damage(folder, ("facts.json", "rows/state.json"))):
        print(f"warning: data.cache_dir: {folder}: {wrong}; built anew", file=sys.stderr, flush=True)
        shutil.rmtree(folder)
    if not folder.exists():
        _build(folder, sources, contents, tokenise, check, row_features, features, processes)
    facts = Facts(**json.loads((folder / "facts.json").read_text()))
    return Corpus(cast(datasets.Dataset, datasets.load_from_disk(str(folder / "rows"))), facts)


def _build(
    folder: Path,
    sources: Sequence[Source],
    contents: Sequence[str],
    tokenise: Callable[..., Any],
    check: Callable[[str, Row], Row | None],
    row_features: datasets.Features,
    features: datasets.Features,
    processes: int,
) -> None:
    draft = _own_draft(folder)
    given = 0

    def rows() -> Iterator[Row]:
        nonlocal given
        for source, content in zip(sources, contents, strict=True):
            for where, row in read_rows(source):
                given += 1
                kept = check(where, row)
                if kept is not None:
                    yield kept
            if source.fingerprint != content:
                raise DataError(
                    f"{source.field}: {source.path}: changed while it was read (start again when it is complete)"
                )

    try:
        shards = list(_in_shards(rows(), row_features, draft / "raw"))
        if not shards:
            raise DataError(f"data.train: {', '.join(s.path for s in sources)}: no row is left to train on")
        raw = datasets.concatenate_datasets([datasets.Dataset.from_file(str(path)) for path in shards])
        table = raw.map(
            tokenise,
            batched=True,
            remove_columns=raw.column_names,
            num_proc=processes if processes > 1 and len(raw) > 2000 else None,
            features=features,
            cache_file_name=str(draft / "mapped.arrow"),
            desc="tokenising",
        )
        counted: Any = table.select_columns(["tokens", "truncated"]).with_format("numpy")
        tokens = sum(int(batch["tokens"].sum()) for batch in counted.iter(100_000))
        truncated = sum(int(batch["truncated"].sum()) for batch in counted.iter(100_000))
        table.save_to_disk(str(draft / "rows"))
        for path in (draft / "raw", *draft.glob("mapped*.arrow")):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        facts = Facts(folder.name, len(table), tokens, truncated, given - len(raw))
        (draft / "facts.json").write_text(json.dumps(asdict(facts)))
        write_manifest(draft)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    try:
        draft.rename(folder)  # whole or absent
    except OSError:  # another run on this cache was quicker
        shutil.rmtree(draft)
    sync(folder.parent)


def _own_draft(folder: Path) -> Path:
    """An empty folder of this process alone, because other runs and nodes may build the same; old ones go."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    for abandoned in folder.parent.glob(".*.draft"):
        with suppress(OSError):
            if time.time() - abandoned.stat().st_mtime > ABANDONED_SECONDS:
                shutil.rmtree(abandoned)
    return Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".draft", dir=folder.parent))


def _in_shards(
    rows: Iterator[Row], features: datasets.Features, folder: Path, shard_rows: int = 200_000
) -> Iterator[Path]:
    """Write the rows as Arrow files of `shard_rows` rows, so that memory does not grow with the corpus."""
    from datasets.arrow_writer import ArrowWriter

    folder.mkdir()
    row = next(rows, None)
    while row is not None:
        path = folder / f"{len(list(folder.iterdir())):05d}.arrow"
        writer = ArrowWriter(path=str(path), features=features)
        for _ in range(shard_rows):
            writer.write(dict(row))
            row = next(rows, None)
            if row is None:
                break
        writer.finalize()
        yield path


# --- order -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Order:
    """Which rows make the global batch of a step; epochs follow one another without a gap, each row once in each."""

    rows: int
    global_size: int
    seed: int
    name: str = ""

    def batch(self, number: int, part: range) -> tuple[Tensor, Tensor]:
        """(epochs, rows), int64, of the positions `part` of the batch that is the `number`-th of this order."""
        positions = torch.arange(part.start, part.stop) + number * self.global_size
        epochs = positions // self.rows
        result = torch.empty_like(positions)
        for epoch in epochs.unique().tolist():
            here = epochs == epoch
            result[here] = chance.permuted(positions[here] % self.rows, self.rows, self.seed, "order", self.name, epoch)
        return epochs, result


class Mixture:
    """Which of several data sets a step draws its batch from: by weight, as a pure function of the step."""

    def __init__(self, shares: Sequence[float], steps: int, seed: int) -> None:
        bounds = torch.tensor(shares, dtype=torch.float64).cumsum(0) / sum(shares)
        draws = chance.uniform(torch.tensor(chance.key(seed, "mixture")), torch.arange(steps))
        self._choice = torch.bucketize(draws.double(), bounds[:-1], right=True)
        self._number = torch.zeros(steps, dtype=torch.int64)
        for which in range(len(shares)):
            here = self._choice == which
            self._number[here] = torch.arange(int(here.sum()))

    def at(self, step: int) -> tuple[int, int]:
        """(data set, how many earlier steps drew from it)."""
        return int(self._choice[step]), int(self._number[step])


# --- loading ---------------------------------------------------------------------------------


class _Steps(TorchDataset[Any]):
    def __init__(self, collate: Callable[[int], Any]) -> None:
        self.collate = collate

    def __getitem__(self, step: int) -> Any:
        return self.collate(step)


def step_batches(
    collate: Callable[[int], StepBatch], *, start: int, total: int, workers: int, pin: bool
) -> Generator[StepBatch]:
    """`collate(step)` for each step from `start` on, prepared ahead by `workers` processes (0: in this one)."""
    loader = DataLoader(
        _Steps(collate),
        batch_size=None,
        sampler=range(start, total),
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        pin_memory=pin,
        worker_init_fn=_begin_worker,
    )
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # as workers inherit it
    try:
        batches = iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    yield from batches  # closing this generator ends the workers


def _begin_worker(worker: int) -> None:
    """Launchers and terminals signal whole process trees; the rank alone decides when to stop, and its workers end
    with it, however it ends."""
    torch.set_num_threads(1)
    os.setsid()
    if hasattr(signal, "sigwaitinfo"):
        threading.Thread(target=_heed_the_rank, daemon=True).start()
    else:  # macOS does not say who sent a signal; Python ends workers by SIGTERM
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    if sys.platform == "linux":  # elsewhere torch looks for the parent now and then
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        parent = multiprocessing.parent_process()
        if parent is not None and parent.pid != os.getppid():
            os._exit(0)  # the rank was gone before the line above


def _heed_the_rank() -> None:
    """Take the stop signals, which are blocked here, and follow those of this worker's rank alone."""
    while signal.sigwaitinfo(STOP_SIGNALS).si_pid != os.getppid():
        pass
    os._exit(0)


def cut(rows: Sequence[Any], parts: int) -> list[Sequence[Any]]:
    """`rows` in `parts` runs whose sizes differ by at most one; some are empty where rows are fewer."""
    return [rows[i * len(rows) // parts : (i + 1) * len(rows) // parts] for i in range(parts)]


def padded(rows: Sequence[Sequence[int]], fill: int, multiple: int = 8) -> Tensor:
    """(B, L) int64; L is the longest row, rounded up to a multiple that matrix units like."""
    longest = max((len(row) for row in rows), default=1)
    width = -(-longest // multiple) * multiple
    result = torch.full((len(rows), width), fill, dtype=torch.int64)
    for i, row in enumerate(rows):
        result[i, : len(row)] = torch.as_tensor(row, dtype=torch.int64)
    return result
