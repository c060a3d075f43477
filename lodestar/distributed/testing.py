"""Real processes for tests: `run_world(fn, size)` runs `fn(rank, size, *args)` on `size` gloo ranks."""

from __future__ import annotations

import faulthandler
import gc
import multiprocessing
import os
import signal
import tempfile
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, TimeoutError, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lodestar.distributed.runtime import Placement, joined

PRELOAD = [
    "lodestar.training.trainer",
    "retromae.task",
    "contrastive.task",
    "sentence_transformers",
    "transformers.models.bert.modeling_bert",
    "matplotlib.figure",
]


def run_world(fn: Callable[..., Any], size: int, *args: Any, limit_s: float = 300.0) -> list[Any]:
    """The results of `fn(rank, size, *args)` in rank order; AssertionError with its traceback where a rank fails.

    `fn` is a function of a module, and its results can be pickled. Ranks are forked from a server that has imported
    what training needs, and start at once. After `limit_s` seconds they are ended, and AssertionError has their stacks.
    """
    context = multiprocessing.get_context("forkserver")
    # Importing DeepSpeed looks for a GPU, after which no fork can use one.
    context.set_forkserver_preload([*PRELOAD, *(() if torch.cuda.is_available() else ("deepspeed",))])
    with tempfile.TemporaryDirectory() as folder:
        try:
            with ProcessPoolExecutor(size, mp_context=context) as pool:
                return _results(pool, fn, size, Path(folder), limit_s, args)
        except TimeoutError:
            stacks = "".join(f"\n{path.name}:\n{path.read_text()}" for path in sorted(Path(folder).glob("rank *")))
            raise AssertionError(f"{fn.__name__} on {size} ranks: not done after {limit_s:g} s{stacks}") from None


class _Failure(NamedTuple):
    rank: int
    traceback: str


def _results(
    pool: ProcessPoolExecutor, fn: Callable[..., Any], size: int, folder: Path, limit_s: float, args: tuple[Any, ...]
) -> list[Any]:
    futures = [pool.submit(_join_and_run, fn, rank, size, folder, limit_s, args) for rank in range(size)]
    processes = list(pool._processes.values())
    try:
        for future in as_completed(futures, timeout=limit_s):
            if isinstance(result := future.result(), _Failure):
                raise AssertionError(f"rank {result.rank} of {size}:\n{result.traceback}")
    except TimeoutError:
        for process in processes:
            if process.is_alive() and process.pid:
                os.kill(process.pid, signal.SIGABRT)  # faulthandler writes the stacks
        raise
    except AssertionError:
        for process in processes:
            process.kill()  # the other ranks would wait for it until a time-out
        raise
    return [future.result() for future in futures]


def _join_and_run(
    fn: Callable[..., Any], rank: int, size: int, folder: Path, limit_s: float, args: tuple[Any, ...]
) -> Any:
    torch.set_num_threads(1)
    gc.freeze()  # or each collection, as DeepSpeed's, goes through all that the server has imported
    stacks = (folder / f"rank {rank}").open("w")  # faulthandler's, until the process ends
    faulthandler.enable(stacks)
    faulthandler.dump_traceback_later(limit_s + 30, exit=True, file=stacks)  # where nobody is left to end this process
    try:
        with joined(Placement(rank, size, rank), timeout_minutes=1.0, init_method=f"file://{folder}/store"):
            return fn(rank, size, *args)
    except Exception:
        return _Failure(rank, traceback.format_exc())
