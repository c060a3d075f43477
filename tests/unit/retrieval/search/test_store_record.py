"""The record of a table, in a folder or on a server; where a database is; secrets stay secret."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from lodestar.config.loader import load, recipe_of
from lodestar.errors import ConfigError
from retrieval.search import index as index_module
from retrieval.search import store_record
from retrieval.search.cli import index_main, search_main
from retrieval.search.config import IndexRecipe, StoreConfig
from retrieval.search.index import index
from retrieval.search.search import open_searcher
from retrieval.search.store_record import StoreRecord, new_record, open_store, read_record

VECTORS = np.eye(2, dtype=np.float32)
ROWS = [{"id": str(i), "title": "", "text": "x"} for i in range(2)]


def record_of(store: StoreConfig) -> StoreRecord:
    return new_record(store, "a-hub/name", "an identity", 2, {"query": "ask: "})


def in_database(store: StoreConfig, statement: str) -> None:
    """By the database's own client: `record` loses the record, `table` the table."""
    if store.kind == "qdrant":
        from qdrant_client import QdrantClient

        client = QdrantClient(url=store.url, api_key=os.environ["QDRANT_API_KEY"], check_compatibility=False)
        if statement == "record":
            client.update_collection("documents", metadata={"lodestar": None})
        else:
            client.delete_collection("documents")
    else:
        import psycopg

        with psycopg.connect(store.url or os.environ["DATABASE_URL"]) as connection:
            connection.execute("DELETE FROM lodestar_tables" if statement == "record" else "DROP TABLE documents")


def test_a_record_is_read_back_and_a_table_without_one_is_left_alone(store: StoreConfig) -> None:
    assert read_record(store) is None
    with closing(open_store(store, record_of(store))) as database:
        database.upsert(VECTORS, ROWS)
    assert read_record(store) == record_of(store)
    for change, complaint in (
        (
            {"fingerprint": "another"},
            r"documents.*: model: embedded by a-hub/name, which is not a-hub/name as it is now",
        ),
        ({"dimension": 3}, r"documents.*: dimension: the table has 2, the model gives 3 \(take another store.table"),
    ):
        with pytest.raises(ConfigError, match=complaint):
            open_store(store, record_of(store).model_copy(update=change))
    if store.path is None:
        in_database(store, "record")
    else:
        Path(store.path, "documents.store.json").unlink()
    with pytest.raises(ConfigError, match=r"table: lodestar did not create documents \(take another"):
        open_store(store, record_of(store))
    assert read_record(store) is None


def test_a_table_that_was_deleted_on_a_server_is_new(store: StoreConfig) -> None:
    if store.path is not None:
        pytest.skip("a folder is deleted as a whole")
    open_store(store, record_of(store)).close()
    in_database(store, "table")
    assert read_record(store) is None
    with closing(open_store(store, record_of(store).model_copy(update={"fingerprint": "another"}))) as database:
        assert database.count() == 0


