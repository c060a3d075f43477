"""Models and BM25 side by side, on one rank and on several."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from lodestar.distributed.testing import run_world
from retrieval.embedding.distributed_embed import embed
from retrieval.embedding.exact_search import search
from retrieval.embedding.load_model import load_model
from retrieval.evaluation.beir import Beir, read_beir
from retrieval.evaluation.bm25 import rank_bm25
from retrieval.evaluation.compare import compare, measure
from retrieval.evaluation.metrics import evaluate_run
from retrieval.evaluation.tasks import TaskResult, retrieval_task
from tests import tiny
from tests.unit.retrieval.evaluation.test_tasks import KINDS, read, sections

CPU = torch.device("cpu")


def evaluate_model(folder: Path, beir: Beir) -> TaskResult:
    return retrieval_task(beir).measure(partial(embed, load_model(folder, CPU)), CPU)


def test_a_model_is_measured_as_its_embeddings_are(model_folder, tmp_path):
    beir = read_beir(tiny.beir_folder(tmp_path / "words"), "test")
    found = evaluate_model(model_folder, beir)
    model = load_model(model_folder, CPU)
    expected = evaluate_run(
        beir, *search(embed(model, beir.queries, "query"), embed(model, beir.documents, "document"), 100)
    )
    assert found.metrics == expected
    assert found.retrieval.ranking.scores_QK.shape == found.retrieval.ranking.index_QK.shape == (12, 12)


def test_models_stand_beside_bm25_and_the_last_is_mixed_with_it(model_folder, tmp_path):
    beir = read_beir(tiny.beir_folder(tmp_path / "words"), "test")
    rows = compare({"first": model_folder, "last": model_folder}, beir, device=CPU)
    assert [row["model"] for row in rows] == ["BM25", "first", "last", "last + BM25"]
    assert rows[0] == {"model": "BM25", **evaluate_run(beir, *rank_bm25(beir, 100))}
    assert {**rows[1], "model": ""} == {**rows[2], "model": ""} != {**rows[3], "model": ""}
    assert [row["model"] for row in compare({"only": model_folder}, beir, device=CPU, bm25=False)] == ["only"]


def test_more_ranks_than_texts_measure_what_one_does(model_folder, tmp_path):
    folder = tiny.beir_folder(tmp_path / "one", count=2)
    (alone,) = run_world(_measured, 1, model_folder, folder)
    assert all(found == pytest.approx(alone) for found in run_world(_measured, 3, model_folder, folder))


def _measured(_rank, _world_size, model_folder, folder):
    return evaluate_model(model_folder, read_beir(folder)).metrics


def measured_by_ranks(rank: int, size: int, model: Path, data: dict[str, dict[str, object]]):
    results = measure({"model": model}, {kind: read(section) for kind, section in data.items()}, device=CPU)
    return {kind: result.rows for kind, result in results.items()}


def test_two_ranks_measure_what_one_does(model_folder, tmp_path):
    data = sections(tmp_path)
    alone = measured_by_ranks(0, 1, model_folder, data)
    assert set(alone) == set(KINDS) and len(alone["retrieval"]) == 3
    for rank, ranks_rows in enumerate(run_world(measured_by_ranks, 2, model_folder, data)):
        for kind, rows in ranks_rows.items():
            whole = [row for row in alone[kind] if rank == 0 or "BM25" not in row["model"]]  # BM25 is rank 0's alone
            for row, expected in zip(rows, whole, strict=True):
                assert row == pytest.approx(expected, abs=1e-6)
