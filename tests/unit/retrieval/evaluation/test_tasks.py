"""Tasks beside retrieval: what they measure, what texts they embed and how, and whether differences are luck."""

from __future__ import annotations

import json
import random
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter

from lodestar.config.loader import load
from lodestar.distributed.testing import run_world
from lodestar.errors import DataError
from retrieval.embedding.embedder import embed, load_model
from retrieval.evaluation.compare import main, measure
from retrieval.evaluation.config import EvaluateRecipe
from retrieval.evaluation.significance import Bootstrap, paired_bootstrap
from retrieval.evaluation.tasks import AnyTask, classify, cluster, pair_classification_scores, spearman, undersample
from tests import tiny

CPU = torch.device("cpu")
KINDS = ("retrieval", "classification", "clustering", "sts", "pair_classification")


def labelled(count: int, seed: int) -> list[dict[str, object]]:
    """Texts of three labels, told by the words that they are made of; some labels wrong, so that none is perfect."""
    chance = random.Random(seed)
    rows = []
    for i in range(count):
        words = tiny.WORDS[i % 3 * 4 : i % 3 * 4 + 6]
        text = " ".join(chance.choice(words) for _ in range(chance.randint(3, 9)))
        rows.append({"text": text, "label": i % 3 if chance.random() < 0.9 else 0})
    return rows


def sections(folder: Path) -> dict[str, dict[str, object]]:
    """A task of each kind, its files in the folder."""
    chance = random.Random(9)
    tiny.beir_folder(folder / "words")
    for name, count in (("train", 60), ("test", 41)):
        tiny.write_jsonl(folder / f"{name}.jsonl", labelled(count, seed=count))
    pairs = []
    for text in tiny.texts(40, seed=2):
        words = text.split()
        other = " ".join(word if chance.random() < 0.6 else chance.choice(tiny.WORDS) for word in words)
        score = sum(a == b for a, b in zip(words, other.split(), strict=True)) / len(words)
        pairs.append({"sentence1": text, "sentence2": other, "score": score, "label": int(score > 0.6)})
    tiny.write_jsonl(folder / "pairs.jsonl", pairs)
    files = {"train": f"{folder}/train.jsonl", "test": f"{folder}/test.jsonl"}
    return {
        "retrieval": {"kind": "retrieval", "data": f"{folder}/words"},
        "classification": {"kind": "classification", **files, "samples_per_label": 4, "experiments": 5},
        "clustering": {"kind": "clustering", "data": f"{folder}/test.jsonl"},
        "sts": {"kind": "sts", "data": f"{folder}/pairs.jsonl"},
        "pair_classification": {"kind": "pair_classification", "data": f"{folder}/pairs.jsonl"},
    }


