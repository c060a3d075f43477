"""The command that embeds a corpus: python | torchrun launch/encode.py --config FILE [KEY=VALUE ...]."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lodestar.cli import entry_point
from lodestar.data.readers import count_rows, find_sources
from lodestar.distributed.runtime import Placement
from lodestar.imports import quick_imports
from lodestar.models.folder_checks import embedding_width
from lodestar.planning.plan import PlanWarnings
from retrieval.embedding.config import EncodeRecipe
from retrieval.embedding.corpus import files_of
from retrieval.embedding.model_folder import check_folder, check_width

BYTES_PER_DIMENSION = {"float32": 4.0, "float16": 2.0, "int8": 1.0, "binary": 1 / 8}


def main(argv: Sequence[str] | None = None) -> int:
    return entry_point(argv, usage="Embed a corpus with a trained model.", schema=EncodeRecipe, plan=plan, run=run)


def plan(recipe: EncodeRecipe, world_size: int, device: str | None = None) -> dict[str, object]:
    """What `--plan` prints."""
    missing = PlanWarnings()
    rows = missing.or_default(None, lambda: count_rows(find_sources(files_of(recipe), "texts")), "rows are not known")
    missing.or_default(None, lambda: check_model(recipe), "it cannot be opened")
    width = recipe.output.width
    if width is None and not missing.lines and Path(recipe.model).is_dir():
        width = embedding_width(Path(recipe.model))
    facts: dict[str, object] = {
        "model": recipe.model,
        "output_dir": recipe.output.dir,
        "world_size": world_size,
        "devices": ", ".join(recipe.encode.devices or ["all that each rank sees"]),
        "rows": rows,
        "shards": None if rows is None else -(-rows // recipe.encode.shard_rows),
        "width": width,
    }
    if rows is not None and width is not None:
        facts["output_bytes"] = int(rows * width * BYTES_PER_DIMENSION[recipe.output.dtype])
    return facts | {"missing": missing.lines}


def check_model(recipe: EncodeRecipe) -> None:
    """ModelError, or ConfigError for a width that the model does not have."""
    check_folder(recipe.model)
    check_width(recipe.model, recipe.output.width, "output.width")


def run(recipe: EncodeRecipe, placement: Placement) -> int:
    check_model(recipe)
    with quick_imports():
        from lodestar.distributed.session import distributed_session
        from retrieval.embedding.encode import TIMEOUT_MINUTES, encode
    with distributed_session(placement, TIMEOUT_MINUTES, recipe) as runtime:
        encode(recipe, runtime)
    return 0
