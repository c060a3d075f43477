"""Which model's embeddings a table holds: a record, checked whenever the table is opened.

A folder has it in a file beside the database, a server in the database itself, where other machines find it too.
Loads without torch.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from pydantic import ValidationError

from lodestar.config.loader import Section, recipe_of
from lodestar.config.schema import Count, Precision
from lodestar.distributed.runtime import local_environment
from lodestar.errors import ConfigError
from lodestar.files import NO_SUCH_FILE, file_problem, make_folder, write_text
from retrieval.embedding.config import Prompts
from retrieval.embedding.model_folder import check_folder, fingerprint
from retrieval.search.checked_store import CheckedStore
from retrieval.search.config import IndexRecipe, StoreConfig
from retrieval.search.vector_stores import STORES, Location, StoreKind

SUFFIX = ".store.json"


class StoreRecord(Section):
    """The model that embedded a table."""

    kind: StoreKind
    table: str
    model: str
    fingerprint: str
    dimension: Count
    prompts: Prompts = {}


def new_record(
    store: StoreConfig, model: str, identity: str, dimension: int, prompts: Prompts | None = None
) -> StoreRecord:
    """identity   the model's fingerprint, with these prompts"""
    return StoreRecord(
        kind=store.kind,
        table=store.table,
        model=str(Path(model).resolve()) if Path(model).is_dir() else model,
        fingerprint=identity,
        dimension=dimension,
        prompts=prompts or {},
    )


def read_record(store: StoreConfig) -> StoreRecord | None:
    """None if the table does not exist; ConfigError also for a server that cannot be reached."""
    if store.path is not None:
        if os.path.lexists(store.path) and not Path(store.path).is_dir():
            raise ConfigError(f"store.path: {store.path}: is no folder (name another folder)")
        return _read_file(_record_path(store))
    text = CheckedStore.read_record(store.kind, _locate(store), store.table)
    return None if text is None else _parse(text, store.table, _name(store))


def _read_file(path: Path) -> StoreRecord | None:
    problem = file_problem(path)
    if problem == NO_SUCH_FILE:
        return None
    try:
        text = path.read_text(encoding="utf-8") if problem is None else ""
    except (OSError, UnicodeDecodeError):
        text = ""
    return _parse(text, path.name.removesuffix(SUFFIX), str(path))


def _parse(text: str, table: str, name: str) -> StoreRecord:
    try:
        record = StoreRecord.model_validate_json(text)
    except ValidationError:
        record = None
    if record is None or record.table != table:
        raise ConfigError(f"{name}: cannot be read (delete the table, and index again)")
    return record


def check_record(
    store: StoreConfig, record: StoreRecord, model: str, identity: str, dimension: int | None = None
) -> None:
    """ConfigError if the table holds another model's embeddings, or vectors of another dimension.

    identity   the model's fingerprint, with the prompts that are used
    """
    name, remedy = _name(store), "take another store.table, or delete this one"
    if record.kind != store.kind:
        raise ConfigError(f"{name}: kind: the table is {record.kind}'s, not {store.kind}'s ({remedy})")
    if dimension not in (None, record.dimension):
        raise ConfigError(
            f"{name}: dimension: the table has {record.dimension}, the model gives {dimension} ({remedy})"
        )
    if record.fingerprint != identity:
        raise ConfigError(f"{name}: model: embedded by {record.model}, which is not {model} as it is now ({remedy})")


def open_store(store: StoreConfig, record: StoreRecord) -> CheckedStore:
    """The table, created with this record if it does not exist; ConfigError if it has another one, or rows and none."""
    existing = read_record(store)
    if existing is not None:
        check_record(store, existing, record.model, record.fingerprint, record.dimension)
    if store.path is not None:
        make_folder(store.path, "store.path")
    database = CheckedStore(store.kind, _locate(store), store.table, record.dimension)
    if existing is None:
        if database.count():
            database.close()
            raise ConfigError(f"{store.place}: table: lodestar did not create {store.table} (take another store.table)")
        text = record.model_dump_json(indent=2) + "\n"
        if store.path is None:
            database.write_record(text)
        else:
            write_text(_record_path(store), text)
    return database


def _locate(store: StoreConfig) -> Location:
    if store.path is not None:
        return Location(store.place, path=store.path)
    url = store.url or _environment(store.url_env, "store.url_env")
    schemes = [f"{scheme}://" for scheme in STORES[store.kind].schemes]
    if not url.startswith(tuple(schemes)):
        raise ConfigError(f"store.url_env: {store.url_env}: must begin with {' or '.join(schemes)}")
    api_key = _environment(store.api_key_env, "store.api_key_env") if store.api_key_env else None
    return Location(store.place, url=url, api_key=api_key)


def _environment(name: str | None, field: str) -> str:
    if value := local_environment().get(name or ""):
        return value
    raise ConfigError(f"{field}: {name}: not set in the environment (export it)")


def _record_path(store: StoreConfig) -> Path:
    return Path(store.path or "") / f"{store.table}{SUFFIX}"


def _name(store: StoreConfig) -> str:
    """Of the record, for messages."""
    return f"{store.place}: {store.table}" if store.path is None else str(_record_path(store))


class IndexedTable(NamedTuple):
    """A table that can be searched."""

    store: StoreConfig
    record: StoreRecord
    model: str
    """The one that embedded the table; checked."""
    precision: Precision
    """In which queries are embedded."""


def find_table(source: IndexRecipe | Mapping[str, object] | str | Path, model: str | None = None) -> IndexedTable:
    """source  the folder that `lodestar index` filled, or its recipe: a YAML file, values or an object
    model   where the model is now, if it was moved
    Raises ConfigError, also if the model is not the one that embedded the documents.
    """
    precision: Precision = "fp32"
    if isinstance(source, str | Path) and not str(source).endswith((".yaml", ".yml")):
        store, record = _only_table(source)
        model = model or record.model
    else:
        recipe = recipe_of(IndexRecipe, source)
        store, precision, record = recipe.store, recipe.encode.precision, read_record(recipe.store)
        model = model or recipe.model
        if record is None:
            raise ConfigError(f"{_name(store)}: no such index (lodestar index creates it from the recipe)")
    check_folder(model)
    check_record(store, record, model, fingerprint(model, record.prompts))
    return IndexedTable(store, record, model, precision)


def _only_table(folder: str | Path) -> tuple[StoreConfig, StoreRecord]:
    paths = sorted(Path(folder).glob(f"*{SUFFIX}"))
    if len(paths) != 1:
        problem = f"{len(paths)} tables (name the recipe)" if paths else "no index (lodestar index creates one)"
        raise ConfigError(f"{folder}: holds {problem}")
    record = _read_file(paths[0])
    assert record is not None, "it was listed"
    return StoreConfig(kind=record.kind, path=str(folder), table=record.table), record