def read(section: dict[str, object]):
    return TypeAdapter(AnyTask).validate_python(section).read("mine")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, dict[str, object]]:
    return sections(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    """Prompts for both roles, and one for who names no role: each changes what is embedded."""
    root = tmp_path_factory.mktemp("models")
    folder = tiny.trained(root / "model", root / "plain", query_prompt="search ")
    path = folder / "config_sentence_transformers.json"
    prompts = {"query": "search ", "document": "passage of a text "}
    path.write_text(json.dumps({**json.loads(path.read_text()), "prompts": prompts, "default_prompt_name": "query"}))
    return folder


# --- the rule of instructions ----------------------------------------------------------------


def test_instructions_go_on_retrieval_and_on_nothing_else(model_folder, data):
    model, bare = load_model(model_folder, CPU), load_model(model_folder, CPU)
    bare.prompts, bare.default_prompt_name = {"query": "", "document": ""}, None
    for kind in KINDS:
        task, seen = read(data[kind]), []

        def recording(texts, role, seen=seen):
            seen.append((role, list(texts), embed(model, texts, role)))
            return seen[-1][2]

        found = task.measure(recording, CPU)
        unprompted = [embed(bare, texts, "document") for _, texts, _ in seen]
        same = [torch.allclose(got, want, atol=1e-5) for (_, _, got), want in zip(seen, unprompted, strict=True)]
        if kind == "retrieval":
            assert [(role, texts) for role, texts, _ in seen] == [
                ("query", task.beir.queries),
                ("document", task.beir.documents),
            ]
            assert same == [False, False]  # the prompts of this model can be seen in its embeddings
            assert found.metrics != task.measure(partial(embed, bare), CPU).metrics
        else:
            assert [(role, texts) for role, texts, _ in seen] == [("text", list(task.texts))]
            assert same == [True]
            assert not torch.allclose(embed(model, task.texts, "query"), unprompted[0], atol=1e-2)


# --- what is measured ------------------------------------------------------------------------


def test_undersampling_takes_so_many_of_each_label_another_few_each_time():
    labels = ["a"] * 30 + ["b"] * 5 + ["c"] * 2
    chosen_EM = undersample(labels, 3, 4, seed=1)
    assert chosen_EM.shape == (4, 8)
    for rows in chosen_EM:
        assert sorted(labels[i] for i in rows) == ["a"] * 3 + ["b"] * 3 + ["c"] * 2 and len(set(rows)) == 8
    assert len({tuple(sorted(rows)) for rows in chosen_EM}) == 4
    assert np.array_equal(chosen_EM, undersample(labels, 3, 4, seed=1))
    assert not np.array_equal(chosen_EM, undersample(labels, 3, 4, seed=2))


def test_separable_embeddings_are_classified_and_clustered_and_noise_is_not():
    chance = np.random.default_rng(0)
    labels_I = np.arange(90) % 3
    near_ID, noise_ID = np.eye(3)[labels_I] + 0.01 * chance.normal(size=(90, 3)), chance.normal(size=(90, 3))
    rows_EM = undersample([str(label) for label in labels_I], 8, 3, seed=0)
    for x_ID, least, most in ((near_ID, 1.0, 1.0), (noise_ID, 0.0, 0.6)):
        found = classify(x_ID, labels_I, rows_EM, x_ID, labels_I, seed=0)
        assert least <= found.metrics["accuracy"] <= most and least <= found.metrics["macro_f1"] <= most
        assert found.item_I.mean() == pytest.approx(found.metrics["accuracy"])
        assert least <= cluster(x_ID, [str(label) for label in labels_I], seed=0).metrics["v_measure"] <= most


def test_pairs_are_measured_as_counted_by_hand():
    score_I, label_I = np.array([0.0, 1.0, 2.0, 5.0]), np.array([0, 1, 0, 1])
    assert spearman(np.array([0.1, 0.2, 0.3, 0.9]), score_I).metrics == {"spearman": pytest.approx(1)}
    assert spearman(np.array([0.9, 0.3, 0.2, 0.1]), score_I).metrics == {"spearman": pytest.approx(-1)}
    # by falling cosine 1 0 1 0: precision at the two positives is 1 and 2/3; best F1 takes the first three
    found = pair_classification_scores(np.array([0.1, 0.5, 0.6, 0.9]), label_I).metrics
    assert found == {"average_precision": pytest.approx(5 / 6), "best_f1": pytest.approx(0.8)}
    assert pair_classification_scores(np.array([0.9, 0.5, 0.6, 0.1]), label_I).metrics["average_precision"] < 0.5


def test_a_task_is_a_function_of_its_seed(model_folder, data):
    by_model = partial(embed, load_model(model_folder, CPU))
    for kind in ("classification", "clustering"):
        one, again, other = (read({**data[kind], "seed": seed}).measure(by_model, CPU).metrics for seed in (1, 1, 2))
        assert one == again != other


def measured_by_ranks(rank: int, size: int, model: Path, data: dict[str, dict[str, object]]):
    results = measure({"model": model}, {kind: read(section) for kind, section in data.items()}, device=CPU)
    return {kind: result.rows for kind, result in results.items()}


def test_two_ranks_measure_what_one_does(model_folder, data):
    alone = measured_by_ranks(0, 1, model_folder, data)
    assert set(alone) == set(KINDS) and len(alone["retrieval"]) == 3
    for rank, ranks_rows in enumerate(run_world(measured_by_ranks, 2, model_folder, data)):
        for kind, rows in ranks_rows.items():
            whole = [row for row in alone[kind] if rank == 0 or "BM25" not in row["model"]]  # BM25 is rank 0's alone
            for row, expected in zip(rows, whole, strict=True):
                assert row == pytest.approx(expected, abs=1e-6)


# --- the bootstrap ---------------------------------------------------------------------------


def test_the_interval_is_scipys_and_p_that_of_a_paired_test():
    from scipy.stats import bootstrap, ttest_rel

    chance = np.random.default_rng(0)
    first_I = chance.random(300)
    other_I = first_I + chance.normal(0.01, 0.1, size=300)
    found = paired_bootstrap(first_I, other_I, seed=3)
    expected = bootstrap((other_I - first_I,), np.mean, method="percentile", n_resamples=10_000, batch=1000)
    interval = expected.confidence_interval
    assert (found["low"], found["high"]) == pytest.approx((interval.low, interval.high), abs=1e-3)  # both are drawn
    assert found["p"] == pytest.approx(ttest_rel(other_I, first_I).pvalue, abs=0.02)
    assert found["difference"] == pytest.approx((other_I - first_I).mean())
    assert found == paired_bootstrap(first_I, other_I, seed=3) != paired_bootstrap(first_I, other_I, seed=4)


def test_equal_models_do_not_differ_better_ones_do_and_pairing_is_what_shows_it():
    first_I = np.random.default_rng(1).random(200)
    assert paired_bootstrap(first_I, first_I) == {"difference": 0.0, "low": 0.0, "high": 0.0, "p": 1.0}
    found = paired_bootstrap(first_I, first_I + 0.01)
    assert found["low"] == pytest.approx(0.01) and found["p"] == pytest.approx(1 / 10_001)
    assert paired_bootstrap(first_I, np.random.default_rng(2).permutation(first_I + 0.01))["p"] > 0.3
    assert paired_bootstrap([0.0], [1.0], resamples=9) == {"difference": 1.0, "low": 1.0, "high": 1.0, "p": 0.1}
    with pytest.raises(ValueError):
        paired_bootstrap([0.0, 1.0], [1.0, 0.0, 1.0])


# --- the command -----------------------------------------------------------------------------


def test_the_door_puts_all_tasks_into_one_table_and_one_json(model_folder, data, tmp_path, capsys):
    recipe = {
        "models": {"one": str(model_folder), "two": str(model_folder)},
        "evaluate": {"data": data["retrieval"]["data"]},
        "tasks": {f"my {kind}": section for kind, section in data.items()},
        "output_dir": str(tmp_path / "out"),
        "device": "cpu",
    }
    path = tmp_path / "evaluate.yaml"
    path.write_text(json.dumps(recipe))
    assert main(["--config", str(path)]) == 0
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("6 tasks", "accuracy", "V-measure", "Spearman", "nDCG@10", "BM25", "p"))
    written = json.loads((tmp_path / "out/evaluation.json").read_text())
    assert (written["evaluation"], written["queries"], written["documents"]) == ("words", 12, 12)
    assert [row["model"] for row in written["rows"]] == ["BM25", "one", "two", "two + BM25"]
    assert set(written["tasks"]) == {f"my {kind}" for kind in KINDS}
    assert written["tasks"]["my retrieval"]["rows"] == written["rows"]
    for kind, models in (("retrieval", ["BM25", "two", "two + BM25"]), ("classification", ["two"]), ("sts", [])):
        differences = written["tasks"][f"my {kind}"]["differences"]
        assert [(each["model"], each["to"]) for each in differences] == [(model, "one") for model in models]
        assert all(each["p"] == 1 for each in differences if each["model"] == "two")  # they are the same model
    assert 0 < written["differences"][0]["p"] < 0.05  # BM25 is not

    assert main(["--config", str(path), "--plan", "4", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["queries"] == 12 and plan["task my sts"] == "sts: 40 pairs"
    assert main(["--config", str(path), "bootstrap.resamples=0", "tasks={}", "bm25=false"]) == 0
    assert "difference" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("task", "complaint"),
    [
        (
            {"kind": "sts", "data": "{}/pairs.jsonl", "scor": "x"},
            "tasks.mine.scor: unknown key (did you mean 'score'?)",
        ),
        ({"kind": "sts"}, "tasks.mine.data: not set (it has no default)"),
        ({"kind": "stss", "data": "x"}, "tasks.mine: kind: must be one of 'retrieval', 'classification', 'clustering'"),
        ({"data": "x"}, "tasks.mine: kind: not set"),
        ({"kind": "clustering", "data": "absent.jsonl"}, "tasks.mine.data: absent.jsonl: no such file"),
        (
            {"kind": "clustering", "data": "{}/pairs.jsonl", "text": "sentence1", "label": "score"},
            "pairs.jsonl:1: score: must be text or a whole number, got",
        ),
        (
            {"kind": "sts", "data": "{}/test.jsonl"},
            "test.jsonl:1: sentence1: must be text, got null (its fields:",
        ),
        (
            {"kind": "pair_classification", "data": "{}/pairs.jsonl", "label": "score"},
            "score: must be 0 or 1, got",
        ),
        ({"kind": "classification", "train": "{}/test.jsonl", "test": "{}/odd.jsonl"}, "label: '7' is not in"),
    ],
)
def test_each_mistake_is_one_line_and_exit_code_2(tmp_path, capsys, task, complaint):
    sections(tmp_path)
    tiny.write_jsonl(tmp_path / "odd.jsonl", [{"text": "a", "label": 1}, {"text": "b", "label": 7}])
    path = tmp_path / "evaluate.yaml"
    text = json.dumps({"models": ["./absent"], "tasks": {"mine": task}}).replace("{}", str(tmp_path))
    path.write_text(text)
    assert main(["--config", str(path)]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and complaint in told and told.count("\n") == 1


def test_the_documented_recipe_is_one(tmp_path):
    (text,) = re.findall(
        r"```yaml\n(.*?)```", (Path(__file__).parents[4] / "docs/evaluate.md").read_text(), re.DOTALL
    )
    path = tmp_path / "evaluate.yaml"
    path.write_text(text)
    recipe = load(EvaluateRecipe, path)
    assert {section.kind for section in recipe.all_tasks.values()} == set(KINDS)
    assert list(recipe.all_tasks)[:2] == ["scifact", "boolq"] and recipe.bootstrap == Bootstrap()


def test_labels_of_one_kind_cannot_be_told_apart(tmp_path):
    path = tiny.write_jsonl(tmp_path / "one.jsonl", [{"text": "a", "label": 1}] * 3)
    with pytest.raises(DataError, match="1 labels"):
        read({"kind": "clustering", "data": str(path)})
