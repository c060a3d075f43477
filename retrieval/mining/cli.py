"""The command that mines hard negatives. Loads without torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from lodestar.cli import entry_point
from lodestar.config.loader import recipe_of
from lodestar.data.readers import count_rows, find_sources
from lodestar.distributed.runtime import Placement
from lodestar.errors import require
from lodestar.imports import quick_imports
from lodestar.models.folder_checks import check_plain_model, local_folder
from lodestar.planning.plan import PlanWarnings
from retrieval.embedding.corpus import files_of
from retrieval.embedding.model_folder import check_folder
from retrieval.mining.config import MineRecipe
from retrieval.mining.texts import check_files


def mine(recipe: MineRecipe | Mapping[str, object] | str | Path, *overrides: str) -> Path:
    """Add hard negatives to a training file, as the command does; returns the file that was written.

    recipe     an object, its values, or a YAML file
    overrides  as "mine.negatives=7"
    Raises ConfigError, DataError or ModelError. Needs no launcher; under one, all ranks share the work.
    """
    recipe = recipe_of(MineRecipe, recipe, overrides)
    run(recipe, Placement.from_env())
    return Path(recipe.output)


def main(argv: Sequence[str] | None = None) -> int:
    return entry_point(argv, usage="Mine hard negatives with a trained model.", schema=MineRecipe, plan=plan, run=run)


def plan(recipe: MineRecipe, world_size: int, device: str | None = None) -> dict[str, object]:
    """What `--plan` prints."""
    corpus, missing = recipe.corpus_recipe, PlanWarnings()
    missing.or_default(None, partial(check_models, recipe), "it cannot be opened")

    def count(files: Sequence[str], field: str) -> int | None:
        return missing.or_default(None, lambda: count_rows(find_sources(files, field)), "rows are not known")

    queries = count(recipe.data, "data")
    return {
        "model": recipe.model,
        "output": recipe.output,
        "work": str(recipe.work),
        "world_size": world_size,
        "queries": queries,
        "corpus_rows": count(files_of(corpus), "corpus") if corpus else "all passages of data",
        "negatives_per_query": recipe.mine.negatives,
        "ranks": f"{recipe.mine.first_rank} to {recipe.mine.last_rank}, {recipe.mine.pick}",
        "blocks": None if queries is None else -(-queries // recipe.block_size(queries, world_size)),
        "missing": missing.lines,
    }


def check_models(recipe: MineRecipe) -> None:
    """ModelError for a folder that cannot be opened."""
    check_folder(recipe.model)
    if recipe.cross_encoder and (folder := local_folder(recipe.cross_encoder, "cross_encoder")):
        check_plain_model(folder, "cross_encoder: ")


def run(recipe: MineRecipe, placement: Placement) -> int:
    require("faiss", field="mine", extra="mine")
    check_models(recipe)
    check_files(recipe)
    with quick_imports():
        from lodestar.distributed.session import distributed_session
        from retrieval.embedding.encode import TIMEOUT_MINUTES
        from retrieval.mining.hard_negatives import mine
    with distributed_session(placement, TIMEOUT_MINUTES, recipe) as runtime:
        mine(recipe, runtime)
    return 0
