"""Questions to a model: the searcher, its cache, and its command."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch

from retrieval.embedding.distributed_embed import embed
from retrieval.embedding.load_model import load_model
from retrieval.evaluation.beir import Document, read_corpus
from retrieval.search.search import Searcher, cache_file, main
from tests import tiny

CPU = torch.device("cpu")
DOCUMENTS = [Document(f"d{i}", f"title {i}", text) for i, text in enumerate(tiny.texts(9, seed=5))]


@pytest.fixture
def model_folder(tmp_path) -> Path:
    return tiny.trained(tmp_path / "run/model", tmp_path / "plain", query_prompt="")


def test_a_document_is_its_own_best_answer_and_scores_fall(model_folder):
    searcher = Searcher(load_model(model_folder, CPU), DOCUMENTS)
    for document in DOCUMENTS:
        hits = searcher.ask(document.full, 4)
        assert hits[0].document == document
        assert hits[0].score == pytest.approx(1.0, abs=1e-5)
        scores = [hit.score for hit in hits]
        assert len(hits) == 4 and scores == sorted(scores, reverse=True) and scores[-1] < 0.999


def test_asking_for_more_than_there_is_gives_all(model_folder):
    assert len(Searcher(load_model(model_folder, CPU), DOCUMENTS).ask("x", 100)) == len(DOCUMENTS)


def test_a_corpus_is_embedded_once_and_read_back_to_the_last_bit(model_folder):
    model = load_model(model_folder, CPU)
    cache = cache_file(model_folder, DOCUMENTS)
    assert cache.parent == model_folder.parent / "search_cache"
    first = Searcher(model, DOCUMENTS, cache=cache)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()  # who embeds again, embeds otherwise
    again = Searcher(model, DOCUMENTS, cache=cache)
    assert torch.equal(again.document_ND, first.document_ND)
    assert [path.name for path in cache.parent.iterdir()] == [cache.name]  # and nothing unfinished


def test_the_cache_is_named_by_the_models_files_and_the_documents(model_folder):
    usual = cache_file(model_folder, DOCUMENTS)
    assert cache_file(model_folder, list(DOCUMENTS)) == usual
    assert cache_file(model_folder, DOCUMENTS[::-1]) != usual
    assert cache_file(model_folder, [*DOCUMENTS[:-1], Document("d8", "", "else")]) != usual
    (model_folder / "config.json").write_text((model_folder / "config.json").read_text() + " ")
    assert cache_file(model_folder, DOCUMENTS) != usual


def test_a_damaged_cache_is_made_anew(model_folder):
    model, cache = load_model(model_folder, CPU), cache_file(model_folder, DOCUMENTS)
    expected = Searcher(model, DOCUMENTS, cache=cache).document_ND
    cache.write_bytes(cache.read_bytes()[:50])
    assert torch.equal(Searcher(model, DOCUMENTS, cache=cache).document_ND, expected)
    assert torch.equal(
        Searcher(model, DOCUMENTS, cache=cache).document_ND, embed(model, [d.full for d in DOCUMENTS], "document")
    )


def write_corpus(folder: Path) -> Path:
    text = "rows [of] a tensor " * 40  # brackets, which rich would take for markup; longer than a snippet
    rows = [{"_id": "torch.randperm", "title": "shuffle [bold]", "text": text}, {"_id": "other", "text": "a node"}]
    return tiny.write_jsonl(folder / "corpus.jsonl", rows)


def test_the_door_answers_each_query_with_score_id_title_and_snippet(model_folder, tmp_path, capsys):
    corpus = write_corpus(tmp_path)
    query = next(read_corpus(corpus)).full
    assert main(["--model", str(model_folder), "--corpus", str(corpus), "--top", "1", query, "second"]) == 0
    printed = capsys.readouterr().out
    assert "1  1.000  torch.randperm  shuffle [bold]" in printed
    assert "rows [of] a tensor rows" in printed and "..." in printed
    assert "second" in printed and printed.count("  1  ") == 2


def test_the_corpus_the_run_wrote_down_is_the_default_and_queries_come_from_the_terminal(
    model_folder, tmp_path, capsys, monkeypatch
):
    summary = {"search_corpus": str(write_corpus(tmp_path))}
    (model_folder.parent / "summary.json").write_text(json.dumps(summary))
    monkeypatch.setattr("sys.stdin", io.StringIO("shuffle rows\n\n  graph node \n"))
    assert main(["--model", str(model_folder)]) == 0
    printed = capsys.readouterr().out
    assert "shuffle rows\n" in printed and "graph node\n" in printed
    assert printed.count("torch.randperm") == printed.count("other") == 2


def test_a_plan_counts_the_documents_and_says_where_embeddings_are_kept(model_folder, tmp_path, capsys):
    corpus = write_corpus(tmp_path)
    options = ["--model", str(model_folder), "--corpus", str(corpus)]
    found = []
    for extra in (["--plan", "--json"], ["a query"], ["--plan", "--json"]):
        assert main([*options, *extra]) == 0
        found.append(capsys.readouterr().out)
    before, after = json.loads(found[0]), json.loads(found[2])
    assert before["documents"] == after["documents"] == 2
    assert before["embeddings"].startswith("to be made, then kept in")
    (kept,) = (model_folder.parent / "search_cache").iterdir()
    assert after["embeddings"] == f"kept in {kept}"
    assert main([*options, "--plan"]) == 0
    assert "documents              2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["x"], "command line: the following arguments are required: --model"),
        (["--model", "{model}", "x"], "search_corpus: not there (give --corpus"),
        (["--model", "absent", "x"], "command line: --model: absent: no such folder"),
        (["--model", "{model}", "--corpus", "absent.jsonl", "x"], "absent.jsonl: no such file"),
        (["--model", "{model}", "--top", "0", "x"], "command line: --top: must be 1 or more, got 0"),
        (["--model", "{plain}", "--corpus", "{corpus}", "x"], "plain: no modules.json there"),
        (["--model", "{model}", "--corpus", "{empty}", "x"], "empty.jsonl: holds no document"),
    ],
)
def test_each_mistake_is_one_line_and_exit_code_2(model_folder, tmp_path, capsys, options, complaint):
    empty, corpus = tmp_path / "empty.jsonl", write_corpus(tmp_path)
    empty.write_text("")
    names = {"model": model_folder, "plain": tmp_path / "plain", "corpus": corpus, "empty": empty}
    assert main([option.format(**names) for option in options]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and complaint in told and told.count("\n") == 1
