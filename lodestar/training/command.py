"""The command of a stage, from the command line or from Python to a run. Loads without torch."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar, cast

from lodestar import cli
from lodestar.commands import load
from lodestar.config.loader import recipe_of
from lodestar.config.schema import TrainingRecipe
from lodestar.distributed.runtime import Placement
from lodestar.imports import quick_imports
from lodestar.planning.plan import Plan

if TYPE_CHECKING:
    from lodestar.training.task import TaskSpec

Recipe = TypeVar("Recipe", bound=TrainingRecipe)


@dataclass(frozen=True)
class StageCommand(Generic[Recipe]):
    """What a stage's `cli` offers."""

    usage: str
    schema: type[Recipe]
    plan: Callable[[Recipe, int, str | None], Plan]
    check: Callable[[Recipe], None]
    """Raises for what cannot work, before torch is loaded."""
    spec: str
    """module:name of the stage's TaskSpec; the module loads torch."""

    def main(self, argv: Sequence[str] | None = None) -> int:
        return cli.entry_point(
            argv, usage=self.usage, schema=self.schema, plan=self.plan, run=self.run, rehearse=self.rehearse
        )

    def run(self, recipe: Recipe, placement: Placement) -> int:
        self.check(recipe)
        with quick_imports():
            from lodestar.training.trainer import train

            spec = self._load()
        return train(recipe, placement, spec)

    def rehearse(self, recipe: Recipe, placement: Placement, steps: int) -> int:
        """The dry run of `--rehearse`."""
        evaluates_nothing = recipe.evaluate.model_copy(update={"data": None})
        self.check(recipe.model_copy(update={"evaluate": evaluates_nothing}))
        with quick_imports():
            from lodestar.training.dry_run import rehearse

            spec = self._load()
        return rehearse(recipe, placement, spec, steps)

    def train(self, source: Recipe | Mapping[str, object] | str | Path, *overrides: str) -> Path:
        """A run in this process; returns the folder of the exported model.

        source      a recipe, its values as a dict, or the path of its YAML file
        overrides   as on the command line: "optim.lr=1e-5"
        Raises ConfigError, DataError, ModelError, CheckpointError or TrainingError; KeyboardInterrupt once a run that
        was asked to stop has saved its checkpoint.
        """
        recipe = recipe_of(self.schema, source, overrides)
        gc.collect()  # what an earlier run in this process has left is not looked at during this one
        if self.run(recipe, Placement.from_env()):
            raise KeyboardInterrupt
        return Path(recipe.run.output_dir) / "model"

    def _load(self) -> TaskSpec[Recipe]:
        return cast("TaskSpec[Recipe]", load(self.spec))
