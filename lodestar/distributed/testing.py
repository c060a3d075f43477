"""Real processes for tests: `run_world(fn, size)` runs `fn(rank, size, *args)` on `size` gloo ranks."""

from __future__ import annotations

import multiprocessing
import tempfile
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any, NamedTuple

import torch

from lodestar.distributed.runtime import Placement, joined

PRELOAD = ["torch", "transformers", "lodestar.training.engine", "retromae.stage", "contrastive.stage"]


def run_world(fn: Callable[..., Any], size: int, *args: Any) -> list[Any]:
    """The results of `fn(rank, size, *args)` in rank order; AssertionError with its traceback where a rank fails.

    `fn` is a function of a module, and its results can be pickled. Processes are forked from a server that has imported
    torch: seven times faster than `spawn`.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(size, mp_context=context) as pool:
        futures = [pool.submit(_join_and_run, fn, rank, size, f"file://{folder}/store", args) for rank in range(size)]
        for future in as_completed(futures):
            result = future.result()
            if isinstance(result, _Failure):
                for process in list(pool._processes.values()):
                    process.terminate()  # the other ranks would wait for it until a time-out
                raise AssertionError(f"rank {result.rank} of {size}:\n{result.traceback}")
        return [future.result() for future in futures]


class _Failure(NamedTuple):
    rank: int
    traceback: str


def _join_and_run(fn: Callable[..., Any], rank: int, size: int, store: str, args: tuple[Any, ...]) -> Any:
    torch.set_num_threads(1)
    try:
        with joined(Placement(rank, size, rank), timeout_minutes=1.0, init_method=store):
            return fn(rank, size, *args)
    except Exception:
        return _Failure(rank, traceback.format_exc())
