"""What a stage brings to a run, and what of a recipe both stages share."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from lodestar.config.schema import (
    BatchConfig,
    CheckpointConfig,
    EngineConfig,
    EvaluateConfig,
    OptimConfig,
    Precision,
    RunConfig,
    ScheduleConfig,
    TrackConfig,
)
from lodestar.distributed.runtime import Runtime
from lodestar.training.engine import Engine
from lodestar.training.loop import Stage


class Recipe(Protocol):
    """The sections that both stages' recipes have."""

    @property
    def run(self) -> RunConfig: ...
    @property
    def batch(self) -> BatchConfig: ...
    @property
    def optim(self) -> OptimConfig: ...
    @property
    def schedule(self) -> ScheduleConfig: ...
    @property
    def precision(self) -> Precision: ...
    @property
    def engine(self) -> EngineConfig: ...
    @property
    def checkpoint(self) -> CheckpointConfig: ...
    @property
    def evaluate(self) -> EvaluateConfig: ...
    @property
    def track(self) -> TrackConfig: ...


@dataclass
class TrainingTask:
    """What a stage brings to a run."""

    module: nn.Module
    stage: Stage[Any]
    total_steps: int
    rows: int | None
    """Of an epoch; none for a stream."""
    collate: Callable[[int], Any] | None
    """step -> batch; none if `stream` is given."""
    workers: int
    identity: Mapping[str, Any]
    """What must be the same in a run that goes on from a checkpoint."""
    export: Callable[[Mapping[str, torch.Tensor], Path, Mapping[str, Any]], None]
    """(weights by name, folder, facts of the run) -> the folder holds the result."""
    evaluate: Callable[[Engine], dict[str, Any]] | None = None
    stream: Callable[[int], Generator[Any]] | None = None
    """first step -> batches"""
    facts: dict[str, Any] = field(default_factory=dict)
    """What became of the data; goes to summary.json."""
    new_names: Mapping[str, str] = field(default_factory=dict)
    """Beginnings of parameter names that checkpoints of earlier versions have, and what they are today."""
    keep_best: str | None = None
    """A metric: the result is the best evaluated model, not the last."""


@dataclass(frozen=True)
class TaskSpec:
    """A kind of training: all that `lodestar` needs to know of a stage."""

    build_task: Callable[[Any, Runtime], TrainingTask]
    generate: Callable[[Any, float, int], dict[str, Any]]
    """(recipe, share of the largest length, number) -> a row of generated text like no other."""
    plan: Callable[[Any, int, str | None], dict[str, Any]]
    """(recipe, world size, device) -> what a run would do."""
