"""Hooks of the training loop: log lines, checkpoints, evaluations, and stopping on a signal."""

from __future__ import annotations

import math
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from lodestar.config.schema import CheckpointConfig
from lodestar.distributed import watchdog
from lodestar.distributed.collectives import gather_objects, max_over_ranks, on_main, sum_over_ranks
from lodestar.errors import TrainingError, first_line
from lodestar.reporting.throughput import Console, Throughput
from lodestar.reporting.trackers import Tracker
from lodestar.training import checkpoint
from lodestar.training.engine import Engine
from lodestar.training.loop import Progress, StepDone

CONSOLE_METRICS = ("ndcg_at_10", "mrr_at_10", "recall_at_100")
"""Metrics of an evaluation that the console prints; metrics.jsonl has all."""

MOST_FAILED_SAVES = 3


class _NoOpHook:
    """A hook that does nothing; hooks override the methods that they need."""

    def before(self, progress: Progress) -> None: ...

    def after_step(self, progress: Progress, done: StepDone[Any]) -> None: ...

    def after(self, progress: Progress) -> None: ...


class LogHook(_NoOpHook):
    """Logs the metrics of the global batch every `every` steps; TrainingError where the gradient stays not finite."""

    def __init__(
        self,
        tracker: Tracker,
        console: Console,
        throughput: Throughput,
        *,
        every: int,
        peak_lrs: Mapping[str, float],
        rows_per_epoch: int,
        rows_per_step: int,
        max_consecutive_nonfinite_steps: int,
    ) -> None:
        self._tracker, self._console, self._throughput = tracker, console, throughput
        self._every, self._peak_lrs = every, peak_lrs
        self._max_consecutive_nonfinite_steps = max_consecutive_nonfinite_steps
        self._epochs_per_step = rows_per_step / rows_per_epoch if rows_per_epoch else math.nan
        self._streak: torch.Tensor | float = 0.0

    def after_step(self, progress: Progress, done: StepDone[Any]) -> None:
        batch, report = done.batch, done.report
        self._throughput.add(samples=batch.examples, tokens=batch.tokens, padded_tokens=batch.padded_tokens)
        self._streak = (self._streak + report.skipped) * report.skipped
        if progress.step % self._every == 0 or progress.done:
            self._log(progress, done)

    def _log(self, progress: Progress, done: StepDone[Any]) -> None:
        names = list(done.scalars)
        scalars = sum_over_ranks(torch.stack([done.scalars[name].detach().float() for name in names])).tolist()
        rates = _global_rates(self._throughput.read(), done.report.grad_norm.device)
        # On the CPU: gloo, without a synchronisation of the GPU.
        examples = int(sum_over_ranks(torch.tensor(done.batch.examples_hash)))
        line = {
            "step": progress.step,
            "examples": f"{examples % 2**64:016x}",
            "epoch": progress.step * self._epochs_per_step,
            **dict(zip(names, scalars, strict=True)),
            **{name: peak * done.lr_factor for name, peak in self._peak_lrs.items()},
            "grad_norm": float(done.report.grad_norm),
            **rates,
            "skipped": int(progress.skipped),
        }
        progress.final |= {
            key: value for key, value in line.items() if key not in ("step", "examples", "epoch", *self._peak_lrs)
        }
        self._tracker.log(line)
        self._console.update(progress.step, loss=line["loss"], texts_per_second=line["samples_per_second"])
        if float(self._streak) >= self._max_consecutive_nonfinite_steps:
            raise TrainingError(
                f"step {progress.step}: the gradient was not finite {int(self._streak)} times in a row "
                "(lower optim.lr, or look for damaged texts; the last checkpoint is good)"
            )

    def after(self, progress: Progress) -> None:
        self._console.close()


def _global_rates(local: Mapping[str, float], device: torch.device) -> dict[str, float]:
    """Over all ranks: rates are summed, padding is averaged, memory is that of the fullest device."""
    summed = sum_over_ranks(
        torch.tensor(
            [local["samples_per_second"], local["tokens_per_second"], local["padding_share"], 1.0], device=device
        )
    ).tolist()
    peak = max_over_ranks(torch.tensor(float(local["peak_memory_bytes"]), device=device, dtype=torch.float64))
    return {
        "samples_per_second": summed[0],
        "tokens_per_second": summed[1],
        "padding_share": summed[2] / summed[3],
        "peak_memory_bytes": int(peak),
    }


