"""A trained folder in mteb's own runner: its prompts, and the same numbers as ours; on data made here."""

from __future__ import annotations

import json
import logging
import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from retrieval.embedding.distributed_embed import embed
from retrieval.embedding.load_model import load_model
from tests import tiny
from tests.unit.retrieval.evaluation.test_tasks import read, sections

if TYPE_CHECKING:
    from mteb.abstasks import AbsTask

DOCUMENT = Path(__file__).parents[4] / "docs/evaluate.md"
mteb = pytest.importorskip("mteb", reason="the extra mteb is not installed")
OURS_AND_THEIRS = {
    "retrieval": [("ndcg_at_10", "ndcg_at_10"), ("map_at_100", "map_at_100"), ("recall_at_10", "recall_at_10")],
    "classification": [("accuracy", "accuracy"), ("macro_f1", "f1")],
    "clustering": [("v_measure", "v_measure")],
    "sts": [("spearman", "cosine_spearman")],
    "pair_classification": [("average_precision", "cosine_ap"), ("best_f1", "cosine_f1")],
}


def rows(path: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def local_tasks(data: dict[str, dict[str, object]]) -> list[AbsTask]:
    """The same files as tasks of mteb: but for retrieval, which docs/evaluate.md shows."""
    from datasets import Dataset, DatasetDict
    from mteb.abstasks import AbsTaskClassification, AbsTaskPairClassification, AbsTaskSTS
    from mteb.abstasks.clustering_legacy import AbsTaskClusteringLegacy
    from mteb.abstasks.task_metadata import TaskMetadata

    def about(name: str, kind: str, score: str) -> TaskMetadata:
        return TaskMetadata(
            name=name, type=kind, main_score=score, description="", dataset={"path": "local", "revision": "1"},
            category="t2t", modalities=["text"], eval_splits=["test"], eval_langs=["eng-Latn"],
        )  # fmt: skip

    class Labels(AbsTaskClassification):
        metadata = about("Labels", "Classification", "accuracy")
        samples_per_label, n_experiments = 4, 5

        def load_data(self, **_):
            files = {name: Dataset.from_list(rows(data["classification"][name])) for name in ("train", "test")}
            self.dataset, self.data_loaded = DatasetDict(files), True

    class Clusters(AbsTaskClusteringLegacy):
        metadata = about("Clusters", "Clustering", "v_measure")

        def load_data(self, **_):
            found = rows(data["clustering"]["data"])
            sets = [{"sentences": [row["text"] for row in found], "labels": [row["label"] for row in found]}]
            self.dataset, self.data_loaded = DatasetDict(test=Dataset.from_list(sets)), True

    class Scores(AbsTaskSTS):
        metadata = about("Scores", "STS", "cosine_spearman")
        min_score, max_score = 0, 1

        def load_data(self, **_):
            self.dataset, self.data_loaded = DatasetDict(test=Dataset.from_list(rows(data["sts"]["data"]))), True

    class Pairs(AbsTaskPairClassification):
        metadata = about("Pairs", "PairClassification", "max_ap")
        label_column_name = "label"

        def load_data(self, **_):
            Scores.load_data(self)

    return [Labels(), Clusters(), Scores(), Pairs()]


def scores_by_mteb(model, task) -> dict[str, float]:
    found = mteb.evaluate(model, task, cache=None, show_progress_bar=False, encode_kwargs={"batch_size": 8})
    return found.task_results[0].scores["test"][0]


def test_mteb_puts_the_query_prompt_on_queries_alone_and_finds_our_numbers(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    logging.getLogger("mteb").setLevel(logging.ERROR)
    data = sections(tmp_path / "data")
    data["retrieval"]["data"] = str(Path(data["retrieval"]["data"]).rename(tmp_path / "data/mine"))
    folder = tiny.trained(tmp_path / "runs/finetune/model", tmp_path / "plain", query_prompt="search ")
    model, bare = (load_model(folder, torch.device("cpu")) for _ in range(2))
    bare.prompts = {"query": "", "document": ""}

    documented: dict[str, Any] = {"__name__": "documented"}
    exec(re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)[0], documented)
    printed = float(capsys.readouterr().out.split()[-1])
    for kind, task in zip(OURS_AND_THEIRS, [documented["Mine"](), *local_tasks(data)], strict=True):
        theirs = scores_by_mteb(model, task)
        ours = read(data[kind]).measure(partial(embed, model), torch.device("cpu")).metrics
        for our_name, their_name in OURS_AND_THEIRS[kind]:
            assert ours[our_name] == pytest.approx(theirs[their_name], abs=1e-5), our_name  # mteb rounds some
        main = OURS_AND_THEIRS[kind][0][1]
        without = scores_by_mteb(bare, task)[main]
        assert (without == pytest.approx(theirs[main], abs=1e-5)) == (kind != "retrieval"), kind
        if kind == "retrieval":
            assert printed == theirs[main]
