"""Vector databases behind one small protocol, thin over their clients; each is a local folder, none needs a server.

Scores are dot products (cosines, where the model normalises), and the search is exact until the user builds an
approximate index with the database's own tools. Loads without torch and without the clients.

Shape suffixes: N documents, D embedding width.
"""

from __future__ import annotations

import importlib
import json
import sqlite3
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, Protocol

from pydantic import Field, ValidationError

from lodestar.config.loader import Section
from lodestar.errors import ConfigError
from lodestar.files import make_folder, replacing_file, write_text
from retrieval.embedding.config import Prompts
from retrieval.embedding.model_folder import fingerprint

if TYPE_CHECKING:
    import numpy as np

Row = Mapping[str, str]
"""`id`, `title`, `text` and metadata, all of it text; fields are letters, digits and _."""
RECORD = ".store.json"


class StoreSection(Section):
    kind: Literal["lancedb", "qdrant", "faiss"]
    path: str
    """The database's folder; made where there is none."""
    table: Annotated[str, Field(pattern=r"^\w[\w-]*$")] = "documents"
    """Called a collection by Qdrant."""


class Record(Section):
    """TABLE.store.json beside the database: whose embeddings a table holds."""

    kind: Literal["lancedb", "qdrant", "faiss"]
    table: str
    model: str
    fingerprint: str
    dimension: int
    prompts: Prompts = {}


class SearchHit(NamedTuple):
    score: float
    row: Row


class Store(Protocol):
    def upsert(self, vectors_ND: np.ndarray, rows: Sequence[Row]) -> None:
        """Rows that are there by their id are replaced; ids within `rows` differ."""
        ...

    def search(self, vector_D: np.ndarray, k: int, where: Mapping[str, str]) -> list[SearchHit]:
        """The k best rows, best first, among those whose fields equal all of `where`."""
        ...

    def count(self) -> int: ...

    def close(self) -> None:
        """Only what was upserted before a close is there for sure."""
        ...


# --- which model -----------------------------------------------------------------------------


def record_path(section: StoreSection) -> Path:
    return Path(section.path) / f"{section.table}{RECORD}"


def read_record(path: Path) -> Record | None:
    if not path.is_file():
        return None
    try:
        return Record.model_validate_json(path.read_text(encoding="utf-8"))
    except ValidationError:
        raise ConfigError(f"{path}: cannot be read (delete the table, and index again)") from None


def check(section: StoreSection, model: str, dimension: int | None = None, prompts: Prompts | None = None) -> None:
    """ConfigError where the table holds another model's embeddings, or vectors of another dimension."""
    path, way_out = record_path(section), "take another store.table, or delete this one"
    record = read_record(path)
    if record is None:
        return
    if record.kind != section.kind:
        raise ConfigError(f"{path}: kind: the table is {record.kind}'s, not {section.kind}'s ({way_out})")
    if dimension not in (None, record.dimension):
        raise ConfigError(
            f"{path}: dimension: the table has {record.dimension}, the model gives {dimension} ({way_out})"
        )
    if record.fingerprint != fingerprint(model, prompts):
        raise ConfigError(f"{path}: model: embedded by {record.model}, which is not {model} as it is now ({way_out})")


def locate(folder: str | Path) -> tuple[StoreSection, Record]:
    """The one table that was indexed into a folder."""
    paths = sorted(Path(folder).glob(f"*{RECORD}"))
    if len(paths) != 1:
        what = f"holds {len(paths)} tables (name the recipe)" if paths else "holds no index (launch/index.py makes one)"
        raise ConfigError(f"{folder}: {what}")
    record = read_record(paths[0])
    assert record is not None
    return StoreSection(kind=record.kind, path=str(folder), table=record.table), record


def open_store(section: StoreSection, model: str, dimension: int, prompts: Prompts | None = None) -> Store:
    """The table, made where there is none; ConfigError where it holds another model's embeddings, or unknown ones."""
    check(section, model, dimension, prompts)
    make_folder(section.path, "store.path")
    classes = {"lancedb": LanceStore, "qdrant": QdrantStore, "faiss": FaissStore}
    store = classes[section.kind](section.path, section.table, dimension)
    if not record_path(section).is_file():
        if store.count():
            store.close()
            raise ConfigError(
                f"{section.path}: table: {section.table} is not launch/index.py's (take another store.table)"
            )
        name = str(Path(model).resolve()) if Path(model).is_dir() else model
        record = Record(
            kind=section.kind,
            table=section.table,
            model=name,
            fingerprint=fingerprint(model, prompts),
            dimension=dimension,
            prompts=prompts or {},
        )
        write_text(record_path(section), record.model_dump_json(indent=2) + "\n")
    return store


