"""What a stage brings to a run."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from torch import Tensor, nn

from lodestar.config.schema import BatchPlan, TrainingRecipe
from lodestar.data.sampler import MakeSampler, ShuffledSampler
from lodestar.distributed.runtime import Runtime
from lodestar.planning.plan import Plan
from lodestar.training.loop import Batch, MicroBatch, Stage

Recipe = TypeVar("Recipe", bound=TrainingRecipe)
AnyRecipe = TypeVar("AnyRecipe", bound=TrainingRecipe, contravariant=True)
Row = dict[str, Any]
"""Of a training file."""


Export = Callable[[Mapping[str, Tensor], Path, Mapping[str, Any]], None]
"""(weights by name, folder, facts of the run) -> the folder holds the model."""
Evaluate = Callable[[], dict[str, Any]]
"""-> `evaluation`, a name, and metrics, the same on every rank; every rank must call."""


@dataclass
class TrainingTask:
    """What a stage brings to a run."""

    module: nn.Module
    stage: Stage[Any]
    total_steps: int
    rows: int | None
    """Of an epoch; none for a stream."""
    batches: Callable[[int], Generator[Batch]]
    """First step -> this rank's batches from that step on."""
    identity: Mapping[str, Any]
    """What must be the same in a run that goes on from a checkpoint."""
    export: Export
    evaluate: Evaluate | None = None
    micro_batches: Callable[[BatchPlan], Sequence[MicroBatch]] | None = None
    """Those of rank 0 in the first step of a batch so planned; none for a stream."""
    held_micro_batches: int = 1
    """How many have their graphs in memory at once, where a step has several."""
    data_counts: Mapping[str, int] = field(default_factory=dict)
    """Of the training data: rows, tokens, truncated, dropped; for summary.json."""
    new_names: Mapping[str, str] = field(default_factory=dict)
    """Beginnings of parameter names that checkpoints of earlier versions have, and what they are today."""
    keep_best: str | None = None
    """A metric: the result is the best evaluated model, not the last."""


class BuildTask(Protocol[AnyRecipe]):
    def __call__(
        self, recipe: AnyRecipe, runtime: Runtime, make_sampler: MakeSampler = ShuffledSampler
    ) -> TrainingTask: ...


@dataclass(frozen=True)
class TaskSpec(Generic[Recipe]):
    """A kind of training: all that `lodestar` needs to know of a stage."""

    build_task: BuildTask[Recipe]
    plan: Callable[[Recipe, int, str | None], Plan]
    """(recipe, world size, device) -> what a run would do."""
    synthetic_row: Callable[[Recipe, float, int], Row]
    """(recipe, fraction of the maximum length, number) -> a row of generated text, different for each number."""
    with_training_file: Callable[[Recipe, Path, Path], Recipe]
    """(recipe, JSONL file, cache folder) -> the recipe that trains on that file alone."""
