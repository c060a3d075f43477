"""Which model's embeddings a table holds: a record beside the database, checked whenever the table is opened.

Loads without torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from pydantic import ValidationError

from lodestar.config.loader import Section, load
from lodestar.config.schema import Precision
from lodestar.errors import ConfigError
from lodestar.files import make_folder, write_text
from retrieval.embedding.config import Prompts
from retrieval.embedding.model_folder import fingerprint
from retrieval.search.config import IndexRecipe, StoreConfig
from retrieval.search.vector_stores import Store, StoreKind, store_class

SUFFIX = ".store.json"


class StoreRecord(Section):
    """TABLE.store.json: the model that embedded a table."""

    kind: StoreKind
    table: str
    model: str
    fingerprint: str
    dimension: int
    prompts: Prompts = {}


def record_path(store: StoreConfig) -> Path:
    return Path(store.path) / f"{store.table}{SUFFIX}"


def read_record(path: Path) -> StoreRecord | None:
    if not path.is_file():
        return None
    try:
        return StoreRecord.model_validate_json(path.read_text(encoding="utf-8"))
    except ValidationError:
        raise ConfigError(f"{path}: cannot be read (delete the table, and index again)") from None


def check_record(store: StoreConfig, model: str, dimension: int | None = None, prompts: Prompts | None = None) -> None:
    """ConfigError if the table exists and holds another model's embeddings, or vectors of another dimension."""
    path, remedy = record_path(store), "take another store.table, or delete this one"
    record = read_record(path)
    if record is None:
        return
    if record.kind != store.kind:
        raise ConfigError(f"{path}: kind: the table is {record.kind}'s, not {store.kind}'s ({remedy})")
    if dimension not in (None, record.dimension):
        raise ConfigError(
            f"{path}: dimension: the table has {record.dimension}, the model gives {dimension} ({remedy})"
        )
    if record.fingerprint != fingerprint(model, prompts):
        raise ConfigError(f"{path}: model: embedded by {record.model}, which is not {model} as it is now ({remedy})")


def open_store(store: StoreConfig, model: str, dimension: int, prompts: Prompts | None = None) -> Store:
    """The table, created if it does not exist; ConfigError if its embeddings are another model's, or have no record."""
    check_record(store, model, dimension, prompts)
    make_folder(store.path, "store.path")
    database = store_class(store.kind)(store.path, store.table, dimension)
    if not record_path(store).is_file():
        if database.count():
            database.close()
            raise ConfigError(
                f"{store.path}: table: launch/index.py did not create {store.table} (take another store.table)"
            )
        record = StoreRecord(
            kind=store.kind,
            table=store.table,
            model=str(Path(model).resolve()) if Path(model).is_dir() else model,
            fingerprint=fingerprint(model, prompts),
            dimension=dimension,
            prompts=prompts or {},
        )
        write_text(record_path(store), record.model_dump_json(indent=2) + "\n")
    return database


class IndexedTable(NamedTuple):
    """A table that can be searched."""

    store: StoreConfig
    record: StoreRecord
    model: str
    """The one that embedded the table; checked."""
    precision: Precision
    """In which queries are embedded."""


def find_table(path: str | Path, model: str | None = None) -> IndexedTable:
    """path    the folder that launch/index.py filled, or its recipe
    model   where the model is now, if it was moved
    Raises ConfigError, also if the model is not the one that embedded the documents.
    """
    precision: Precision = "fp32"
    if str(path).endswith((".yaml", ".yml")):
        recipe = load(IndexRecipe, path)
        store, precision, record = recipe.store, recipe.encode.precision, read_record(record_path(recipe.store))
        model = model or recipe.model
        if record is None:
            raise ConfigError(f"{record_path(store)}: no such index (launch/index.py --config {path} creates it)")
    else:
        store, record = _only_table(path)
        model = model or record.model
    check_record(store, model, prompts=record.prompts)
    return IndexedTable(store, record, model, precision)


def _only_table(folder: str | Path) -> tuple[StoreConfig, StoreRecord]:
    paths = sorted(Path(folder).glob(f"*{SUFFIX}"))
    if len(paths) != 1:
        problem = (
            f"holds {len(paths)} tables (name the recipe)" if paths else "holds no index (launch/index.py creates one)"
        )
        raise ConfigError(f"{folder}: {problem}")
    record = read_record(paths[0])
    assert record is not None
    return StoreConfig(kind=record.kind, path=str(folder), table=record.table), record