def test_opening_an_index_hashes_the_model_once(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []
    real_fingerprint = store_record.fingerprint

    def fingerprint(model: str, *args: object) -> str:
        hashed.append(model)
        return real_fingerprint(model, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(store_record, "fingerprint", fingerprint)
    monkeypatch.setattr(index_module, "fingerprint", fingerprint)
    for _ in range(2):
        index(recipe)
        assert len(hashed) == 1
        hashed.clear()
    with open_searcher(recipe):
        assert len(hashed) == 1


# --- where a database is ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("store", "complaint"),
    [
        ("kind: qdrant", "store: qdrant needs exactly one of path and url, got none"),
        (
            "kind: qdrant, path: db, url: 'http://h:6333'",
            "store: qdrant needs exactly one of path and url, got path and",
        ),
        ("kind: faiss, url: 'http://h'", "store: faiss needs path, got url"),
        ("kind: pgvector, path: db", "store: pgvector needs exactly one of url and url_env, got path"),
        ("kind: pgvector, url: 'http://h'", "store.url: must begin with postgresql:// or postgres://"),
        ("kind: qdrant, url: 'h:6333'", "store.url: must begin with http:// or https://"),
        ("kind: lancedb, path: 's3://bucket'", "store.path: must be a folder, not a URL"),
        ("kind: qdrant, path: db, api_key_env: KEY", "store.api_key_env: only a server by url that takes an API key"),
        (
            "kind: pgvector, url_env: X, api_key_env: KEY",
            "store.api_key_env: only a server by url that takes an API key",
        ),
        (
            "kind: pgvector, url: 'postgresql://me:hunter2@h/db'",
            "store.url: holds a secret (take it out, and name an environment variable: url_env)",
        ),
        ("kind: pgvector, url: 'postgresql://me:hun/ter2@h/db'", "store.url: holds a secret"),
        ("kind: pgvector, url: 'postgresql:///db?password=hunter2'", "store.url: holds a secret"),
        ("kind: qdrant, url: 'https://me:hunter2@h'", "(take it out, and name an environment variable: api_key_env)"),
        (
            "kind: pgvector, url_env: 'postgresql://me:hunter2@h/db'",
            "store.url_env: must be the name of an environment variable, as DATABASE_URL",
        ),
        (
            "kind: qdrant, url: 'http://h', api_key_env: hunter-2",
            "store.api_key_env: must be the name of an environment",
        ),
    ],
)
def test_a_place_that_cannot_be_is_told_without_its_secret(store: str, complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "index.yaml"
    path.write_text(f"model: m\ncorpus: c.jsonl\nstore: {{{store}}}\n")
    with pytest.raises(ConfigError) as caught:
        load(IndexRecipe, path)
    message = str(caught.value)
    assert message.startswith(f"{path}:3: store") and complaint in message and "\n" not in message
    assert "hunter" not in message


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        ("", "store.url_env: DATABASE_URL: not set in the environment (export it)"),
        ("mysql://me:hunter2@h/db", "store.url_env: DATABASE_URL: must begin with postgresql:// or postgres://"),
        ("postgresql://me:hunter2:x@h/db", "$DATABASE_URL: not postgresql://USER:PASSWORD@HOST"),
        ("postgresql://me:hun/ter2@h/db", "$DATABASE_URL: not postgresql://USER:PASSWORD@HOST"),
        ("postgresql://me:hunter@2@h/db", "$DATABASE_URL: not postgresql://USER:PASSWORD@HOST"),
        ("postgresql://me:hunter%2@h/db", "$DATABASE_URL: not postgresql://USER:PASSWORD@HOST"),
        ("postgresql://me:hunter2@/db?hst=x", "$DATABASE_URL: not postgresql://USER:PASSWORD@HOST"),
        ("postgresql://me:hunter2@/db?host=/absent", "$DATABASE_URL: connection"),
    ],
)
def test_a_url_that_cannot_be_is_told_without_its_secret(
    url: str, complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("psycopg", reason="an optional library: lodestar-embeddings[databases]")
    monkeypatch.setenv("DATABASE_URL", url)
    with pytest.raises(ConfigError) as caught:
        read_record(StoreConfig(kind="pgvector", url_env="DATABASE_URL"))
    message = str(caught.value)
    assert message.startswith(complaint) and "hunter" not in message and "\n" not in message


def test_an_object_in_python_hides_the_secret_too() -> None:
    with pytest.raises(ValueError, match="holds a secret") as caught:
        StoreConfig(kind="pgvector", url="postgresql://me:hunter2@h/db")
    assert "hunter" not in str(caught.value)
    values = {"model": "m", "corpus": "c", "store": {"kind": "pgvector", "url": "postgresql://me:hunter2@h/db"}}
    with pytest.raises(ConfigError, match=r"^recipe: store.url: holds a secret") as caught:
        recipe_of(IndexRecipe, values)
    assert "hunter" not in str(caught.value)


# --- servers ---------------------------------------------------------------------------------


@pytest.fixture
def guarded_url(database_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """DATABASE_URL becomes that of a user with a password and few rights; the administrator's is returned."""
    import psycopg
    from psycopg import sql

    with psycopg.connect(database_url) as connection:
        connection.execute(sql.SQL("CREATE ROLE guarded LOGIN PASSWORD {}").format(sql.Literal("hunter@2")))
    monkeypatch.setenv("DATABASE_URL", database_url.replace("postgres@", "guarded:hunter%402@"))
    yield database_url
    with psycopg.connect(database_url) as connection:
        connection.execute("DROP OWNED BY guarded")
        connection.execute("DROP ROLE guarded")


def test_a_password_is_used_and_shown_nowhere(
    guarded_url: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import psycopg

    with psycopg.connect(guarded_url) as administrator:
        administrator.execute("CREATE EXTENSION vector")
        administrator.execute("GRANT CREATE ON SCHEMA public TO guarded")
    corpus, recipe = tmp_path / "corpus.jsonl", tmp_path / "index.yaml"
    corpus.write_text('{"id": "1", "text": "a mask"}\n')
    store = {"kind": "pgvector", "url_env": "DATABASE_URL"}
    recipe.write_text(json.dumps({"model": str(model), "corpus": str(corpus), "store": store}))
    monkeypatch.chdir(tmp_path)  # the work folder
    for main, options in (
        (index_main, ["--config", str(recipe), "--plan"]),
        (index_main, ["--config", str(recipe)]),
        (search_main, ["--store", str(recipe), "--plan"]),
        (search_main, ["--store", str(recipe), "a mask"]),
    ):
        assert main(options) == 0
    output = "".join(capsys.readouterr())
    assert "pgvector, $DATABASE_URL, documents" in output and "hunter" not in output
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("documents")] == []
    with psycopg.connect(guarded_url) as administrator:
        records = administrator.execute("SELECT name, record FROM lodestar_tables").fetchall()
        assert [name for name, _ in records] == ["documents"] and "hunter" not in str(records)
        administrator.execute("ALTER ROLE guarded PASSWORD 'another'")
    assert search_main(["--store", str(recipe), "a mask"]) == 2
    message = capsys.readouterr().err
    assert "password authentication failed" in message and "hunter" not in message and message.count("\n") == 1


def test_a_user_who_may_only_read_can_search(guarded_url: str) -> None:
    import psycopg

    config = StoreConfig(kind="pgvector", url=guarded_url)
    with closing(open_store(config, record_of(config))) as store:
        store.upsert(VECTORS, ROWS)
    with psycopg.connect(guarded_url) as administrator:
        administrator.execute("GRANT SELECT ON documents, lodestar_tables TO guarded")
    config = StoreConfig(kind="pgvector", url_env="DATABASE_URL")
    with closing(open_store(config, record_of(config))) as store:
        assert [hit.row["id"] for hit in store.search(VECTORS[1], 1, {})] == ["1"]
        with pytest.raises(ConfigError, match=r"^\$DATABASE_URL: permission denied for table documents \(check"):
            store.upsert(VECTORS, ROWS)


def test_an_extension_that_cannot_be_created_is_told_in_one_line(guarded_url: str) -> None:
    config = StoreConfig(kind="pgvector", url_env="DATABASE_URL")
    with pytest.raises(ConfigError) as caught:
        open_store(config, record_of(config))
    message = str(caught.value)
    assert message.startswith('$DATABASE_URL: permission denied to create extension "vector" (install pgvector there')
    assert "\n" not in message


def test_a_wrong_key_or_no_server_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("qdrant_client", reason="an optional library: lodestar-embeddings[databases]")
    from tests.databases.qdrant_rest import running_qdrant

    monkeypatch.setenv("KEY", "hunter2")
    with running_qdrant("another") as url:
        config = StoreConfig(kind="qdrant", url=url, api_key_env="KEY")
        with pytest.raises(ConfigError, match=rf"^{url}: Unexpected Response: 401 \(Unauthorized\)") as caught:
            open_store(config, record_of(config))
        assert "hunter" not in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=rf"^{url}: .*refused \(check the URL"):
        read_record(StoreConfig(kind="qdrant", url=url))
    monkeypatch.delenv("KEY")
    with pytest.raises(ConfigError, match=r"^store.api_key_env: KEY: not set in the environment"):
        read_record(config)
