"""The commands of indexing and searching: what they print, and each mistake in one line."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from retrieval.embedding.embedder import Embedder
from retrieval.evaluation.beir import read_corpus
from retrieval.search.cli import index_main, search_main
from retrieval.search.config import StoreConfig
from retrieval.search.search import open_searcher
from tests import processes, tiny


def test_indexing_twice_stores_the_corpus_once(recipe: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert index_main(["--config", str(recipe), "--plan", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert (planned["rows"], planned["chunks"], planned["state"]) == (12, 3, "new")
    for _ in range(2):
        assert index_main(["--config", str(recipe)]) == 0
        assert capsys.readouterr().out.startswith("12 documents in ")
    query = tiny.texts(12, seed=11)[3]
    with Embedder(model) as embedder, open_searcher(recipe) as searcher:
        documents_ND = embedder.encode_documents([f"A {text}" for text in tiny.texts(12, seed=11)])
        by_role = {"query": embedder.encode_queries([query]), "document": embedder.encode_documents([query])}
        hits = searcher.search(query, 12)
    scores = {role: np.sort(documents_ND @ vector_1D[0])[::-1] for role, vector_1D in by_role.items()}
    actual = [hit.score for hit in hits]
    np.testing.assert_allclose(actual, scores["query"], atol=1e-5)
    assert not np.allclose(actual, scores["document"], atol=1e-3)  # as it would be without the query's prompt


def test_a_store_is_searched_by_its_folder_or_its_recipe(
    recipe: Path, store: StoreConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    index_main(["--config", str(recipe)])
    capsys.readouterr()
    for source in (recipe, *([store.path] if store.path else [])):
        assert search_main(["--store", str(source), "--where", "year=2001", "--top", "12", "mask", "token"]) == 0
        lines = [line.split() for line in capsys.readouterr().out.splitlines()]
        ids = [words[2] for words in lines if len(words) == 4 and words[0].isdigit()]
        assert sorted(map(int, ids)) == sorted([1, 3, 5, 7, 9, 11] * 2)
    assert search_main(["--store", str(recipe), "--where", "year=1", "mask"]) == 0
    assert "nothing found" in capsys.readouterr().out


def test_another_model_or_dimension_is_refused_in_one_line(
    recipe: Path, store: StoreConfig, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index_main(["--config", str(recipe)])
    other = tiny.trained(tmp_path / "other", tmp_path / "plain", query_prompt="ask ")
    db = store.path or str(recipe)
    capsys.readouterr()
    for command, options, complaint in (
        (
            index_main,
            ["--config", str(recipe), "encode.width=8"],
            "dimension: the table has 32, the model gives 8 (take",
        ),
        (index_main, ["--config", str(recipe), f"model={other}"], f"is not {other} as it is now (take another"),
        (search_main, ["--store", db, "--model", str(other), "x"], f"is not {other} as it is now"),
        (search_main, ["--store", str(tmp_path), "x"], "holds no index (lodestar index creates one)"),
        (search_main, ["--store", str(recipe), "--device", "cuda:77", "x"], "--device: cuda:77: this machine has"),
        (search_main, ["--store", str(recipe), "--where", "a.b=c", "x"], "--where: a.b: not the name of a field"),
        (
            search_main,
            ["--store", str(recipe), "--where", "year", "x"],
            "--where: year: not FIELD=VALUE (as lang=en)",
        ),
        (search_main, ["--store", db, "--corpus", "c", "x"], "--corpus: not with --store"),
        (search_main, ["--model", "m", "--where", "a=b", "x"], "--where: only with --store"),
    ):
        assert command(options) == 2
        message = capsys.readouterr().err
        assert message.startswith("error: ") and complaint in message and message.count("\n") == 1
    copy = shutil.copytree(model, tmp_path / "copy")
    assert search_main(["--store", db, "--model", str(copy), "x"]) == 0  # the same model, elsewhere


def test_a_plan_goes_on_where_the_server_does_not_answer(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("psycopg", reason="an optional library: lodestar-embeddings[databases]")
    monkeypatch.setenv("DATABASE_URL", f"postgresql://postgres@/postgres?host={tmp_path}")
    recipe, corpus = tmp_path / "index.yaml", write_corpus(tmp_path)
    recipe.write_text(f"model: {model}\ncorpus: {corpus}\nstore: {{kind: pgvector, url_env: DATABASE_URL}}\n")
    assert index_main(["--config", str(recipe), "--plan", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["rows"] == 2 and plan["state"] == "new" and plan["work"] == "documents.work"
    (line,) = plan["missing"]
    assert line.startswith("$DATABASE_URL: connection") and line.endswith("; a new table is assumed")
    assert index_main(["--config", str(recipe)]) == 2
    assert capsys.readouterr().err.startswith("error: $DATABASE_URL: connection")


def test_a_mistake_is_told_before_torch_is_loaded(tmp_path: Path) -> None:
    recipe = tmp_path / "index.yaml"
    recipe.write_text("model: m\ncorpus: c.jsonl\nstore: {kind: faiss, path: db, tabel: t}\n")
    command = [sys.executable, "-X", "importtime", "launch/index.py", "--config", str(recipe)]
    result = processes.run(command, {"PYTHONPATH": str(processes.ROOT)}, limit_s=60)
    assert result.returncode == 2 and "store.tabel: unknown key (did you mean 'table'?)" in result.stderr
    assert not any(line.endswith((" torch", " lancedb", " faiss")) for line in result.stderr.splitlines())


def write_corpus(folder: Path) -> Path:
    text = "rows [of] a tensor " * 40  # brackets, which rich would take for markup; longer than a snippet
    rows = [{"_id": "torch.randperm", "title": "shuffle [bold]", "text": text}, {"_id": "other", "text": "a node"}]
    return tiny.write_jsonl(folder / "corpus.jsonl", rows)


def test_search_answers_each_query_with_score_id_title_and_snippet(model_folder, tmp_path, capsys):
    corpus = write_corpus(tmp_path)
    query = next(read_corpus(corpus)).full
    assert search_main(["--model", str(model_folder), "--corpus", str(corpus), "--top", "1", query, "second"]) == 0
    printed = capsys.readouterr().out
    assert "1  1.000  torch.randperm  shuffle [bold]" in printed
    assert "rows [of] a tensor rows" in printed and "..." in printed
    assert "second" in printed and printed.count("  1  ") == 2


def test_the_corpus_of_the_run_is_the_default_and_queries_come_from_standard_input(
    model_folder, tmp_path, capsys, monkeypatch
):
    summary = {"search_corpus": str(write_corpus(tmp_path))}
    (model_folder.parent / "summary.json").write_text(json.dumps(summary))
    monkeypatch.setattr("sys.stdin", io.StringIO("shuffle rows\n\n  graph node \n"))
    assert search_main(["--model", str(model_folder)]) == 0
    printed = capsys.readouterr().out
    assert "shuffle rows\n" in printed and "graph node\n" in printed
    assert printed.count("torch.randperm") == printed.count("other") == 2


def test_a_plan_counts_the_documents_and_says_where_embeddings_are_cached(model_folder, tmp_path, capsys):
    corpus = write_corpus(tmp_path)
    options = ["--model", str(model_folder), "--corpus", str(corpus)]
    outputs = []
    for extra in (["--plan", "--json"], ["--device", "cpu", "a query"], ["--plan", "--json"]):
        assert search_main([*options, *extra]) == 0
        outputs.append(capsys.readouterr().out)
    before, after = json.loads(outputs[0]), json.loads(outputs[2])
    assert before["documents"] == after["documents"] == 2
    assert before["embeddings"].startswith("to be computed, then cached in")
    (cache,) = (model_folder.parent / "search_cache").glob("[!.]*")
    assert after["embeddings"] == f"cached in {cache}"
    assert search_main([*options, "--plan"]) == 0
    assert "documents              2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["x"], "command line: the following arguments are required: --model"),
        (["--model", "{model}", "x"], "search_corpus: not there (give --corpus"),
        (["--model", "absent", "x"], "command line: --model: absent: no such folder"),
        (["--model", "{model}", "--corpus", "absent.jsonl", "x"], "absent.jsonl: no such file"),
        (
            ["--model", "{model}", "--top", "0", "x"],
            "command line: --top: must be from 1 to 10,000, got 0 (",
        ),
        (["--model", "{plain}", "--corpus", "{corpus}", "x"], "plain: no modules.json there"),
        (["--model", "{model}", "--corpus", "{empty}", "x"], "empty.jsonl: holds no document"),
        (["--model", "{model}", "--corpus", "{corpus}", "--device", "gpu", "x"], "--device: 'gpu': unknown kind of"),
    ],
)
def test_each_mistake_is_one_line_and_exit_code_2(model_folder, tmp_path, capsys, options, complaint):
    empty, corpus = tmp_path / "empty.jsonl", write_corpus(tmp_path)
    empty.write_text("")
    names = {"model": model_folder, "plain": tmp_path / "plain", "corpus": corpus, "empty": empty}
    assert search_main([option.format(**names) for option in options]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and complaint in message and message.count("\n") == 1
