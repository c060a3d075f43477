"""Batches step by step, prepared ahead by worker processes that heed nobody but their rank."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Generator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

StepBatch = TypeVar("StepBatch")


STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""What launchers, terminals and batch systems send to stop a run."""


_PR_SET_PDEATHSIG = 1  # of Linux' prctl: the signal that a process gets when its parent ends


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