class CheckpointHook(_NoOpHook):
    """Commits a checkpoint every checkpoint.every_steps steps, at the end, and when the run is stopped.

    A save that fails, as on a full disk, leaves the older checkpoints and is told; TrainingError where it is the last
    one of the run, or the third in a row.
    """

    def __init__(
        self, engine: Engine, directory: Path, section: CheckpointConfig, identity: Mapping[str, Any], rank: int
    ) -> None:
        self._engine, self._directory, self._section = engine, directory, section
        self._identity, self._rank = identity, rank
        self._saved: int | None = None
        self._failures = 0
        """In a row."""

    def before(self, progress: Progress) -> None:
        self._saved = progress.step if progress.step else None  # just loaded: nothing to save

    def after_step(self, progress: Progress, done: StepDone[Any]) -> None:
        every, ends = self._section.every_steps, progress.done or progress.stop is not None
        if every and progress.step % every == 0 and not ends:
            self._save(progress, MOST_FAILED_SAVES)

    def after(self, progress: Progress) -> None:
        self._save(progress, 1)

    def _save(self, progress: Progress, most_failures: int) -> None:
        if self._saved == progress.step:
            return
        watchdog.enter(watchdog.SAVING, progress.step)
        tensors = {"weights": self._engine.weights(), "optimizer": self._engine.optimizer_state()}
        counts = {"skipped": int(progress.skipped), "masked": total_masked(progress)}
        values = {**counts, "engine": self._engine.values(), **self._identity}
        problem = on_main(lambda: self._write(progress.step, tensors, values))
        self._failures = self._failures + 1 if problem else 0
        if problem is None:
            self._saved = progress.step
        elif self._failures >= most_failures:
            times = f"{self._failures} times in a row" if self._failures > 1 else "at the end of the run"
            raise TrainingError(
                f"checkpoint: {problem}: not saved {times} (make room there, or name another run.output_dir; the same "
                "command resumes from the checkpoint before)"
            )
        elif self._rank == 0:
            print(
                f"warning: checkpoint: {problem}: not saved; training goes on, and ends after {MOST_FAILED_SAVES} such "
                "saves in a row (make room there: older checkpoints are as they were)",
                file=sys.stderr,
                flush=True,
            )

    def _write(self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], values: Mapping[str, Any]) -> str | None:
        """On rank 0; why it failed."""
        try:
            checkpoint.write(self._directory, step, tensors=tensors, values=values)
        except OSError as error:
            return f"{self._directory}: step {step}: {error.strerror or first_line(error)}"
        checkpoint.prune(self._directory, self._section.keep)
        return None


def total_masked(progress: Progress) -> int:
    """False negatives that were masked on all ranks; every rank must call it."""
    return int(sum_over_ranks(torch.as_tensor(progress.masked, dtype=torch.float64)))


class EvaluateHook(_NoOpHook):
    """Calls `evaluate(step)` every `every` steps, at the end and, with `at_start`, before the first step."""

    def __init__(
        self,
        evaluate: Callable[[int], dict[str, Any]],
        tracker: Tracker,
        console: Console,
        *,
        every: int,
        at_start: bool,
    ) -> None:
        self._evaluate, self._tracker, self._console = evaluate, tracker, console
        self._every, self._at_start = every, at_start
        self._last: int | None = None

    def before(self, progress: Progress) -> None:
        if self._at_start and progress.step == 0:
            self._run(progress)

    def after_step(self, progress: Progress, done: StepDone[Any]) -> None:
        if self._every and progress.step % self._every == 0:
            self._run(progress)

    def after(self, progress: Progress) -> None:
        if progress.stop is None and self._last != progress.step:
            self._run(progress)

    def _run(self, progress: Progress) -> None:
        watchdog.enter(watchdog.EVALUATING, progress.step)
        metrics = self._evaluate(progress.step)
        self._last = progress.step
        progress.final |= {key: value for key, value in metrics.items() if key != "evaluation"}
        self._tracker.log({"step": progress.step, **metrics})
        numbers = [f"{name} {metrics[name]:.4f}" for name in CONSOLE_METRICS if name in metrics]
        self._console.print(f"step {progress.step:,}: {metrics['evaluation']}: {', '.join(numbers)}")


class StopHook(_NoOpHook):
    """SIGTERM, SIGINT, SIGHUP or SIGUSR1 on any rank stops all ranks after the same step, with a checkpoint."""

    def __init__(self, world_size: int) -> None:
        self._world_size = world_size
        self._signal: str | None = None
        self._previous_handlers: dict[int, Any] = {}

    def __enter__(self) -> StopHook:
        return self

    def ranks_have_met(self) -> None:
        """From here on SIGUSR1 stops the run after its first step; the other signals end it at once before training.

        Not earlier: while ranks wait for each other, one that is ended would be missed, and one that is not would wait.
        """
        self._listen(signal.SIGUSR1)

    def before(self, progress: Progress) -> None:
        self._listen(signal.SIGTERM, signal.SIGINT)
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup has it
            self._listen(signal.SIGHUP)

    def _listen(self, *numbers: signal.Signals) -> None:
        for number in numbers:
            self._previous_handlers[number] = signal.signal(number, self._handle)

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C
        self._signal = signal.Signals(number).name

    def after_step(self, progress: Progress, done: StepDone[Any]) -> None:
        signal_name = self._signal
        if self._world_size > 1:
            flag = torch.tensor(
                float(signal_name is not None)
            )  # on the CPU: gloo, without a synchronisation of the GPU
            if not float(max_over_ranks(flag)):
                return
            signal_name = next(name for name in gather_objects(signal_name) if name is not None)
        progress.stop = signal_name


class Clock:
    """Seconds since its creation."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def seconds(self) -> float:
        return time.perf_counter() - self._start
