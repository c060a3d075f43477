"""Saves checkpoints while training goes on: the tensors are copied at once, and a thread of rank 0 writes them."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

from torch import Tensor

from lodestar.config.schema import CheckpointConfig
from lodestar.distributed import watchdog
from lodestar.distributed.collectives import on_main
from lodestar.errors import TrainingError, first_line
from lodestar.training import checkpoint
from lodestar.training.engine import Engine
from lodestar.training.hooks import counts_of
from lodestar.training.host_memory import HostMemory
from lodestar.training.loop import Progress, StepDone

MOST_FAILED_SAVES = 3


class CheckpointHook:
    """Commits a checkpoint every checkpoint.every_steps steps, at the end, and when the run is stopped.

    At most one save is in flight, and the run ends when the last one is on the disk. A save that fails, as on a full
    disk, leaves the older checkpoints and is told; TrainingError where it is the last one of the run, or the third in a
    row.
    """

    def __init__(
        self,
        engine: Engine,
        directory: Path,
        section: CheckpointConfig,
        identity: Mapping[str, Any],
        *,
        writer: Executor,
        hashed: checkpoint.Hashed,
        is_main: bool,
        request_stop: Callable[[str], None],
        timeout_minutes: float,
    ) -> None:
        """writer   one thread, which the caller waits for in the end
        hashed          checkpoints that need not be hashed again
        request_stop    stops all ranks after one of the next steps
        timeout_minutes after which a save that is still in flight is told
        """
        self._engine, self._directory, self._section, self._identity = engine, directory, section, identity
        self._writer, self._hashed, self._is_main = writer, hashed, is_main
        self._request_stop, self._timeout_minutes = request_stop, timeout_minutes
        self._memory = HostMemory()
        self._saved: int | None = None
        """The step that is on the disk, or will be."""
        self._in_flight: Future[str | None] | None = None
        """On rank 0: why the save failed."""
        self._late_at = math.inf
        self._problem: str | None = None
        """Of the last save."""
        self._failures = 0
        """In a row."""

    def before(self, progress: Progress) -> None:
        self._saved = progress.step if progress.step else None  # just loaded: nothing to save

    def after_step(self, progress: Progress, done: StepDone[Any]) -> None:
        self._look()
        every, ends = self._section.every_steps, progress.done or progress.stop is not None
        if every and progress.step % every == 0 and not ends:
            self._settle(progress.step, MOST_FAILED_SAVES)
            self._save(progress)

    def after(self, progress: Progress) -> None:
        self._settle(progress.step, MOST_FAILED_SAVES)
        if self._saved != progress.step:
            self._save(progress)
            self._settle(progress.step, 1)

    def _save(self, progress: Progress) -> None:
        watchdog.enter(watchdog.SAVING, progress.step)
        tensors = {
            "weights": self._engine.weights(self._memory),
            "optimizer": self._engine.optimizer_state(self._memory),
        }
        values = {**counts_of(progress), "engine": self._engine.values(), **self._identity}
        self._saved = progress.step
        if self._is_main:
            self._in_flight = self._writer.submit(self._write, progress.step, tensors, values)
            self._late_at = time.monotonic() + 60 * self._timeout_minutes

    def _write(self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], values: Mapping[str, Any]) -> str | None:
        """In the thread; why it failed."""
        try:
            checkpoint.write(self._directory, step, tensors=tensors, values=values, hashed=self._hashed)
        except OSError as error:
            return f"{self._directory}: step {step}: {error.strerror or first_line(error)}"
        checkpoint.prune(self._directory, self._section.keep, self._hashed)
        return None

    # --- outcomes ---

    def _look(self) -> None:
        """On rank 0: tell of the save in flight where it has failed or takes too long; never waits."""
        if self._in_flight is None:
            return
        if self._in_flight.done():
            self._collect(MOST_FAILED_SAVES)
            if self._failures >= MOST_FAILED_SAVES:
                self._request_stop("failed saves")  # the error is raised on all ranks at once, by `after`
        elif time.monotonic() > self._late_at:
            self._late_at = math.inf
            _warn(
                f"step {self._saved}: not on the disk after {self._timeout_minutes:g} minutes; training goes on until "
                "the next save (see whether the disk answers: older checkpoints are as they were)"
            )

    def _settle(self, step: int, most_failures: int) -> None:
        """Wait until nothing is in flight; TrainingError on all ranks after that many failures in a row."""
        watchdog.enter(watchdog.SAVING, step)
        problem, failures = on_main(lambda: self._collect(most_failures))
        if problem is None:
            return
        self._saved = None
        if failures >= most_failures:
            times = f"{failures} times in a row" if failures > 1 else "at the end of the run"
            raise TrainingError(
                f"checkpoint: {problem}: not saved {times} (make room there, or name another run.output_dir; the same "
                "command resumes from the checkpoint before)"
            )

    def _collect(self, most_failures: int) -> tuple[str | None, int]:
        """On rank 0: wait for the save in flight, count it and tell of it; (why the last save failed, how many did)."""
        if self._in_flight is not None:
            self._problem = self._in_flight.result()
            self._in_flight = None
            self._failures = self._failures + 1 if self._problem else 0
            if self._problem and self._failures < most_failures:
                _warn(
                    f"{self._problem}: not saved; training goes on, and ends after {MOST_FAILED_SAVES} such saves in a "
                    "row (make room there: older checkpoints are as they were)"
                )
        return self._problem, self._failures


def _warn(text: str) -> None:
    print(f"warning: checkpoint: {text}", file=sys.stderr, flush=True)
