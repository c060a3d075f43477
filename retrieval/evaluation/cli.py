"""The command that evaluates models: python | torchrun launch/evaluate.py --config FILE [KEY=VALUE ...]."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lodestar.cli import entry_point
from lodestar.config.loader import recipe_of
from lodestar.distributed.runtime import Placement
from lodestar.imports import quick_imports
from lodestar.planning.plan import PlanWarnings
from retrieval.embedding.model_folder import check_folder
from retrieval.evaluation.config import EvaluateRecipe
from retrieval.evaluation.tasks import task_of

if TYPE_CHECKING:
    from retrieval.evaluation.results import Result


def main(argv: Sequence[str] | None = None) -> int:
    usage = "Measure models: retrieval, classification, clustering, STS, pair classification."
    return entry_point(argv, usage=usage, schema=EvaluateRecipe, plan=plan, run=run)


def plan(recipe: EvaluateRecipe, world_size: int, device: str | None = None) -> dict[str, object]:
    """What `--plan` prints: sizes of the tasks. Opens no model."""
    missing = PlanWarnings()
    for path in recipe.labelled_models.values():
        missing.or_default(None, partial(check_folder, path, "models"), "it cannot be measured")
    facts: dict[str, object] = {"world_size": world_size, "models": ", ".join(recipe.labelled_models)}
    num_texts = num_characters = 0
    for name in recipe.all_tasks:
        task = missing.or_default(None, partial(task_of, recipe, name), "not counted")
        if task is None:
            continue
        num_texts += len(task.texts)
        num_characters += sum(map(len, task.texts))
        if name in recipe.tasks:
            facts[f"task {name}"] = f"{task.kind}: {task.counts_in_words}"
        else:
            facts |= task.describe(name)
    texts_per_rank = -(-num_texts // world_size)
    return facts | {"texts_per_rank": texts_per_rank, "characters": num_characters, "missing": missing.lines}


def run(recipe: EvaluateRecipe, placement: Placement) -> int:
    _evaluate(recipe, placement)
    return 0


def evaluate(recipe: EvaluateRecipe | Mapping[str, object] | str | Path, *overrides: str) -> dict[str, Result]:
    """Measure models, as `lodestar evaluate` does; returns the results by task, whose `rows` hold all metrics.

    recipe      an EvaluateRecipe, its values as a dict, or the path of its YAML file
    overrides   as on the command line: "bm25=false"
    Raises ConfigError, DataError or ModelError.
    """
    return _evaluate(recipe_of(EvaluateRecipe, recipe, overrides), Placement.from_env())


def _evaluate(recipe: EvaluateRecipe, placement: Placement) -> dict[str, Result]:
    tasks = {name: task_of(recipe, name) for name in recipe.all_tasks}
    for path in recipe.labelled_models.values():
        check_folder(path, "models")  # now, not after hours with the first model
    with quick_imports():
        from retrieval.evaluation.compare import evaluate
    return evaluate(recipe, tasks, placement)
