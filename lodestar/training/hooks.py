"""Hooks of the training loop: log lines, evaluations, and stopping on a signal."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any

import torch

from lodestar.distributed import watchdog
from lodestar.distributed.collectives import gather_objects, max_over_ranks, max_over_ranks_later, sum_over_ranks
from lodestar.errors import TrainingError
from lodestar.reporting.throughput import Console, Throughput
from lodestar.reporting.trackers import Tracker
from lodestar.training.loop import Progress, StepDone

CONSOLE_METRICS = ("ndcg_at_10", "mrr_at_10", "recall_at_100")
"""Metrics of an evaluation that the console prints; metrics.jsonl has all."""

LONG_STEP_SECONDS = 1.0
"""Of a step at whose end ranks wait for each other's signals; after a shorter one they look at them a step later."""


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
        device = done.report.grad_norm.device
        rates = _global_rates(self._throughput.read(), device)
        examples = int(sum_over_ranks(torch.tensor(done.batch.examples_hash, device=device)))
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


def counts_of(progress: Progress) -> dict[str, int]:
    """Skipped steps and the stage's counters over all ranks; every rank must call it."""
    counters = {
        name: int(sum_over_ranks(torch.as_tensor(value, dtype=torch.float64)))
        for name, value in progress.counters.items()
    }
    return {"skipped": int(progress.skipped), **counters}


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
    """SIGTERM, SIGINT, SIGHUP or SIGUSR1 on any rank stops all ranks after the same step, with a checkpoint.

    That step is the current one where a step is long, and else at the latest the next: ranks that have short steps do
    not wait for each other to answer.
    """

    def __init__(self, world_size: int) -> None:
        self._world_size = world_size
        self._signal: str | None = None
        self._previous_handlers: dict[int, Any] = {}
        self._answer: Callable[[], torch.Tensor] | None = None
        """Of all ranks to the last step, where nobody has looked at it yet."""
        self._step_seconds = math.inf
        """On the slowest rank, of the last step that was looked at."""
        self._step_start = 0.0

    def __enter__(self) -> StopHook:
        return self

    def ranks_have_met(self) -> None:
        """From here on SIGUSR1 stops the run after its first step; the other signals end it at once before training.

        Not earlier: while ranks wait for each other, one that is ended would be missed, and one that is not would wait.
        """
        self._listen(signal.SIGUSR1)

    def request(self, reason: str) -> None:
        """Stop all ranks as a signal to this one does."""
        self._signal = self._signal or reason

    def before(self, progress: Progress) -> None:
        self._listen(signal.SIGTERM, signal.SIGINT)
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup has it
            self._listen(signal.SIGHUP)
        self._step_start = time.perf_counter()

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
        if self._world_size == 1:
            progress.stop = self._signal
            return
        start, self._step_start = self._step_start, time.perf_counter()
        earlier = self._answer
        # On the CPU: gloo, without a synchronisation of the GPU.
        self._answer = max_over_ranks_later(torch.tensor([float(self._signal is not None), self._step_start - start]))
        is_signalled = earlier is not None and self._look(earlier)
        if is_signalled or progress.done or self._step_seconds >= LONG_STEP_SECONDS:
            is_signalled |= self._look(self._answer)
            self._answer = None
        if is_signalled:
            progress.stop = next(name for name in gather_objects(self._signal) if name is not None)

    def _look(self, answer: Callable[[], torch.Tensor]) -> bool:
        """Whether any rank had a signal; waits for an answer that is not there yet."""
        is_signalled, self._step_seconds = answer().tolist()
        return bool(is_signalled)


class Clock:
    """Seconds since its creation."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def seconds(self) -> float:
        return time.perf_counter() - self._start
