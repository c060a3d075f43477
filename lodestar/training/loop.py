"""`fit`: the only training loop. It knows steps; the stage knows meaning; the engine knows hardware."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from lodestar.training.engine import Engine, StepReport


class MicroBatch(Protocol):
    """What goes through the model at once."""

    def tensors(self, device: torch.device) -> list[Tensor]:
        """The model's inputs, in the order of its forward."""
        ...


class Batch(Protocol):
    """What one rank does in one step."""

    @property
    def micro_batches(self) -> Sequence[MicroBatch]: ...
    @property
    def examples(self) -> int:
        """Those of the global batch that this rank holds."""
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
    def backward(self, batch: AnyBatch, engine: Engine, step: int) -> Mapping[str, Tensor]:
        """Leave the gradient of this rank's part of a whole step in the engine.

        Returns scalars on the device whose sums over ranks are those of the global batch; `loss` is one of them.
        """
        ...


@dataclass
class Progress:
    """How far a run is."""

    total_steps: int
    step: int = 0
    """Steps that are done."""
    skipped: Tensor | int = 0
    """Steps whose gradient was not finite; on the device, so that counting does not wait for it."""
    stop: str | None = None
    """Why to stop before the end, once all ranks know."""
    final: dict[str, Any] = field(default_factory=dict)
    """What hooks found out and summary.json should say."""

    @property
    def done(self) -> bool:
        return self.step >= self.total_steps


@dataclass(frozen=True)
class StepDone(Generic[OneBatch]):
    """What hooks are shown after a step: local scalars and the engine's report, still on the device."""

    batch: OneBatch
    scalars: Mapping[str, Tensor]
    report: StepReport
    lr_factor: float


class Hook(Protocol):
    """Does something beside training; called on every rank, in the order of the list."""

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
) -> None:
    """Train until `progress` is done or a hook asks to stop."""
    engine.module.train()
    for hook in hooks:
        hook.before(progress)
    while not progress.done and progress.stop is None:
        batch = next(batches)
        lr_factor = lr_factor_at(progress.step)
        scalars = stage.backward(batch, engine, progress.step)
        done = StepDone(batch, scalars, engine.step(lr_factor), lr_factor)
        progress.step += 1
        progress.skipped = progress.skipped + done.report.skipped
        for hook in hooks:
            hook.after_step(progress, done)
    for hook in hooks:
        hook.after(progress)
