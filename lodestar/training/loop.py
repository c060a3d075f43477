"""`fit`: the only training loop. It knows steps, the stage knows the losses, the engine knows the hardware."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from lodestar.distributed import watchdog
from lodestar.training.engine import Engine, StepReport


class Batch(Protocol):
    """The examples of one rank in one step."""

    @property
    def num_micro_batches(self) -> int: ...
    @property
    def keeps_all_graphs(self) -> bool:
        """Whether the graphs of all micro-batches are in memory at once."""
        ...

    def inputs(self, index: int) -> list[Any]:
        """The arguments of the model's forward for a micro-batch."""
        ...

    def to(self, device: torch.device) -> Batch:
        """Its tensors on a device."""
        ...

    @property
    def examples(self) -> int:
        """Number of this rank's examples."""
        ...

    @property
    def examples_hash(self) -> int:
        """Of this rank's examples and their places; the sum over ranks, modulo 2**64, names the global batch."""
        ...

    @property
    def tokens(self) -> int: ...
    @property
    def padded_tokens(self) -> int:
        """Tokens as computed, padding included."""
        ...


AnyBatch = TypeVar("AnyBatch", bound=Batch, contravariant=True)
OneBatch = TypeVar("OneBatch", bound=Batch)


class Stage(Protocol[AnyBatch]):
    """The losses of one kind of training."""

    def backward(self, batch: AnyBatch, engine: Engine, step: int) -> Mapping[str, Tensor]:
        """Compute the gradient of this rank's part of the global batch, in the engine.

        Returns scalars on the device; their sums over ranks are those of the global batch. `loss` is one of them.
        """
        ...


@dataclass
class Progress:
    """The progress of a run."""

    total_steps: int
    step: int = 0
    """Completed steps."""
    skipped: Tensor | int = 0
    """Steps whose gradient was not finite; on the device, so that nothing waits for it."""
    counters: dict[str, Tensor | int] = field(default_factory=dict)
    """Of this rank, and on rank 0 also of the steps before the run resumed; on the device."""
    stop: str | None = None
    """The signal that stops the run early; equal on all ranks."""
    final: dict[str, Any] = field(default_factory=dict)
    """Last values of the metrics, for summary.json."""

    @property
    def done(self) -> bool:
        return self.step >= self.total_steps


@dataclass(frozen=True)
class StepDone(Generic[OneBatch]):
    """A completed step, for hooks: this rank's scalars and the engine's report, still on the device."""

    batch: OneBatch
    scalars: Mapping[str, Tensor]
    report: StepReport
    lr_factor: float


class Hook(Protocol):
    """Called on every rank, in the order of the list: before training, after each step, after training."""

    def before(self, progress: Progress) -> None: ...

    def after_step(self, progress: Progress, done: StepDone[Any]) -> None: ...

    def after(self, progress: Progress) -> None: ...


def fit(
    stage: Stage[OneBatch],
    engine: Engine,
    batches: Iterator[OneBatch],
    *,
    progress: Progress,
    lr_factor_at: Callable[[int], float],
    hooks: Sequence[Hook],
    counters: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Train until `progress` is done or a hook sets `progress.stop`.

    counters   names in `progress.counters` -> the stage's scalars that are added up there
    """
    engine.module.train()
    for hook in hooks:
        hook.before(progress)
    while not progress.done and progress.stop is None:
        watchdog.enter(watchdog.LOADING, progress.step + 1)
        batch = next(batches)
        watchdog.enter(watchdog.COMPUTING, progress.step + 1)
        lr_factor = lr_factor_at(progress.step)
        scalars = stage.backward(batch, engine, progress.step)
        done = StepDone(batch, scalars, engine.step(lr_factor), lr_factor)
        progress.step += 1
        progress.skipped = progress.skipped + done.report.skipped
        for name, scalar in counters.items():
            progress.counters[name] = progress.counters.get(name, 0) + scalars[scalar].detach().double()
        watchdog.enter(watchdog.HOOKS, progress.step)
        for hook in hooks:
            hook.after_step(progress, done)
    for hook in hooks:
        hook.after(progress)
