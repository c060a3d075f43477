"""docs/extending.md: each example applied to a copy of the tree, and its commands run there."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForMaskedLM, DistilBertConfig

from tests import processes, tiny

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/extending.md").read_text(encoding="utf-8")
EXAMPLES = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))
EDIT = re.compile(
    r"^In (?:a new file )?`(?P<path>[\w/.]+)`(?:, (?P<where>at the end|before|after|replace)(?: `(?P<line>[^\n]+?)`)?"
    r"(?: by)?)?:\n\n```python\n(?P<code>.*?)```",
    re.MULTILINE | re.DOTALL,
)


def apply(tree: Path, example: str) -> int:
    """Make the example's edits; returns how many lines of code it adds."""
    lines = 0
    for edit in EDIT.finditer(example):
        path, line, code = tree / edit["path"], edit["line"], edit["code"]
        lines += sum(1 for text in code.splitlines() if text.strip())
        if edit["where"] is None:
            assert not path.exists()
            path.write_text(code)
            continue
        text = path.read_text()
        if edit["where"] == "at the end":
            text += f"\n\n{code}"
        else:
            assert line in text, f"{edit['path']}: {line}"
            start, end = text.index(line), text.index(line) + len(line)
            if edit["where"] == "replace":
                start, code = start, code.rstrip("\n")
            elif edit["where"] == "before":
                end = start
            else:
                start = end = text.index("\n", end) + 1
            text = text[:start] + code + text[end:]
        path.write_text(text)
    return lines


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipes and data that the commands name."""
    data = tmp_path_factory.mktemp("extending")
    tiny.encoder(data / "bert", "bert")
    tiny.trained(data / "model", data / "bert", max_length=32)
    tiny.pretrain_file(data / "pretrain.jsonl")
    tiny.finetune_file(data / "finetune.jsonl")
    tiny.write_jsonl(data / "corpus.jsonl", [{"_id": str(i), "text": t} for i, t in enumerate(tiny.texts(9))])
    texts = tiny.texts(40, seed=3)
    rows = [{"query": texts[i], "positive": texts[i + 1 : i + 2], "negative": texts[i + 2 : i + 5]} for i in range(30)]
    tiny.write_jsonl(data / "reranking.jsonl", rows)
    for stage in ("pretrain", "finetune"):
        (data / f"{stage}.yaml").write_text(
            f"run: {{output_dir: runs/{stage}}}\nmodel: {{encoder: bert, max_length: 32, random_head: true}}\n"
            f"data: {{train: [{stage}.jsonl], cache_dir: cache, processes: 1, workers: 0}}\n"
            "batch: {global_size: 7, micro_size: 3}\noptim: {lr: 1e-3}\nschedule: {steps: 2}\nprecision: fp32\n"
            "engine: {kind: ddp}\ntrack: {log_every: 1}\n"
        )
    (data / "index.yaml").write_text("model: model\ncorpus: corpus.jsonl\nstore: {kind: faiss, path: store}\n")
    (data / "evaluate.yaml").write_text(
        "models: [model]\ntasks: {order: {kind: reranking, data: reranking.jsonl}}\noutput_dir: evaluated\n"
    )
    tokenizer = tiny.tokenizer("bert")
    sizes = {"vocab_size": len(tokenizer), "dim": 16, "n_heads": 2, "n_layers": 1, "hidden_dim": 32}
    config = DistilBertConfig(**sizes, pad_token_id=tokenizer.pad_token_id)
    AutoModelForMaskedLM.from_config(config).save_pretrained(data / "distilbert")
    tokenizer.save_pretrained(data / "distilbert")
    return data


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("lodestar", "retrieval", "retromae", "contrastive"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def run(tree: Path, folder: Path, example: str) -> str:
    """What the example's commands print."""
    style = [sys.executable, "-m", "ruff", "check", "--quiet", "--config", str(ROOT / "pyproject.toml"), "."]
    checked = processes.run(style, cwd=tree, limit_s=60)
    assert checked.returncode == 0, checked.stdout
    (block,) = re.findall(r"```bash\n(.*?)```", example, re.DOTALL)
    env = {**processes.environment(), "PYTHONPATH": str(tree)}
    printed = ""
    for command in block.splitlines():
        argv = [sys.executable, "-m", *shlex.split(command)]
        done = processes.run(argv, env, cwd=folder, limit_s=180)
        assert done.returncode == 0, done.stdout + done.stderr
        printed += done.stdout
    return printed


def last_metrics(folder: Path) -> dict[str, float]:
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])


def test_each_section_is_tested() -> None:
    here = Path(__file__).read_text()
    assert len(EXAMPLES) == 5 and all(f'EXAMPLES["{name}"]' in here for name in EXAMPLES)


def test_a_loss_term(tree: Path, data: Path) -> None:
    example = EXAMPLES["A loss term"]
    assert apply(tree, example) < 60
    run(tree, data, example)
    assert last_metrics(data / "runs/finetune")["uniformity_loss"] < 0


@pytest.mark.slow
def test_a_vector_store(tree: Path, data: Path) -> None:
    example = EXAMPLES["A vector store"]
    assert apply(tree, example) < 60
    assert "shuffle" in run(tree, data, example)
    assert (data / "store/documents.npz").is_file()


@pytest.mark.slow
def test_an_evaluator(tree: Path, data: Path) -> None:
    example = EXAMPLES["An evaluator"]
    assert apply(tree, example) < 60
    assert "MAP" in run(tree, data, example)
    (row,) = json.loads((data / "evaluated/evaluation.json").read_text())["tasks"]["order"]["rows"]
    assert 0.25 < row["map"] < 1


@pytest.mark.slow
def test_a_backbone(tree: Path, data: Path) -> None:
    example = EXAMPLES["A backbone"]
    assert apply(tree, example) < 60
    run(tree, data, example)
    assert "DistilBertForMaskedLM" in (data / "runs/pretrain/model/config.json").read_text()
    shutil.rmtree(data / "runs/pretrain")


@pytest.mark.slow
def test_a_pretraining_objective(tree: Path, data: Path) -> None:
    example = EXAMPLES["A pre-training objective"]
    assert apply(tree, example) < 60
    run(tree, data, example)
    assert 0 < last_metrics(data / "runs/pretrain")["replaced_loss"] < 2
    shutil.rmtree(data / "runs/pretrain")
