"""BEIR folders, exact search, and metrics equal to trec_eval's."""

from __future__ import annotations

import gzip
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lodestar.distributed.testing import run_world
from lodestar.errors import DataError
from retrieval.embedding.exact_search import distributed_search, search, top_k
from retrieval.evaluation.beir import read_beir, read_corpus
from retrieval.evaluation.metrics import as_run, evaluate_run, metrics, trec_order

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


# --- reading ---------------------------------------------------------------------------------


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
        ({"test": [*QRELS, "q1\td1\tgood"]}, "qrels/test.tsv:7: score: must be a whole number, got 'good'"),
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
    with pytest.raises(DataError, match=r"corpus\.jsonl\.gz:\d+: row: cannot be read"):
        read_beir(folder, "test")
    path.write_bytes(gzip.compress(b'{"_id": "d1", "text": "\xff"}\n'))
    with pytest.raises(DataError, match=r"corpus\.jsonl\.gz:1: row: not valid UTF-8"):
        read_beir(folder, "test")


# --- search ----------------------------------------------------------------------------------


def small_integers(rows: int, width: int, seed: int) -> torch.Tensor:
    """Products of small whole numbers are exact in fp32 and often equal."""
    return torch.randint(-2, 3, (rows, width), generator=torch.Generator().manual_seed(seed)).float()


@pytest.mark.parametrize("block", [1, 7, 64, 1000])
@pytest.mark.parametrize("k", [1, 10, 101, 500])
def test_search_equals_a_stable_sort_with_ties_at_any_block(block, k):
    query_QD, document_ND = small_integers(13, 3, seed=1), small_integers(101, 3, seed=2)
    scores, rows = search(query_QD, document_ND, k, block=block)
    expected = (query_QD @ document_ND.T).sort(dim=1, descending=True, stable=True)
    assert torch.equal(scores, expected.values[:, :k])
    assert torch.equal(rows, expected.indices[:, :k])
    assert len(expected.values.unique()) < 30, "the test has no ties"


def test_scores_order_as_numbers_whatever_their_sign_and_size():
    torch.set_flush_denormal(False)  # a run in this process may have set it
    scores = torch.tensor([[-0.0, 1e-40, -math.inf, 0.0, -1e-40, 3.5, math.inf, -7.0, 3.5, -1e30]])
    values, columns = top_k(scores, 10)
    assert columns.tolist() == [[6, 5, 8, 1, 0, 3, 4, 7, 9, 2]]
    assert torch.equal(values, scores.gather(1, columns))


def test_search_refuses_unequal_widths():
    with pytest.raises(ValueError, match="widths differ: 3 != 4"):
        search(torch.ones(2, 3), torch.ones(5, 4), 1)


# --- metrics ---------------------------------------------------------------------------------


def test_metrics_of_a_hand_computed_ranking():
    relevant = {"q1": {"a": 3, "b": 1, "c": 0}, "q2": {"z": 1}, "unjudged": {"a": 0}}
    found = metrics({"q1": ["c", "b", "x", "a"]}, relevant, at=(2, 4))
    ideal = 3 / math.log2(2) + 1 / math.log2(3)
    # q2 is missing from the ranking and counts as 0; the third query has no answer and does not count
    assert found == pytest.approx(
        {
            "ndcg_at_2": (1 / math.log2(3)) / ideal / 2,
            "ndcg_at_4": (1 / math.log2(3) + 3 / math.log2(5)) / ideal / 2,
            "mrr_at_2": 0.5 / 2,
            "mrr_at_4": 0.5 / 2,
            "recall_at_2": 0.5 / 2,
            "recall_at_4": 1 / 2,
            "precision_at_2": 0.5 / 2,
            "precision_at_4": 0.5 / 2,
            "map_at_2": (1 / 2) / 2 / 2,
            "map_at_4": (1 / 2 + 2 / 4) / 2 / 2,
        }
    )


def test_a_document_ranked_twice_is_refused():
    with pytest.raises(ValueError, match="ranked twice"):
        metrics({"q": ["a", "a"]}, {"q": {"a": 1}})


def random_run(seed: int, steps: float) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, int]]]:
    """Scores on a grid of `steps`, so that many are equal; graded judgements, some of documents that were not found."""
    rng = np.random.default_rng(seed)
    ids = [f"{kind}{i}" for i in range(100) for kind in ("d", "Ä", "doc-")]
    run, relevant = {}, {}
    for q in range(40):
        found = rng.permutation(ids)[: rng.integers(1, 250)]
        run[f"q{q}"] = {str(d): float(np.floor(rng.normal() * steps) / steps) for d in found}
        relevant[f"q{q}"] = {str(d): int(rng.integers(-1, 4)) for d in rng.permutation(ids)[: rng.integers(1, 40)]}
        relevant[f"q{q}"][ids[q]] = 1  # at least one
    return run, relevant


