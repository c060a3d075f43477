"""The Python blocks of the pages do what they say."""

from __future__ import annotations

import csv
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import datasets
import pytest

import retrieval
from lodestar.data.training_examples import check_row
from retrieval.evaluation.beir import read_beir
from tests import tiny
from tests.pages import DOCS, blocks, execute


def rows(path: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    assert all(check_row(path, row) is not None for row in found)
    return found


def test_the_converters_of_the_data_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny.beir_folder(tmp_path / "beir")
    (tmp_path / "beir/qrels/test.tsv").rename(tmp_path / "beir/qrels/train.tsv")
    (tmp_path / "collection.tsv").write_text('7\tA "quoted" passage.\n8\tAnother.\n')
    (tmp_path / "queries.train.tsv").write_text("1\twhat is quoted\n")
    (tmp_path / "qrels.train.tsv").write_text("1\t0\t7\t1\n1\t0\t8\t0\n")
    datasets.Dataset.from_dict({"query": ["a question"], "answer": ["an answer"]}).save_to_disk("questions")
    execute("data.md", "From a BEIR folder", "From MS MARCO", "From sentence-transformers' data sets")
    assert len(rows("from_beir.jsonl")) == 12
    assert rows("from_msmarco.jsonl") == [{"query": "what is quoted", "pos": ['A "quoted" passage.']}]
    assert len(Path("corpus.jsonl").read_text().splitlines()) == 2
    assert rows("from_columns.jsonl") == [{"anchor": "a question", "positive": "an answer"}]


def test_the_embeddings_of_the_mining_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from retrieval.embedding.cli import main

    monkeypatch.chdir(tmp_path)
    tiny.trained(tmp_path / "model", tmp_path / "plain")
    tiny.write_jsonl(tmp_path / "texts.jsonl", [{"text": text} for text in tiny.texts(5)])
    recipe = {"model": "model", "texts": ["texts.jsonl"], "output": {"dir": "embeddings"}}
    (tmp_path / "encode.yaml").write_text(json.dumps(recipe))
    assert main(["--config", "encode.yaml"]) == 0
    found = execute("mining.md", "Embeddings of a corpus")
    assert found["scores"].shape == (1, 2)
    assert "5 (5, 32)" in capsys.readouterr().out


def test_the_custom_page_splits_a_csv_into_training_rows_and_a_beir_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pairs = [(f"question {i % 30}", f" answer {i}, é ") for i in range(40)]  # ten questions have two answers
    with open("faq.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("question", "answer"), *pairs])
    execute("custom.md", "1. Convert the data")
    train = rows("data/custom/train.jsonl")
    splits = [set(read_beir("data/custom", split).queries) for split in ("dev", "test")]
    splits.append({row["query"] for row in train})
    assert [len(split) for split in splits] == [3, 3, 24] and len(set.union(*splits)) == 30
    answers = {question: {text.strip() for name, text in pairs if name == question} for question, _ in pairs}
    assert all(set(row["pos"]) == answers[row["query"]] for row in train)
    for split in ("dev", "test"):
        beir = read_beir("data/custom", split)
        text = dict(zip(beir.document_ids, beir.documents, strict=True))
        assert len(text) == 40
        for query_id, query in zip(beir.query_ids, beir.queries, strict=True):
            assert {text[document] for document in beir.relevant[query_id]} == answers[query]


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_links_lead_to_files(page: str) -> None:
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", (DOCS.parent / page).read_text(encoding="utf-8"))
    assert targets and not [target for target in targets if not (DOCS.parent / target).is_file()]


def test_what_the_documentation_takes_from_the_code_is_fresh() -> None:
    spec = importlib.util.spec_from_file_location("generate_reference", DOCS / "generate_reference.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    stale = [path.name for path, text in module.files().items() if path.read_text(encoding="utf-8") != text]
    assert not stale, f"{stale}: run make reference"


def test_a_bare_encoder_becomes_a_model(tmp_path: Path) -> None:
    tiny.encoder(tmp_path / "bert", "bert")
    (code,) = blocks("models.md", "A bare encoder")
    code = code.replace("path/to/encoder", str(tmp_path / "bert")).replace("encoder-as-model", str(tmp_path / "model"))
    exec(code, {})
    with retrieval.Embedder(tmp_path / "model", ["cpu"]) as embedder:
        assert embedder.encode_queries(["shuffle rows"]).shape == (1, embedder.width)


def test_the_api_page_trains_evaluates_and_embeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))  # the page leaves the cache where it is by default
    tiny.encoder(tmp_path / "bert", "bert")
    tiny.finetune_file(tmp_path / "train.jsonl")
    tiny.beir_folder(tmp_path / "beir")
    (code,) = blocks("reference/api.md")
    for name, own in (("BAAI/bge-small-en-v1.5", "bert"), ("data/custom/train.jsonl", "train.jsonl"),
                      ("data/custom", "beir"), ('"global_size": 64', '"global_size": 8')):  # fmt: skip
        assert name in code
        code = code.replace(name, own)
    values: dict[str, Any] = {}
    exec(code.replace('"batch.micro_size=16"', '"batch.micro_size=4", "precision=fp32", "model.max_length=32"'), values)
    assert values["query_QD"].shape[0] == 1 and values["results"]["beir"].rows[-1]["ndcg_at_10"] >= 0
