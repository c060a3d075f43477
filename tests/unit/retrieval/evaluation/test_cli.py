"""The command that evaluates models: tables, files, plans and mistakes."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lodestar.config.loader import load
from lodestar.errors import DataError
from retrieval.embedding import distributed_embed
from retrieval.embedding.distributed_embed import embed
from retrieval.embedding.load_model import load_model
from retrieval.evaluation.beir import read_beir
from retrieval.evaluation.cli import main
from retrieval.evaluation.config import BootstrapConfig, EvaluateRecipe
from retrieval.search.cli import search_main
from tests import processes, tiny
from tests.unit.retrieval.evaluation.test_tasks import KINDS, sections


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, dict[str, object]]:
    return sections(tmp_path_factory.mktemp("data"))


@pytest.fixture
def beir_folder(tmp_path) -> Path:
    return tiny.beir_folder(tmp_path / "words")


def recipe(folder: Path, **values: object) -> str:
    path = folder / "evaluate.yaml"
    path.write_text(json.dumps(values))  # JSON is YAML
    return str(path)


def test_the_command_prints_a_table_and_writes_one_json(model_folder, beir_folder, tmp_path, capsys):
    config = recipe(tmp_path, models={"mine": str(model_folder)}, evaluate={"data": str(beir_folder)}, device="cpu")
    assert main(["--config", config, f"output_dir={tmp_path / 'out'}"]) == 0
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("nDCG@10", "recall@100", "BM25", "mine", "12 queries, 12 documents"))
    written = json.loads((tmp_path / "out/evaluation.json").read_text())
    assert (written["evaluation"], written["split"], written["queries"]) == ("words", "test", 12)
    assert [row["model"] for row in written["rows"]] == ["BM25", "mine", "mine + BM25"]
    assert 0 < written["rows"][0]["map_at_100"] <= 1


def test_search_reads_what_an_evaluation_embedded(model_folder, beir_folder, tmp_path, capsys, monkeypatch):
    model = shutil.copytree(model_folder, tmp_path / "run/model")
    config = recipe(tmp_path, models={"mine": str(model)}, evaluate={"data": str(beir_folder)}, device="cpu")
    search = ["--model", str(model), "--corpus", str(beir_folder), "--device", "cpu", "a query"]
    for value, expected in (("false", "to be computed"), ("true", "cached in")):
        assert main(["--config", config, f"search_cache={value}"]) == 0
        capsys.readouterr()
        assert search_main([*search, "--plan", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["embeddings"].startswith(expected)
    (cache,) = (tmp_path / "run/search_cache").glob("*.safetensors")
    documents = read_beir(beir_folder).documents
    assert load_file(cache)["embeddings"].equal(embed(load_model(model, torch.device("cpu")), documents, "document"))


@pytest.mark.parametrize("other", ["precision=bf16", "prompts={mine: {query: 'find: '}}", "evaluate.max_documents=5"])
def test_what_search_would_not_read_is_no_cache_of_it(other, model_folder, beir_folder, tmp_path, capsys):
    config = recipe(tmp_path, models={"mine": str(model_folder)}, evaluate={"data": str(beir_folder)})
    assert main(["--config", config, "search_cache=true", other]) == 2
    assert "search_cache: search embeds whole corpora in fp32 with" in capsys.readouterr().err


def test_an_interrupted_run_goes_on_with_the_embeddings_it_has(
    model_folder, beir_folder, tmp_path, monkeypatch, capsys
):
    second = tmp_path / "second"
    shutil.copytree(model_folder, second)
    (second / "config.json").write_text((second / "config.json").read_text() + " ")  # else it is the same model
    models = {"first": str(model_folder), "second": str(second)}
    config = recipe(tmp_path, models=models, evaluate={"data": str(beir_folder)}, device="cpu")
    options = ["--config", config, f"output_dir={tmp_path / 'out'}"]
    embedded, really = [], distributed_embed.encode_texts

    def encode_texts(*args: Any, **more: Any) -> Any:
        embedded.append(args)
        if len(embedded) == 3:
            raise DataError("second: interrupted")
        return really(*args, **more)

    monkeypatch.setattr(distributed_embed, "encode_texts", encode_texts)
    assert main(options) == 2 and "second: interrupted" in capsys.readouterr().err
    assert len(list(tmp_path.glob("out/embeddings.work/*/*.safetensors"))) == 2  # queries and documents of the first
    embedded[:] = [()] * 3
    assert main(options) == 0
    assert len(embedded) == 3 + 2  # those of the second
    rows = json.loads((tmp_path / "out/evaluation.json").read_text())["rows"]
    assert {**rows[1], "model": ""} == {**rows[2], "model": ""}
    assert not (tmp_path / "out/embeddings.work").exists()


def test_a_plan_counts_texts_and_opens_no_model(beir_folder, tmp_path, capsys):
    config = recipe(tmp_path, models=["no/such/model"], evaluate={"data": str(beir_folder)})
    assert main(["--config", config, "--plan", "4", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["world_size"], plan["queries"], plan["documents"], plan["texts_per_rank"]) == (4, 12, 12, 6)


def test_prompts_stand_in_for_a_models_own_by_its_label(model_folder, beir_folder, tmp_path, capsys):
    models = {"own": str(model_folder), "other": str(model_folder)}
    values = {"models": models, "evaluate": {"data": str(beir_folder)}, "device": "cpu", "output_dir": str(tmp_path)}
    assert main(["--config", recipe(tmp_path, **values, prompts={"other": {"query": "the vector of "}})]) == 0
    _, own, other, _ = json.loads((tmp_path / "evaluation.json").read_text())["rows"]
    assert {**own, "model": ""} != {**other, "model": ""}
    assert main(["--config", recipe(tmp_path, **values, prompts={"another": {"query": ""}})]) == 2
    assert "prompts.another: no model has that label (known: own, other)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"models": []}, "evaluate.yaml:1: models: must"),
        ({"evaluate": {}}, "needs evaluate.data or tasks (name a BEIR folder)"),
        ({"models": ["./absent"]}, "./absent: no such folder (name a sentence-transformers folder"),
        ({"bootstrap": {"baselines": ["old"]}}, "bootstrap.baselines: old: no row has that label (known: ./absent)"),
        ({"models": ["runs/absent/model"]}, "runs/absent/model: no such folder"),
        ({"evaluate": {"data": "absent"}}, "absent: no such folder (name one with corpus.jsonl"),
    ],
)
def test_each_mistake_in_a_recipe_is_one_line_and_exit_code_2(beir_folder, tmp_path, capsys, values, complaint):
    usual = {"models": ["./absent"], "evaluate": {"data": str(beir_folder)}, "bm25": False, "device": "cpu"}
    assert main(["--config", recipe(tmp_path, **{**usual, **values})]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and complaint in told and told.count("\n") == 1


def test_the_command_puts_all_tasks_into_one_table_and_one_json(model_folder, data, tmp_path, capsys):
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

    recipe["bootstrap"] = {"baselines": ["BM25", "two"]}
    path.write_text(json.dumps(recipe))
    assert main(["--config", str(path)]) == 0
    written = json.loads((tmp_path / "out/evaluation.json").read_text())
    others = [("one", "BM25"), ("two", "BM25"), ("two + BM25", "BM25"), ("BM25", "two"), ("one", "two")]
    assert [(each["model"], each["to"]) for each in written["differences"]] == [*others, ("two + BM25", "two")]
    assert [each["to"] for each in written["tasks"]["my classification"]["differences"]] == ["two"]
    path.write_text(json.dumps(recipe | {"bootstrap": {}}))
    capsys.readouterr()

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
        ({"kind": "sts"}, "tasks.mine.data: not set (it has no default: add it)"),
        ({"kind": "stss", "data": "x"}, "tasks.mine.kind: must be one of retrieval, classification, clustering"),
        ({"data": "x"}, "tasks.mine.kind: not set"),
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
def test_each_mistake_in_a_task_is_one_line_and_exit_code_2(tmp_path, capsys, task, complaint):
    sections(tmp_path)
    tiny.write_jsonl(tmp_path / "odd.jsonl", [{"text": "a", "label": 1}, {"text": "b", "label": 7}])
    path = tmp_path / "evaluate.yaml"
    text = json.dumps({"models": ["./absent"], "tasks": {"mine": task}}).replace("{}", str(tmp_path))
    path.write_text(text)
    assert main(["--config", str(path)]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and complaint in told and told.count("\n") == 1


def test_the_documented_recipe_is_one(tmp_path):
    (text,) = re.findall(r"```yaml\n(.*?)```", (Path(__file__).parents[4] / "docs/evaluate.md").read_text(), re.DOTALL)
    path = tmp_path / "evaluate.yaml"
    path.write_text(text)
    recipe = load(EvaluateRecipe, path)
    assert {section.kind for section in recipe.all_tasks.values()} == set(KINDS)
    assert list(recipe.all_tasks)[:2] == ["scifact", "boolq"] and recipe.bootstrap == BootstrapConfig()


def test_a_plan_and_mistakes_in_files_need_no_torch(tmp_path):
    config = tmp_path / "evaluate.yaml"
    tasks = {f"my {kind}": section for kind, section in sections(tmp_path).items()}
    config.write_text(json.dumps({"models": ["./absent"], "tasks": tasks}))
    for arguments, exit_code in ((["--plan"], 0), ([], 2)):
        command = [sys.executable, "-X", "importtime", "launch/evaluate.py", "--config", str(config), *arguments]
        ended = processes.run(command, {"PYTHONPATH": str(processes.ROOT)}, limit_s=60)
        assert ended.returncode == exit_code, ended.stderr
        assert not any(line.endswith((" torch", " sklearn")) for line in ended.stderr.splitlines())
