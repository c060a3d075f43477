"""A corpus into a vector database: embedded shard by shard, so that memory does not grow with the corpus.

Loads without torch until there is something to embed.
Shape suffixes: N rows of a chunk, D embedding width.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from lodestar.config.loader import recipe_of
from lodestar.distributed.runtime import Runtime, choose_device
from lodestar.errors import ConfigError, DataError, LodestarError
from lodestar.files import make_folder
from lodestar.imports import quick_imports
from retrieval.embedding.config import EncodeConfig, EncodeRecipe, OutputConfig
from retrieval.embedding.model_folder import check_folder, check_width, fingerprint
from retrieval.embedding.shards import read_embeddings, read_manifest
from retrieval.search.config import IndexRecipe
from retrieval.search.corpus import find_corpus, read_chunks
from retrieval.search.store_record import check_record, new_record, open_store, read_record


@dataclass(frozen=True)
class IndexSummary:
    rows: int
    """Of the corpus; of rows with the same id the last one is stored."""
    truncated: int
    """Texts that were longer than the model reads."""
    documents: int
    """In the table now."""


def index(
    recipe: IndexRecipe | Mapping[str, object] | str | Path, *overrides: str, progress: bool = False
) -> IndexSummary:
    """Write the corpus to the store. Repeating it changes nothing; documents that left the corpus stay.

    recipe     an object, its values, or a YAML file
    overrides  as "encode.precision=bf16"
    The work folder keeps the embeddings until the table has them all: the same call after an interruption embeds only
    what is missing. Raises ConfigError, DataError (before anything is embedded) or ModelError.
    """
    recipe = recipe_of(IndexRecipe, recipe, overrides)
    check_model(recipe)
    sources, store = find_corpus(recipe.corpus), recipe.store
    identity, record = fingerprint(recipe.model, recipe.prompts), read_record(store)
    if record is not None:
        check_record(store, record, recipe.model, identity)
    num_rows = sum(len(chunk) for chunk in read_chunks(sources, recipe.encode.shard_rows))
    if store.path is not None:
        make_folder(store.path, "store.path")
    work = make_folder(work_folder(recipe), "work")
    _embed_corpus(recipe, work)
    manifest = read_manifest(work)
    if manifest["rows"] != num_rows:
        raise DataError(f"corpus: {recipe.corpus}: has changed since it was embedded (start again)")
    record = new_record(store, recipe.model, identity, manifest["width"], recipe.prompts)
    with (
        closing(open_store(store, record)) as database,
        tqdm(total=num_rows, unit="row", disable=not progress) as bar,
    ):
        chunks = read_chunks(sources, recipe.encode.shard_rows)
        for chunk, (_, vectors_ND) in zip(chunks, _embeddings(work), strict=True):
            last_of_id = {row["id"]: i for i, row in enumerate(chunk)}
            indices = list(last_of_id.values())
            database.upsert(vectors_ND[indices], [chunk[i] for i in indices])
            bar.update(len(chunk))
        documents = database.count()
    shutil.rmtree(work)
    return IndexSummary(num_rows, manifest["truncated"], documents)


def check_model(recipe: IndexRecipe) -> None:
    """ModelError, or ConfigError for a width that the model does not have."""
    check_folder(recipe.model)
    check_width(recipe.model, recipe.encode.width, "encode.width")


def work_folder(recipe: IndexRecipe) -> Path:
    """Where the embeddings are until the table has them all."""
    return Path(recipe.work) if recipe.work else Path(recipe.store.path or "") / f"{recipe.store.table}.work"


def _embeddings(work: Path) -> Iterator[tuple[list[str], np.ndarray]]:
    """As `read_embeddings`; ConfigError where a file is damaged, which the libraries tell in many ways."""
    try:
        yield from read_embeddings(work)
    except LodestarError:
        raise
    except Exception:
        raise ConfigError(f"work: {work}: is damaged (delete it: the next run embeds again)") from None


def _embed_corpus(recipe: IndexRecipe, folder: Path) -> None:
    with quick_imports():
        from retrieval.embedding.encode import encode
    encode_recipe = EncodeRecipe(
        model=recipe.model,
        texts=[recipe.corpus],
        encode=EncodeConfig(**recipe.encode.model_dump(exclude={"width"})),
        output=OutputConfig(dir=str(folder), width=recipe.encode.width),
        prompts=recipe.prompts,
    )
    encode(encode_recipe, Runtime(0, 1, 0, choose_device(0)), verbose=False)
