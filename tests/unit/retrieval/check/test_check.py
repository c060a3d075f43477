"""`lodestar check`: all mistakes of a recipe with their lines, statistics, and no torch."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from retrieval.check import inspection
from retrieval.check.cli import main
from retrieval.evaluation import beir
from tests import processes, tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("check")
    tiny.encoder(folder / "encoder")
    tiny.beir_folder(folder / "beir")
    return folder


def recipe(folder: Path, tmp_path: Path, *train: Path, **more: Any) -> str:
    values = {
        "run": {"output_dir": str(tmp_path / "run")},
        "model": {"encoder": str(folder / "encoder"), "max_length": 32},
        "data": {"train": list(map(str, train))},
        "batch": {"global_size": 8},
        "optim": {"lr": 1e-4},
        "schedule": {"steps": 4},
        "evaluate": {"data": str(folder / "beir")},
        **more,
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(values))
    return str(tmp_path / "recipe.yaml")


def check(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    capsys.readouterr()  # what libraries print at their first import
    code = main(["--json", "--config", *arguments])
    return code, json.loads(capsys.readouterr().out)


def test_a_good_recipe_has_no_findings_and_the_lengths_of_its_texts(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = tiny.finetune_file(tmp_path / "train.jsonl", 20)
    code, facts = check(capsys, recipe(folder, tmp_path, train), "--html", str(tmp_path / "check.html"))
    assert code == 0 and facts["errors"] == facts["warnings"] == [] and facts["rows"] == facts["query_texts"] == 20
    rows = [json.loads(line) for line in train.read_text().splitlines()]
    lengths = [len(tiny.tokenizer("bert")(row["query"])["input_ids"]) for row in rows]
    assert facts["query_truncated"] == sum(length > 32 for length in lengths) / 20
    assert facts["query_tokens"].endswith(f"longest {max(lengths)}")
    page = (tmp_path / "check.html").read_text()
    assert "<svg" in page and "Lengths" in page and not (tmp_path / "run").exists()


def test_every_mistake_is_listed_with_its_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    queries = [json.loads(line)["text"] for line in (folder / "beir/queries.jsonl").read_text().splitlines()]
    good = {"query": queries[0], "pos": ["p"]}
    rows = [{"query": 4}, good, {**good, "negs": ["n"]}, {"query": "q", "pos": ["p"], "pos_scores": [float("nan")]}]
    train = tiny.write_jsonl(tmp_path / "train.jsonl", rows)
    train.write_text(train.read_text() + "{bad\n\0\n")
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    config = recipe(folder, tmp_path, train, empty, tmp_path / "none.jsonl", train)
    code, facts = check(capsys, config, "evaluate.split=none")
    assert code == 2 and all(line.endswith(")") for line in facts["errors"] + facts["warnings"])
    problems = ["1: query", "4: pos_scores", "5: row: not valid JSON", "6: row: holds a NUL"]
    found = facts["errors"]
    assert "no split 'none'" in found[0] and "none.jsonl: no such file" in found[1]
    assert [line for line in found[2:6] if str(train) in line] == found[2:6]
    assert all(problem in line for problem, line in zip(problems, found[2:6], strict=True))
    joined = "\n".join(facts["warnings"])
    assert "named more than once" in joined and "'neg' is not set; 2 so" in joined and "a file is empty" in joined
    code, facts = check(capsys, config)
    assert facts["evaluation_queries_in_training"] == 1 and facts["query_duplicates"] == 3
    code, facts = check(capsys, config, "data.strict=true")
    assert any("'neg' is not set" in line for line in facts["errors"])
    assert any("named more than once" in line for line in facts["errors"])
    assert not any("named more than once" in line for line in facts["warnings"])


def test_the_result_does_not_depend_on_the_number_of_processes(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inspection, "SMALL_BYTES", 0)
    files = [tiny.finetune_file(tmp_path / f"{i}.jsonl", 10 + i) for i in range(3)]
    files[1].write_text(files[1].read_text() + "{bad\n")
    config = recipe(folder, tmp_path, *files)
    alone, shared = (check(capsys, config, f"data.processes={count}") for count in (1, 2))
    without_disk = [{k: v for k, v in facts.items() if k != "free_bytes"} for _, facts in (alone, shared)]
    assert without_disk[0] == without_disk[1] and alone[0] == 2


def test_pretraining_encoding_and_evaluation_have_their_checks(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = tiny.pretrain_file(tmp_path / "texts.jsonl")
    code, facts = check(capsys, recipe(folder, tmp_path, texts, mask={"encoder": 0.3}))
    assert code == 0 and facts["text_texts"] == 40
    texts.write_text(texts.read_text() + '{"text": "a", "_id": true}\n')
    config = tmp_path / "encode.yaml"
    config.write_text(json.dumps({"model": "none/none/none", "texts": [str(texts)], "output": {"dir": "o"}}))
    code, facts = check(capsys, str(config))
    assert code == 2 and len(facts["errors"]) == 2
    assert facts["errors"][0].startswith(f"{config}:1: model: none/none/none: no such folder (")
    assert facts["errors"][1].startswith(f"{texts}:41: _id: must be text or a whole number, got true (")


def test_merging_exporting_indexing_and_mining_have_their_checks_and_read_all_weights(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny.trained(tmp_path / "model", tmp_path / "plain")
    other = shutil.copytree(model, tmp_path / "other")
    data, db = tiny.finetune_file(tmp_path / "train.jsonl", 4), {"kind": "faiss", "path": str(tmp_path / "db")}
    recipes: dict[str, dict[str, Any]] = {
        "merge": {"models": [{"path": str(other)}, {"path": str(model)}], "output": str(tmp_path / "merged")},
        "index": {"model": str(other), "corpus": str(folder / "beir"), "store": db},
        "mine": {"model": str(other), "data": [str(data)], "output": str(tmp_path / "mined.jsonl")},
        "evaluate": {"models": [str(other)], "evaluate": {"data": str(folder / "beir")}},
    }
    if importlib.util.find_spec("onnxscript"):
        recipes["export"] = {"model": str(other), "output": str(tmp_path / "onnx")}
    for name, values in recipes.items():
        (tmp_path / f"{name}.yaml").write_text(json.dumps(values))
        code, facts = check(capsys, str(tmp_path / f"{name}.yaml"))
        assert code == 0 and facts["errors"] == [] and facts.get("prompts", 'query: "search "') == 'query: "search "'
    tensors = load_file(other / "model.safetensors")
    tensors["embeddings.LayerNorm.bias"][0] = torch.nan
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    for name in recipes:
        code, facts = check(capsys, str(tmp_path / f"{name}.yaml"))
        key = "models" if name in ("merge", "evaluate") else "model"
        problem = "model.safetensors: embeddings.LayerNorm.bias: holds NaN (take an earlier checkpoint)"
        assert code == 2 and facts["errors"] == [f"{tmp_path}/{name}.yaml:1: {key}: {other}/{problem}"]


def test_a_damaged_encoder_is_one_finding(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    encoder = shutil.copytree(folder / "encoder", tmp_path / "encoder")
    config = recipe(folder, tmp_path, tiny.finetune_file(tmp_path / "train.jsonl", 4))
    for name, content in (("config.json", "[]"), ("tokenizer.json", "{}")):
        kept = (encoder / name).read_text()
        (encoder / name).write_text(content)
        code, facts = check(capsys, config, f"model.encoder={encoder}")
        assert code == 2 and len(facts["errors"]) == 1 and f"{encoder}/{name}: " in facts["errors"][0]
        assert not any(name in line for line in facts["warnings"])
        (encoder / name).write_text(kept)


def test_what_ends_a_plan_is_one_finding_among_others(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Path] = []
    monkeypatch.setattr(beir, "_read_qrels", lambda path, read=beir._read_qrels: opened.append(path) or read(path))
    train = tiny.finetune_file(tmp_path / "train.jsonl", 4)
    train.write_text(train.read_text() + "{bad\n")
    config = recipe(folder, tmp_path, train)
    code, facts = check(capsys, config, "data.query_max_length=4000")
    first, second = facts["errors"]
    assert code == 2 and first.startswith("command line: data.query_max_length: 4000 tokens but ")
    assert second.startswith(f"{train}:5: row: not valid JSON") and facts["query_texts"] == 4
    assert len(opened) == 1  # judgements are read once


def test_torch_is_not_loaded(folder: Path, tmp_path: Path) -> None:
    train = tiny.finetune_file(tmp_path / "train.jsonl", 4)
    code = "import sys\nfrom retrieval.check.cli import main\nmain(['--config', sys.argv[1]])\n"
    code += "assert 'torch' not in sys.modules"
    command = [sys.executable, "-c", code, recipe(folder, tmp_path, train)]
    process = processes.run(command, dict(os.environ), limit_s=60)
    assert process.returncode == 0 and process.stdout.endswith("0 errors, 0 warnings\n"), process.stderr