def _client(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ConfigError(f"store.kind: {error.name} is missing (install lodestar-embeddings[databases])") from None


# --- the three -------------------------------------------------------------------------------


class LanceStore:
    """A LanceDB table with a column for each field."""

    def __init__(self, path: str, table: str, dimension: int) -> None:
        self._pa = _client("pyarrow")
        text, vector = self._pa.string(), self._pa.list_(self._pa.float32(), dimension)
        schema = self._pa.schema([("id", text), ("vector", vector), ("title", text), ("text", text)])
        database = _client("lancedb").connect(path)
        there = table in database.list_tables(limit=1_000_000).tables
        self._table = database.open_table(table) if there else database.create_table(table, schema=schema)
        self._changed = False

    def upsert(self, vectors_ND: np.ndarray, rows: Sequence[Row]) -> None:
        self._changed = True
        known = {name for row in rows for name in row} - set(self._table.schema.names)
        if known:
            self._table.add_columns([self._pa.field(name, self._pa.string()) for name in sorted(known)])
        filled = [{**row, "vector": vector_D} for row, vector_D in zip(rows, vectors_ND, strict=True)]
        arrow = self._pa.Table.from_pylist(filled, schema=self._table.schema)
        self._table.merge_insert("id").when_matched_update_all().when_not_matched_insert_all().execute(arrow)

    def search(self, vector_D: np.ndarray, k: int, where: Mapping[str, str]) -> list[SearchHit]:
        names = set(self._table.schema.names) - {"vector"}
        if where.keys() - names:
            return []
        query = self._table.search(vector_D).distance_type("dot").select([*names, "_distance"]).limit(k)
        if where:
            quoted = {name: value.replace("'", "''") for name, value in where.items()}
            query = query.where(" AND ".join(f"`{name}` = '{value}'" for name, value in quoted.items()), prefilter=True)
        found = [{name: value for name, value in row.items() if value is not None} for row in query.to_list()]
        return [SearchHit(1 - row.pop("_distance"), row) for row in found]

    def count(self) -> int:
        return self._table.count_rows()

    def close(self) -> None:
        if self._changed:
            self._table.optimize()  # one fragment for each upsert otherwise


class QdrantStore:
    """A Qdrant collection whose points carry the row as payload."""

    def __init__(self, path: str, table: str, dimension: int) -> None:
        self._qdrant, self._name = _client("qdrant_client"), table
        try:
            self._open = self._qdrant.QdrantClient(path=path)
        except RuntimeError:
            raise ConfigError(f"{path}: another process has the database open (end it, or wait)") from None
        if not self._open.collection_exists(table):
            models = self._qdrant.models
            self._open.create_collection(table, models.VectorParams(size=dimension, distance=models.Distance.DOT))

    def upsert(self, vectors_ND: np.ndarray, rows: Sequence[Row]) -> None:
        ids = [str(uuid.uuid5(uuid.NAMESPACE_OID, row["id"])) for row in rows]  # Qdrant takes no other text as id
        batch = self._qdrant.models.Batch(ids=ids, vectors=vectors_ND.tolist(), payloads=[dict(row) for row in rows])
        self._open.upsert(self._name, batch)

    def search(self, vector_D: np.ndarray, k: int, where: Mapping[str, str]) -> list[SearchHit]:
        models = self._qdrant.models
        equal = [models.FieldCondition(key=name, match=models.MatchValue(value=value)) for name, value in where.items()]
        found = self._open.query_points(
            self._name, vector_D.tolist(), limit=k, query_filter=models.Filter(must=equal) if equal else None
        )
        return [SearchHit(point.score, point.payload) for point in found.points]

    def count(self) -> int:
        return self._open.count(self._name).count

    def close(self) -> None:
        self._open.close()


class FaissStore:
    """TABLE.faiss, exact inner products; TABLE.sqlite, the rows. `close` writes both."""

    def __init__(self, path: str, table: str, dimension: int) -> None:
        self._faiss, self._np = _client("faiss"), _client("numpy")
        self._path = Path(path) / f"{table}.faiss"
        self._rows = sqlite3.connect(self._path.with_suffix(".sqlite"))
        self._rows.execute("CREATE TABLE IF NOT EXISTS rows (number INTEGER PRIMARY KEY, id TEXT UNIQUE, row TEXT)")
        if self._path.is_file():
            self._index = self._faiss.read_index(str(self._path))
            there = self._faiss.IDSelectorBatch(self._numbers("SELECT number FROM rows"))
            self._index.remove_ids(self._faiss.IDSelectorNot(there))  # a close that was killed between its two files
        else:
            self._index = self._faiss.IndexIDMap2(self._faiss.IndexFlatIP(dimension))
        self._changed = False

    def upsert(self, vectors_ND: np.ndarray, rows: Sequence[Row]) -> None:
        self._changed = True
        put = """INSERT INTO rows (id, row) VALUES (?, ?)
                 ON CONFLICT (id) DO UPDATE SET row = excluded.row RETURNING number"""
        numbers = [
            self._rows.execute(put, (row["id"], json.dumps(dict(row), ensure_ascii=False))).fetchone()[0]
            for row in rows
        ]
        numbers_N = self._np.array(numbers, self._np.int64)
        self._index.remove_ids(numbers_N)
        self._index.add_with_ids(self._np.ascontiguousarray(vectors_ND, self._np.float32), numbers_N)

    def search(self, vector_D: np.ndarray, k: int, where: Mapping[str, str]) -> list[SearchHit]:
        params = None
        if where:
            equal = " AND ".join(f"json_extract(row, '$.{name}') = ?" for name in where)
            numbers_N = self._numbers(f"SELECT number FROM rows WHERE {equal}", *where.values())
            params = self._faiss.SearchParameters(sel=self._faiss.IDSelectorBatch(numbers_N))
        scores_K, numbers_K = (x[0].tolist() for x in self._index.search(vector_D[None], k, params=params))
        get = "SELECT row FROM rows WHERE number = ?"
        return [
            SearchHit(score, json.loads(self._rows.execute(get, (number,)).fetchone()[0]))
            for score, number in zip(scores_K, numbers_K, strict=True)
            if number >= 0  # -1: there are fewer than k
        ]

    def count(self) -> int:
        return self._rows.execute("SELECT count(*) FROM rows").fetchone()[0]

    def close(self) -> None:
        if self._changed:
            with replacing_file(self._path) as tmp:
                self._faiss.write_index(self._index, str(tmp))
            self._rows.commit()  # last: rows without a vector would never be found
        self._rows.close()

    def _numbers(self, select: str, *values: str) -> np.ndarray:
        return self._np.array([number for (number,) in self._rows.execute(select, values)], self._np.int64)
