"""A corpus into a vector database: embedded shard by shard, so that memory does not grow with the corpus."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from lodestar.cli import entry_point
from lodestar.config.loader import Section
from lodestar.config.schema import Count
from lodestar.data.readers import Source, count_rows, find_sources, read_rows
from lodestar.distributed.runtime import Placement
from lodestar.errors import DataError, LaunchError
from lodestar.files import make_folder
from lodestar.planning.plan import PlanWarnings
from retrieval.embedding.config import EncodeConfig as Encode
from retrieval.embedding.config import EncodeRecipe, Prompts
from retrieval.embedding.config import OutputConfig as Output
from retrieval.embedding.shards import read_embeddings, read_manifest
from retrieval.search.vector_stores import Row, StoreSection, check, open_store, read_record, record_path

FIELD = re.compile(r"[A-Za-z][A-Za-z0-9_]*")


class IndexEncode(Encode):
    width: Count | None = None
    """The first so many dimensions, normalised again (Matryoshka); none: all."""


class IndexRecipe(Section):
    """A corpus, the model that embeds it, and the table it goes to."""

    model: str
    """A folder (or hub name) in sentence-transformers' format."""
    corpus: str
    """A BEIR folder, or files of rows with _id or id, text, and maybe title and metadata."""
    store: StoreSection
    encode: IndexEncode = IndexEncode()
    prompts: Prompts = {}


@dataclass(frozen=True)
class Indexed:
    rows: int
    """Of the corpus; of those with the same id the last one stays."""
    truncated: int
    """Texts that were longer than the model reads."""
    documents: int
    """In the table now."""


def index(recipe: IndexRecipe, *, progress: bool = False) -> Indexed:
    """Put the corpus into the store. To do so again changes nothing; documents that left the corpus stay.

    Embeddings lie in TABLE.work beside the table until all is put: the same call after an interruption makes the rest.
    Raises ConfigError, DataError or ModelError.
    """
    sources, section = find_corpus(recipe.corpus), recipe.store
    check(section, recipe.model, prompts=recipe.prompts)  # before a model is loaded
    rows = sum(len(chunk) for chunk in _chunks(sources, recipe.encode.shard_rows))  # and each row

    from tqdm import tqdm

    from lodestar.distributed.runtime import Runtime, choose_device
    from retrieval.embedding.encode import encode

    work = make_folder(section.path, "store.path") / f"{section.table}.work"
    output = Output(dir=str(work), width=recipe.encode.width)
    how = Encode(**recipe.encode.model_dump(exclude={"width"}))
    made = EncodeRecipe(model=recipe.model, texts=[recipe.corpus], encode=how, output=output, prompts=recipe.prompts)
    encode(made, Runtime(0, 1, 0, choose_device(0)), tells=False)
    facts = read_manifest(work)
    with (
        closing(open_store(section, recipe.model, facts["width"], recipe.prompts)) as store,
        tqdm(total=rows, unit="row", disable=not progress) as bar,
    ):
        chunks = _chunks(sources, recipe.encode.shard_rows)
        for chunk, (_, vectors_ND) in zip(chunks, read_embeddings(work), strict=True):
            last = {row["id"]: i for i, row in enumerate(chunk)}  # of rows with the same id
            store.upsert(vectors_ND[list(last.values())], [chunk[i] for i in last.values()])
            bar.update(len(chunk))
        documents = store.count()
    shutil.rmtree(work)
    return Indexed(rows, facts["truncated"], documents)


# --- the corpus ------------------------------------------------------------------------------


def find_corpus(corpus: str) -> list[Source]:
    """`corpus.jsonl[.gz]` of a BEIR folder, or any files of rows."""
    beir = [path for name in ("corpus.jsonl", "corpus.jsonl.gz") if (path := Path(corpus) / name).is_file()]
    return find_sources([str(beir[0]) if beir else corpus], "corpus")


def _chunks(sources: Sequence[Source], size: int) -> Iterator[list[Row]]:
    """Runs of `size` rows."""
    found = (as_row(where, row) for source in sources for where, row in read_rows(source))
    while chunk := list(islice(found, size)):
        yield chunk


def as_row(where: str, row: Mapping[str, Any]) -> Row:
    """`id`, `title`, `text`, and what else the row or its `metadata` holds, as text; DataError for what cannot be."""
    found = dict(row)
    if isinstance(metadata := found.get("metadata"), dict):
        del found["metadata"]
        found = metadata | found
    name = "_id" if "_id" in found else "id"
    if not isinstance(document := found.pop(name, None), str | int):
        raise DataError(f"{where}: {name}: must be text or a whole number, and is not (give each row an id)")
    if not isinstance(found.get("text"), str):
        raise DataError(f"{where}: text: must be text, and is not (each row has one)")
    for field in found:
        if not FIELD.fullmatch(field) or field in ("id", "vector"):
            raise DataError(f"{where}: {field}: not a name for metadata (letters, digits and _, not id or vector)")
    kept = {key: as_text(value) for key, value in found.items() if value is not None}
    return {"title": "", **kept, "id": str(document)}


def as_text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


# --- the command -----------------------------------------------------------------------------


def plan(recipe: IndexRecipe, world_size: int, device: str | None = None) -> dict[str, Any]:
    missing = PlanWarnings([])
    rows = missing.or_default(None, lambda: count_rows(find_corpus(recipe.corpus)), "rows are not known")
    check(recipe.store, recipe.model, prompts=recipe.prompts)
    record = read_record(record_path(recipe.store))
    return {
        "world_size": world_size,
        "model": recipe.model,
        "corpus": recipe.corpus,
        "rows": rows,
        "chunks": None if rows is None else -(-rows // recipe.encode.shard_rows),
        "store": f"{recipe.store.kind}, {recipe.store.path}, {recipe.store.table}",
        "state": "there: rows of the same id are replaced" if record else "new",
        "missing": missing.lines,
    }


def run(recipe: IndexRecipe, placement: Placement) -> int:
    if placement.world_size > 1:
        raise LaunchError(
            "launcher: one process writes to a database (start with python; encode.devices takes several)"
        )
    found = index(recipe, progress=sys.stderr.isatty())
    print(
        f"{found.documents:,} documents in {recipe.store.kind}, {recipe.store.path}, {recipe.store.table} "
        f"({found.rows:,} rows embedded, {found.truncated:,} texts cut)"
    )
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return entry_point(argv, usage="Put a corpus into a vector database.", schema=IndexRecipe, plan=plan, run=run)
