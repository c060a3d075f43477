"""Metrics equal to trec_eval's."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from retrieval.embedding.exact_search import search
from retrieval.evaluation.beir import read_beir
from retrieval.evaluation.config import METRICS
from retrieval.evaluation.metrics import as_run, evaluate_run, metrics, trec_order
from tests.unit.retrieval.embedding.test_exact_search import small_integers
from tests.unit.retrieval.evaluation.test_beir import write_beir


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


def test_minus_infinity_stands_for_no_document(tmp_path):
    beir = read_beir(write_beir(tmp_path / "pets"), "test")
    scores, rows = torch.tensor([[2.0, -math.inf], [-math.inf, -math.inf]]), torch.tensor([[0, 1], [0, 1]])
    assert as_run(beir, scores, rows) == {"q1": {"d1": 2.0}, "q2": {}}
    assert evaluate_run(beir, scores, rows)["recall_at_10"] == (1 / 2 + 0) / 2


def test_the_names_that_a_recipe_may_use_are_those_of_the_metrics():
    assert set(metrics({"q": ["d"]}, {"q": {"d": 1}})) == set(METRICS)
