"""Vector databases: one behaviour behind three clients, and the commands that fill and ask them."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lodestar.config.loader import dump, load
from lodestar.errors import ConfigError, DataError
from retrieval.embedding import embedder
from retrieval.embedding.embedder import Embedder
from retrieval.search import search
from retrieval.search.index import IndexEncode, IndexRecipe, as_row, index, main
from retrieval.search.search import open_searcher
from retrieval.search.vector_stores import FaissStore, Row, StoreSection, open_store
from tests import tiny

CLIENTS = {"lancedb": "lancedb", "qdrant": "qdrant_client", "faiss": "faiss"}
LANGUAGES = ["en", "it's", "zh"]
ROOT = Path(__file__).parents[4]
rng = np.random.default_rng(0)
VECTORS = rng.standard_normal((40, 8)).astype(np.float32)  # not of length one: the score is the dot product
ROWS: list[Row] = [
    {"id": f"d{i}", "title": "", "text": text, "lang": LANGUAGES[i % 3]}
    for i, text in enumerate(tiny.texts(40, seed=2))
]


@pytest.fixture(params=CLIENTS)
def kind(request: pytest.FixtureRequest) -> str:
    pytest.importorskip(CLIENTS[request.param], reason="an optional library: lodestar-embeddings[databases]")
    return request.param


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    return tiny.trained(root / "model", root / "plain")


@pytest.fixture
def recipe(kind: str, model: Path, tmp_path: Path) -> Path:
    """Over a corpus of twelve documents."""
    texts = enumerate(tiny.texts(12, seed=11))
    rows = [{"_id": i, "title": "A", "text": text, "metadata": {"year": 2000 + i % 2}} for i, text in texts]
    corpus = str(tiny.write_jsonl(tmp_path / "corpus.jsonl", rows))
    store = StoreSection(kind=kind, path=str(tmp_path / "db"))  # type: ignore[arg-type]
    path = tmp_path / "index.yaml"
    path.write_text(dump(IndexRecipe(model=str(model), corpus=corpus, store=store, encode=IndexEncode(shard_rows=5))))
    return path


def test_search_is_exact_filters_before_it_cuts_and_a_later_row_replaces_an_earlier(kind: str, tmp_path: Path) -> None:
    section = StoreSection(kind=kind, path=str(tmp_path))  # type: ignore[arg-type]
    with closing(open_store(section, "a-hub/name", 8)) as store:
        assert store.search(VECTORS[0], 3, {}) == [] and store.count() == 0
        store.upsert(VECTORS[:25], ROWS[:25])
        store.upsert(VECTORS[::-1], ROWS)  # each document now has another's vector
        store.upsert(VECTORS, ROWS)
    with closing(open_store(section, "a-hub/name", 8)) as store:
        assert store.count() == 40
        scores_N = VECTORS @ VECTORS[7]
        best = np.argsort(-scores_N)[:5]
        found = store.search(VECTORS[7], 5, {})
        assert [each.row for each in found] == [ROWS[i] for i in best]
        np.testing.assert_allclose([each.score for each in found], scores_N[best], rtol=1e-5)
        for where, kept in (
            ({"lang": "it's"}, lambda i: i % 3 == 1),
            ({"lang": "zh", "id": "d5"}, lambda i: i == 5),
            ({"lang": "absent"}, lambda i: False),
            ({"absent": "en"}, lambda i: False),
        ):
            expected = [f"d{i}" for i in np.argsort(-scores_N) if kept(i)]
            assert [each.row["id"] for each in store.search(VECTORS[7], 100, where)] == expected
        store.upsert(VECTORS[:1], [{"id": "d0", "title": "t", "text": "new", "year": "2026"}])
        assert store.count() == 40
        (found,) = store.search(VECTORS[0], 9, {"year": "2026"})
        assert found.row == {"id": "d0", "title": "t", "text": "new", "year": "2026"}  # its language went


def test_faiss_after_a_close_that_was_killed_between_its_two_files(tmp_path: Path) -> None:
    pytest.importorskip("faiss", reason="an optional library: lodestar-embeddings[databases]")
    with closing(FaissStore(str(tmp_path), "t", 8)) as store:
        store.upsert(VECTORS[:10], ROWS[:10])
    killed = FaissStore(str(tmp_path), "t", 8)
    killed.upsert(VECTORS, ROWS)
    killed._rows.rollback()  # the index was written, the rows were not
    killed.close()
    with closing(FaissStore(str(tmp_path), "t", 8)) as store:
        assert store.count() == len(store.search(VECTORS[30], 100, {})) == 10
        store.upsert(VECTORS, ROWS)
        assert store.search(VECTORS[30], 1, {})[0].row["id"] == "d30" and store.count() == 40


def test_a_corpus_goes_in_once_however_often_it_is_put(
    recipe: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--config", str(recipe), "--plan", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert (planned["rows"], planned["chunks"], planned["state"]) == (12, 3, "new")
    for _ in range(2):
        assert main(["--config", str(recipe)]) == 0
        assert capsys.readouterr().out.startswith("12 documents in ")
    query = tiny.texts(12, seed=11)[3]
    with Embedder(model) as embedder, open_searcher(recipe) as searcher:
        documents_ND = embedder.encode_documents([f"A {text}" for text in tiny.texts(12, seed=11)])
        by_role = {"query": embedder.encode_queries([query]), "document": embedder.encode_documents([query])}
        hits = searcher.ask(query, 12)
    scores = {role: np.sort(documents_ND @ vector_1D[0])[::-1] for role, vector_1D in by_role.items()}
    found = [hit.score for hit in hits]
    np.testing.assert_allclose(found, scores["query"], atol=1e-5)
    assert not np.allclose(found, scores["document"], atol=1e-3)  # as it would be without the query's prompt


def test_the_door_of_search_asks_a_store_by_its_folder_or_its_recipe(
    recipe: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    main(["--config", str(recipe)])
    capsys.readouterr()
    for store in (recipe, tmp_path / "db"):
        assert search.main(["--store", str(store), "--where", "year=2001", "--top", "12", "mask", "token"]) == 0
        lines = [line.split() for line in capsys.readouterr().out.splitlines()]
        ids = [words[2] for words in lines if len(words) == 4 and words[0].isdigit()]
        assert sorted(map(int, ids)) == sorted([1, 3, 5, 7, 9, 11] * 2)
    assert search.main(["--store", str(recipe), "--where", "year=1", "mask"]) == 0
    assert "nothing found" in capsys.readouterr().out


def test_another_model_or_dimension_is_refused_in_one_line(
    recipe: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["--config", str(recipe)])
    other = tiny.trained(tmp_path / "other", tmp_path / "plain", query_prompt="ask ")
    db = str(tmp_path / "db")
    capsys.readouterr()
    for command, options, complaint in (
        (main, ["--config", str(recipe), "encode.width=8"], "dimension: the table has 32, the model gives 8 (take"),
        (main, ["--config", str(recipe), f"model={other}"], f"is not {other} as it is now (take another"),
        (search.main, ["--store", db, "--model", str(other), "x"], f"is not {other} as it is now"),
        (search.main, ["--store", str(tmp_path), "x"], "holds no index (launch/index.py makes one)"),
        (
            search.main,
            ["--store", str(recipe), "--where", "year", "x"],
            "--where: year: not FIELD=VALUE (as lang=en)",
        ),
        (search.main, ["--store", db, "--corpus", "c", "x"], "--corpus: not with --store"),
        (search.main, ["--model", "m", "--where", "a=b", "x"], "--where: only with --store"),
    ):
        assert command(options) == 2
        told = capsys.readouterr().err
        assert told.startswith("error: ") and complaint in told and told.count("\n") == 1
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in model.rglob("*"):
        if file.is_file():
            (copy / file.relative_to(model)).parent.mkdir(exist_ok=True)
            (copy / file.relative_to(model)).write_bytes(file.read_bytes())
    assert search.main(["--store", db, "--model", str(copy), "x"]) == 0  # the same model, elsewhere


def test_a_table_that_somebody_else_made_is_left_alone(kind: str, tmp_path: Path) -> None:
    section = StoreSection(kind=kind, path=str(tmp_path))  # type: ignore[arg-type]
    with closing(open_store(section, "a-hub/name", 8)) as store:
        store.upsert(VECTORS, ROWS)
    (record,) = tmp_path.glob("*.store.json")
    record.unlink()
    with pytest.raises(ConfigError, match="table: documents is not launch/index"):
        open_store(section, "a-hub/name", 8)
    assert not record.exists()


def test_rows_of_any_spelling_become_text() -> None:
    row = {"_id": 7, "text": "x", "title": None, "tmp": False, "metadata": {"tags": ["a", "é"], "year": 2026}}
    expected = {"id": "7", "title": "", "text": "x", "tmp": "false", "tags": '["a", "é"]', "year": "2026"}
    assert as_row("f:1", row) == expected
    assert as_row("f:1", {"id": "7", "text": "x"}) == {"id": "7", "title": "", "text": "x"}


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"text": "x"}, "f:3: id: must be text or a whole number"),
        ({"_id": None, "text": "x"}, "f:3: _id: must be"),
        ({"id": "1", "text": 5}, "f:3: text: must be text"),
        ({"id": "1", "text": "x", "a.b": 1}, "f:3: a.b: not a name for metadata"),
        ({"id": "1", "text": "x", "vector": [1]}, "f:3: vector: not a name for metadata"),
    ],
)
def test_a_row_that_cannot_be_kept_is_named(row: dict[str, object], complaint: str) -> None:
    with pytest.raises(DataError, match=complaint):
        as_row("f:3", row)


def test_a_run_that_broke_off_embeds_what_is_missing(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, work = load(IndexRecipe, recipe, ["encode.shard_rows=2"]), tmp_path / "db/documents.work"
    embedded, really = [], embedder.encode_texts

    def until(count: int) -> None:
        def encode_texts(*args: Any, **how: Any) -> embedder.Encoded:
            if len(embedded) == count:
                raise KeyboardInterrupt
            embedded.append(args)
            return really(*args, **how)

        monkeypatch.setattr(embedder, "encode_texts", encode_texts)

    until(4)
    with pytest.raises(KeyboardInterrupt):
        index(made)
    there = len(list(work.glob("shard-*")))
    assert 2 <= there <= 4
    embedded.clear()
    until(100)
    assert index(made).documents == 12
    assert len(embedded) == 6 - there and not work.exists()


def test_a_row_that_cannot_be_put_is_told_before_any_is_embedded(recipe: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text(corpus.read_text().replace('"_id": 10', '"ID": 10'))
    with pytest.raises(DataError, match=r"corpus.jsonl:11: id: must be"):
        index(load(IndexRecipe, recipe, ["encode.shard_rows=2"]))
    assert not (tmp_path / "db").exists()


def test_prompts_of_a_recipe_stand_in_for_the_folders_own_and_are_kept_with_the_table(
    recipe: Path, tmp_path: Path, model: Path
) -> None:
    made = load(IndexRecipe, recipe, ["prompts.query=the vector of "])
    index(made)
    expected = Embedder(model, prompts={"query": "the vector of "}).encode_queries("a mask")
    with open_searcher(tmp_path / "db") as searcher:
        found = searcher.embedder.encode_queries("a mask")
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert not np.allclose(found, Embedder(model).encode_queries("a mask"), atol=1e-3)
    with pytest.raises(ConfigError, match="embedded by"):
        index(load(IndexRecipe, recipe))


def test_a_beir_folder_is_its_corpus_alone_and_of_equal_ids_the_last_row_stays(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("faiss", reason="an optional library: lodestar-embeddings[databases]")
    folder = tiny.beir_folder(tmp_path / "beir", count=30)
    plain = (folder / "corpus.jsonl").read_text()
    (folder / "corpus.jsonl").unlink()
    with gzip.open(folder / "corpus.jsonl.gz", "wt") as file:
        file.write(plain + json.dumps({"_id": "d29", "text": "last"}) + "\n")
    store = StoreSection(kind="faiss", path=str(tmp_path / "db"))
    found = index(IndexRecipe(model=str(model), corpus=str(folder), store=store))
    assert (found.rows, found.documents) == (31, 30)
    with open_searcher(store.path, where={"id": "d29"}) as searcher:
        assert [hit.document.text for hit in searcher.ask("x")] == ["last"]


def test_the_door_tells_a_mistake_before_torch_is_loaded(tmp_path: Path) -> None:
    recipe = tmp_path / "index.yaml"
    recipe.write_text("model: m\ncorpus: c.jsonl\nstore: {kind: faiss, path: db, tabel: t}\n")
    command = [sys.executable, "-X", "importtime", "launch/index.py", "--config", str(recipe)]
    found = subprocess.run(command, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60)
    assert found.returncode == 2 and "store.tabel: unknown key (did you mean 'table'?)" in found.stderr
    assert not any(line.endswith((" torch", " lancedb", " faiss")) for line in found.stderr.splitlines())