@pytest.mark.parametrize("steps", [1, 4, 1e9])  # 1e9: scores that differ in fp64 alone, which trec_eval takes as equal
@pytest.mark.parametrize("seed", range(5))
def test_metrics_equal_trec_eval_on_random_runs_with_ties(seed, steps):
    pytrec_eval = pytest.importorskip("pytrec_eval")
    run, relevant = random_run(seed, steps)
    if steps == 1e9:
        run = {q: {d: 1 + round(s, 1) + s * 1e-9 for d, s in scores.items()} for q, scores in run.items()}
    ours = metrics(trec_order(run), relevant, at=(10, 100, 1000))

    measures = {f"{name}.10,100" for name in ("ndcg_cut", "recall", "P", "map_cut")} | {"recip_rank"}
    theirs = list(pytrec_eval.RelevanceEvaluator(relevant, measures).evaluate(run).values())
    assert len(theirs) == len(relevant)
    names = {"ndcg": "ndcg_cut_{}", "recall": "recall_{}", "precision": "P_{}", "map": "map_cut_{}"}
    for cutoff in (10, 100):
        for name, pattern in names.items():
            expected = sum(values[pattern.format(cutoff)] for values in theirs) / len(theirs)
            assert ours[f"{name}_at_{cutoff}"] == pytest.approx(expected, abs=1e-9), f"{name} at {cutoff}"
        # trec_eval has no cutoff for the reciprocal rank: 0 where it is below 1 / cutoff says the same
        expected = sum(r for values in theirs if (r := values["recip_rank"]) >= 1 / cutoff - 1e-9) / len(theirs)
        assert ours[f"mrr_at_{cutoff}"] == pytest.approx(expected, abs=1e-9)
    assert ours["mrr_at_1000"] == pytest.approx(sum(v["recip_rank"] for v in theirs) / len(theirs), abs=1e-9)


def test_another_order_of_ties_gives_other_numbers():
    run, relevant = random_run(seed=0, steps=1)
    other = {q: sorted(scores, key=lambda d, scores=scores: (-scores[d], d)) for q, scores in run.items()}
    assert metrics(other, relevant) != pytest.approx(metrics(trec_order(run), relevant), abs=1e-4)


def test_embeddings_are_measured_as_their_run_is(tmp_path):
    beir = read_beir(write_beir(tmp_path / "pets"), "test")
    query_QD, document_ND = small_integers(2, 3, seed=3), small_integers(4, 3, seed=4)
    scores = query_QD @ document_ND.T
    run = {
        q: dict(zip(beir.document_ids, row.tolist(), strict=True))
        for q, row in zip(beir.query_ids, scores, strict=True)
    }
    assert evaluate_run(beir, *search(query_QD, document_ND, 100)) == metrics(trec_order(run), beir.relevant)


def test_ranks_share_a_search_and_find_what_one_does():
    generator = torch.Generator().manual_seed(0)
    query_QD = torch.randint(-3, 4, (5, 4), generator=generator).float()  # whole numbers: ties, and exact sums
    document_ND = torch.randint(-3, 4, (40, 4), generator=generator).float()
    expected = search(query_QD, document_ND, 7)
    for world_size in (2, 3, 7):  # of 7 ranks, two have no query
        for found in run_world(_distributed_search, world_size, query_QD, document_ND):
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def _distributed_search(
    rank: int, world_size: int, query_QD: torch.Tensor, document_ND: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    return distributed_search(query_QD, document_ND, 7, torch.device("cpu"))


def test_minus_infinity_stands_for_no_document(tmp_path):
    beir = read_beir(write_beir(tmp_path / "pets"), "test")
    scores, rows = torch.tensor([[2.0, -math.inf], [-math.inf, -math.inf]]), torch.tensor([[0, 1], [0, 1]])
    assert as_run(beir, scores, rows) == {"q1": {"d1": 2.0}, "q2": {}}
    assert evaluate_run(beir, scores, rows)["recall_at_10"] == (1 / 2 + 0) / 2


def test_scifact_has_the_published_sizes():
    data = os.environ.get("LODESTAR_TEST_DATA")
    if not data:
        pytest.skip("LODESTAR_TEST_DATA names no folder of data sets")
    beir = read_beir(Path(data) / "scifact", "test")
    assert (len(beir.documents), len(beir.queries), sum(map(len, beir.relevant.values()))) == (5183, 300, 339)
