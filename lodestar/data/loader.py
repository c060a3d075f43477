"""Batches step by step, prepared ahead by worker processes that end only with their rank."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from lodestar.errors import LodestarError, TrainingError, first_line

StepBatch = TypeVar("StepBatch")
Item = TypeVar("Item")

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""Signals by which launchers, terminals and batch systems stop a run."""


_PR_SET_PDEATHSIG = 1  # of Linux' prctl: the signal that a process gets when its parent ends


class _Steps(TorchDataset[Any]):
    """Batches by step, for torch's DataLoader."""

    def __init__(self, collate: Callable[[int], Any]) -> None:
        self.collate = collate

    def __getitem__(self, step: int) -> Any:
        try:
            return self.collate(step)
        except LodestarError as error:  # to be raised in the rank: torch would put a traceback into its message
            return error


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
        worker_init_fn=begin_worker,
    )
    previous_mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # workers inherit the mask
    try:
        batches = iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous_mask)
    while True:  # closing this generator ends the workers
        try:
            batch = next(batches)
        except StopIteration:
            return
        except (ConnectionError, EOFError):  # of the socket by which a worker hands over tensors
            time.sleep(1)  # here comes torch's error, once the signal says that the worker has ended
            raise RuntimeError("DataLoader worker was killed while it handed over a batch") from None
        if isinstance(batch, LodestarError):
            raise batch
        yield batch


@contextmanager
def lost_workers_told(rank: int) -> Iterator[None]:
    """TrainingError where a worker ends inside: torch raises its own wherever the rank is at that moment."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise TrainingError(
            f"data.workers: rank {rank}: {first_line(error).rstrip('. ')} (if the host ran out of memory, lower "
            "data.workers; the same command resumes the run)"
        ) from None


def begin_worker(worker: int = 0) -> None:
    """Ignore the signals that launchers and terminals send to whole process trees: only the rank decides when to stop.

    Its workers end with it, however it ends.
    """
    torch.set_num_threads(1)
    os.setsid()
    if hasattr(signal, "sigwaitinfo"):
        threading.Thread(target=_exit_on_signal_of_rank, daemon=True).start()
    else:  # macOS does not say who sent a signal; Python ends workers by SIGTERM
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    if sys.platform == "linux":  # elsewhere torch checks for the parent from time to time
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        parent = multiprocessing.parent_process()
        if parent is not None and parent.pid != os.getppid():
            os._exit(0)  # the rank was gone before the line above


def _exit_on_signal_of_rank() -> None:
    """Wait for the blocked stop signals; exit on one from this worker's rank, ignore all others."""
    while signal.sigwaitinfo(STOP_SIGNALS).si_pid != os.getppid():
        pass
    os._exit(0)


def cut(items: Sequence[Item], parts: int) -> list[Sequence[Item]]:
    """`items` in `parts` contiguous parts whose sizes differ by at most one; some are empty where items are fewer."""
    return [items[i * len(items) // parts : (i + 1) * len(items) // parts] for i in range(parts)]
