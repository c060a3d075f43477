"""The interface between a stage and the trainer."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from torch import Tensor, nn

from lodestar.config.schema import BatchPlan, TrainingRecipe
from lodestar.data.readers import Row
from lodestar.data.sampler import MakeSampler, ShuffledSampler
from lodestar.distributed.runtime import Runtime
from lodestar.planning.plan import Plan
from lodestar.training.loop import Batch, Stage

Recipe = TypeVar("Recipe", bound=TrainingRecipe)
AnyRecipe = TypeVar("AnyRecipe", bound=TrainingRecipe, contravariant=True)
Export = Callable[[Mapping[str, Tensor], Path, Mapping[str, Any]], None]
"""(weights by name, folder, results of the run) -> None; writes the model into the folder."""
Evaluate = Callable[[], dict[str, Any]]
"""() -> `evaluation`, its name, and metrics, equal on all ranks; every rank must call it."""


@dataclass
class TrainingTask:
    """What a stage gives to the trainer for one run."""

    module: nn.Module
    stage: Stage[Any]
    total_steps: int
    rows: int | None
    """Of an epoch; none for a stream."""
    batches: Callable[[int], Generator[Batch]]
    """First step -> this rank's batches from that step on."""
    identity: Mapping[str, Any]
    """JSON values that must equal those of the checkpoint from which a run resumes."""
    export: Export
    evaluate: Evaluate | None = None
    first_batch: Callable[[BatchPlan], Batch] | None = None
    """Plan -> the batch of rank 0 in the first step; none for a stream."""
    held_micro_batches: int = 1
    """Micro-batches whose graphs are in memory at once, if a step has several."""
    data_counts: Mapping[str, int] = field(default_factory=dict)
    """Of the training data: rows, tokens, truncated, dropped; for summary.json."""
    counters: Mapping[str, str] = field(default_factory=dict)
    """Names in checkpoints and summary.json -> the stage's scalars that are added up there over the run."""
    new_names: Mapping[str, str] = field(default_factory=dict)
    """Prefixes of parameter names in checkpoints of earlier versions -> prefixes today."""
    examples_at: Callable[[int], Sequence[str]] | None = None
    """Step -> the examples of its global batch, as FILE:LINE where that is known; reads the data again."""
    keep_best: str | None = None
    """A metric: the exported model is the one with its highest value, not the last."""


class BuildTask(Protocol[AnyRecipe]):
    """Builds the task of a recipe on this rank."""

    def __call__(
        self, recipe: AnyRecipe, runtime: Runtime, make_sampler: MakeSampler = ShuffledSampler
    ) -> TrainingTask: ...


@dataclass(frozen=True)
class TaskSpec(Generic[Recipe]):
    """A kind of training: what the trainer needs to know of a stage."""

    build_task: BuildTask[Recipe]
    plan: Callable[[Recipe, int, str | None], Plan]
    """(recipe, world size, device) -> the plan of `--plan`."""
    synthetic_row: Callable[[Recipe, float, int], Row]
    """(recipe, fraction of the maximum length, index) -> a row of generated text, different for each index."""
    with_training_file: Callable[[Recipe, Path, Path], Recipe]
    """(recipe, JSONL file, cache folder) -> the recipe with that file as its only training data."""
