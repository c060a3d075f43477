"""Databases that are damaged, gone, in use or of something else: one line with a remedy."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from lodestar.config.loader import dump
from lodestar.errors import LodestarError
from retrieval.search.cli import index_main, search_main
from retrieval.search.config import IndexEncodeConfig, IndexRecipe, StoreConfig
from retrieval.search.index import index
from retrieval.search.search import open_searcher
from tests import tiny

KINDS = {"faiss": "faiss", "lancedb": "lancedb", "qdrant": "qdrant_client"}


def new_recipe(model: Path, tmp_path: Path, kind: str, work: str | None = None) -> IndexRecipe:
    pytest.importorskip(KINDS[kind], reason="an optional library: lodestar-embeddings[databases]")
    rows = [{"_id": i, "text": text} for i, text in enumerate(tiny.texts(12, seed=11))]
    corpus = str(tiny.write_jsonl(tmp_path / "corpus.jsonl", rows))
    store = StoreConfig(kind=kind, path=str(tmp_path / "db"))
    encode = IndexEncodeConfig(shard_rows=5)
    return IndexRecipe(model=str(model), corpus=corpus, store=store, encode=encode, work=work)


def one_line(use: Callable[[], object]) -> str:
    with pytest.raises(LodestarError) as caught:
        use()
    message = str(caught.value)
    assert "\n" not in message and message.endswith(")"), message
    return message


def search(folder: Path) -> int:
    with open_searcher(folder, device="cpu") as searcher:
        return len(searcher.search("a rank", 3))


def emptied(file: Path) -> None:
    file.write_bytes(b"")


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def other(file: Path) -> None:
    file.write_bytes(os.urandom(file.stat().st_size))


def a_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize("kind", KINDS)
def test_each_file_of_a_store_in_each_kind_of_damage(kind: str, model: Path, tmp_path: Path) -> None:
    """Either it is one line, or the search finds what it found before: the file was none that the search needs."""
    index(new_recipe(model, tmp_path, kind))
    good = tmp_path / "db"
    assert search(good) == 3
    files = [file.relative_to(good) for file in good.rglob("*") if file.is_file() and file.suffix != ".lock"]
    num_errors = 0
    for file in files:
        for damage in (emptied, cut, other, a_folder, Path.unlink):
            bad = shutil.copytree(good, tmp_path / f"bad{len(list(tmp_path.iterdir()))}")
            damage(bad / file)
            try:
                assert search(bad) == 3
            except LodestarError as error:
                message = str(error)
                assert "\n" not in message and message.startswith(str(bad)) and message.endswith(")"), message
                num_errors += 1
    assert num_errors >= 10


def test_a_flipped_bit_in_a_vector_of_faiss_is_told(model: Path, tmp_path: Path) -> None:
    index(new_recipe(model, tmp_path, "faiss"))
    file = tmp_path / "db/documents.faiss"
    content = file.read_bytes()
    for at in range(100, len(content) - 39, len(content) // 20):
        file.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        assert one_line(lambda: search(tmp_path / "db")).startswith(f"{file}: is damaged: its hash is another (")
    file.write_bytes(content[:-39])  # as an earlier version wrote it
    assert search(tmp_path / "db") == 3
    file.write_bytes(content)
    assert search(tmp_path / "db") == 3


@pytest.mark.parametrize("name", ["documents.faiss", "documents.sqlite"])
def test_a_file_of_faiss_that_is_gone_beside_the_other_is_not_an_empty_table(
    name: str, model: Path, tmp_path: Path
) -> None:
    recipe = new_recipe(model, tmp_path, "faiss")
    index(recipe)
    (tmp_path / "db" / name).unlink()
    for use in (lambda: search(tmp_path / "db"), lambda: index(recipe)):
        assert one_line(use).startswith(f"{tmp_path}/db/{name}: is gone, but documents.")


def test_a_table_that_another_process_writes_to_is_told(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from retrieval.search import faiss_store

    recipe = new_recipe(model, tmp_path, "faiss")
    index(recipe)
    monkeypatch.setattr(faiss_store, "LOCK_SECONDS", 0.1)
    with closing(sqlite3.connect(tmp_path / "db/documents.sqlite")) as connection:
        connection.execute("BEGIN IMMEDIATE")
        expected = f"{tmp_path}/db: documents: another process writes to it (end it, or wait)"
        assert one_line(lambda: index(recipe)) == expected


def test_qdrants_folder_that_is_open_elsewhere_is_told(model: Path, tmp_path: Path) -> None:
    recipe = new_recipe(model, tmp_path, "qdrant")
    index(recipe)
    with open_searcher(tmp_path / "db", device="cpu"):
        assert "another process has the database open" in one_line(lambda: index(recipe))


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"\xff", b'{"kind": "faiss"}', {"table": "../other"}, {"dimension": -1}, {"kind": "none"}]
)
def test_a_damaged_record_is_told(content: bytes | dict[str, object], model: Path, tmp_path: Path) -> None:
    index(new_recipe(model, tmp_path, "faiss"))
    record = tmp_path / "db/documents.store.json"
    if isinstance(content, dict):
        content = json.dumps({**json.loads(record.read_text()), **content}).encode()
    record.write_bytes(content)
    assert one_line(lambda: search(tmp_path / "db")).startswith(f"{record}: cannot be read (")


@pytest.mark.parametrize("kind", KINDS)
def test_a_place_that_is_a_file_is_told(
    kind: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = new_recipe(model, tmp_path, kind)
    (tmp_path / "db").touch()
    (tmp_path / "index.yaml").write_text(dump(recipe))
    assert index_main(["--config", str(tmp_path / "index.yaml")]) == 2
    assert search_main(["--store", str(tmp_path / "db"), "x"]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith(f"error: {tmp_path}/index.yaml:5: store.path: ") and first.endswith("(name another folder)")
    assert "no index (lodestar index creates one)" in second


def test_a_work_folder_that_is_a_file_or_damaged_is_told(model: Path, tmp_path: Path) -> None:
    recipe = new_recipe(model, tmp_path, "faiss", work=str(tmp_path / "work"))
    (tmp_path / "work").touch()
    assert one_line(lambda: index(recipe)).startswith(f"work: {tmp_path}/work: ")


def test_each_file_of_a_work_folder_in_each_kind_of_damage(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a stop between embedding and the table: either it is one line, or the table is as without the damage."""

    def stop(*arguments: object) -> None:
        raise KeyboardInterrupt

    def hits(folder: Path) -> list[tuple[float, str]]:
        with open_searcher(folder, device="cpu") as searcher:
            return [(hit.score, hit.document.id) for hit in searcher.search("a rank", 12)]

    recipe = new_recipe(model, tmp_path, "faiss", work=str(tmp_path / "work"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sys.modules["retrieval.search.index"], "open_store", stop)
        index(recipe)
    good = shutil.copytree(tmp_path / "work", tmp_path / "good")
    index(recipe)
    expected, outcomes = hits(tmp_path / "db"), list[bool]()
    for file in [file.relative_to(good) for file in good.rglob("*") if file.is_file()]:
        for damage in (emptied, cut, other, a_folder, Path.unlink):
            bad = shutil.copytree(good, tmp_path / f"bad{len(outcomes)}")
            damage(bad / file)
            store = recipe.store.model_copy(update={"path": str(tmp_path / f"db{len(outcomes)}")})
            try:
                index(recipe.model_copy(update={"work": str(bad), "store": store}))
                assert hits(Path(store.path or "")) == expected, (file, damage)
                outcomes.append(True)
            except LodestarError as error:
                assert "\n" not in str(error) and str(error).endswith(")"), (file, damage, error)
                outcomes.append(False)
    assert any(outcomes)


def test_the_vectors_and_the_rows_of_faiss_must_agree(model: Path, tmp_path: Path) -> None:
    faiss = pytest.importorskip("faiss", reason="an optional library: lodestar-embeddings[databases]")
    index(new_recipe(model, tmp_path, "faiss"))
    file = tmp_path / "db/documents.faiss"
    for width, count in ((8, 12), (32, 11)):
        other_index = faiss.IndexIDMap2(faiss.IndexFlatIP(width))
        other_index.add_with_ids(np.ones((count, width), np.float32), np.arange(1, count + 1))
        faiss.write_index(other_index, str(file))
        expected = f"{file}: has {count} vectors of width {width} for 12 rows of width 32 (restore a copy, "
        assert one_line(lambda: search(tmp_path / "db")).startswith(expected)
