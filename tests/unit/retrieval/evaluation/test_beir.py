"""Folders in BEIR's layout: what is read, and how mistakes are reported."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest

from lodestar.errors import DataError
from retrieval.evaluation.beir import read_beir, read_corpus

DOCUMENTS = [
    {"_id": "d1", "title": "Cats", "text": "purr"},
    {"_id": "d2", "title": "", "text": "dogs bark"},
    {"_id": "d3", "text": "fish swim"},
    {"_id": "d4", "title": None, "text": "birds sing"},
]
QUERIES = [{"_id": "q1", "text": "who purrs"}, {"_id": "q2", "text": "who barks"}, {"_id": "q3", "text": "who sleeps"}]
QRELS = ["q2\td2\t1", "q2\td4\t0", "q1\td1\t2", "q1\td3\t1", "q3\td3\t0"]


def write_beir(folder: Path, *, zipped: bool = False, **changed: list[Any]) -> Path:
    """A small folder; `corpus`, `queries` (rows or raw lines) and `test` (lines of the qrels) can be replaced."""
    parts = {"corpus": DOCUMENTS, "queries": QUERIES, "test": QRELS, **changed}
    (folder / "qrels").mkdir(parents=True)
    for name, rows in parts.items():
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        at = folder / (f"{name}.jsonl" if name in ("corpus", "queries") else f"qrels/{name}.tsv")
        if at.suffix == ".tsv" and "query-id" not in (lines or [""])[0]:
            lines = ["query-id\tcorpus-id\tscore", *lines]
        content = "".join(f"{line}\n" for line in lines).encode()
        if zipped:
            at.with_name(f"{at.name}.gz").write_bytes(gzip.compress(content))
        else:
            at.write_bytes(content)
    return folder


@pytest.mark.parametrize("zipped", [False, True])
def test_a_beir_folder_is_read_with_titles_and_only_queries_that_have_an_answer(tmp_path, zipped):
    beir = read_beir(write_beir(tmp_path / "pets", zipped=zipped), "test")
    assert beir.name == "pets"
    assert beir.document_ids == ["d1", "d2", "d3", "d4"]
    assert beir.documents == ["Cats purr", "dogs bark", "fish swim", "birds sing"]
    assert (beir.query_ids, beir.queries) == (["q1", "q2"], ["who purrs", "who barks"])
    assert beir.relevant == {"q1": {"d1": 2, "d3": 1}, "q2": {"d2": 1, "d4": 0}}


def test_a_corpus_file_and_its_folder_are_the_same_corpus(tmp_path):
    folder = write_beir(tmp_path / "pets", zipped=True)
    assert list(read_corpus(folder)) == list(read_corpus(folder / "corpus.jsonl.gz"))


@pytest.mark.parametrize(
    ("limits", "queries", "documents"),
    [
        ({"max_queries": 1}, ["q1"], ["d1", "d2", "d3", "d4"]),
        ({"max_queries": 1, "max_documents": 3}, ["q1"], ["d1", "d2", "d3"]),
        ({"max_queries": 1, "max_documents": 2}, ["q1"], ["d1", "d3"]),
        ({"max_documents": 1}, ["q1", "q2"], ["d1", "d2", "d3", "d4"]),  # what is judged stays whatever the limit
    ],
)
def test_limits_keep_the_first_queries_their_judged_documents_and_the_first_others(
    tmp_path, limits, queries, documents
):
    beir = read_beir(write_beir(tmp_path / "pets"), "test", **limits)
    assert (beir.query_ids, beir.document_ids) == (queries, documents)
    assert set(beir.relevant) == set(queries)


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"corpus": [*DOCUMENTS, "{"]}, "corpus.jsonl:5: row: not valid JSON"),
        ({"corpus": [*DOCUMENTS, "[1]"]}, "corpus.jsonl:5: row: must be an object, got list"),
        ({"corpus": [*DOCUMENTS, {"_id": "d5"}]}, "corpus.jsonl:5: text: not set"),
        ({"corpus": [{"_id": 1, "text": "x"}]}, "corpus.jsonl:1: _id: must be text, got int"),
        ({"corpus": [*DOCUMENTS, DOCUMENTS[0]]}, "corpus.jsonl:5: _id: document 'd1' occurs twice"),
        ({"queries": [{"text": "x"}]}, "queries.jsonl:1: _id: not set"),
        ({"queries": [*QUERIES, QUERIES[0]]}, "queries.jsonl:4: _id: query 'q1' occurs twice"),
        ({"test": [*QRELS, "q1\td9\t1"]}, "qrels/test.tsv:7: corpus-id: no document 'd9' in"),
        ({"test": [*QRELS, "q9\td1\t1"]}, "qrels/test.tsv:7: query-id: no query 'q9' in"),
        ({"test": [*QRELS, "q1\td1\tgood"]}, 'qrels/test.tsv:7: score: must be a whole number, got "good"'),
        ({"test": [*QRELS, "q1\td1\t0"]}, "qrels/test.tsv:7: score: 'q1' with 'd1' has the score 2 above"),
        ({"test": [*QRELS, "q1 0 d1 1"]}, "qrels/test.tsv:7: row: 1 fields"),
        ({"test": ["q3\td3\t0"]}, "qrels/test.tsv:1: score: no query has a relevant document"),
    ],
)
def test_each_mistake_in_a_folder_is_told_in_one_line_with_its_place(tmp_path, changed, complaint):
    folder = write_beir(tmp_path / "pets", **changed)
    with pytest.raises(DataError) as caught:
        read_beir(folder, "test")
    assert str(caught.value).startswith(f"{folder}/{complaint}")
    assert "\n" not in str(caught.value)


def test_a_missing_folder_file_split_or_header_is_told_with_what_is_there(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        read_beir(tmp_path / "absent", "test")
    folder = write_beir(tmp_path / "pets", dev=QRELS)
    with pytest.raises(DataError, match=r"no split 'train' \(known: dev, test\)"):
        read_beir(folder, "train")
    (folder / "qrels/test.tsv").write_text("q1\td1\t1\n")
    with pytest.raises(DataError, match=r"test\.tsv:1: row: no header"):
        read_beir(folder, "test")
    (folder / "queries.jsonl").unlink()
    with pytest.raises(DataError, match=r"queries\.jsonl: no such file"):
        read_beir(folder, "dev")


def test_damaged_files_are_told_in_one_line(tmp_path):
    folder = write_beir(tmp_path / "pets", zipped=True)
    path = folder / "corpus.jsonl.gz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"corpus\.jsonl\.gz:\d+: row: the gz file is cut or damaged"):
        read_beir(folder, "test")
    path.write_bytes(gzip.compress(b'{"_id": "d1", "text": "\xff"}\n'))
    with pytest.raises(DataError, match=r"corpus\.jsonl\.gz:1: row: not valid UTF-8"):
        read_beir(folder, "test")


def test_scifact_has_the_published_sizes():
    data = os.environ.get("LODESTAR_TEST_DATA")
    if not data:
        pytest.skip("LODESTAR_TEST_DATA names no folder of data sets")
    beir = read_beir(Path(data) / "scifact", "test")
    assert (len(beir.documents), len(beir.queries), sum(map(len, beir.relevant.values()))) == (5183, 300, 339)
