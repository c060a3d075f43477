"""The names of the package itself, as a notebook uses them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import retrieval
from lodestar.errors import ConfigError
from tests import processes, tiny


def test_the_package_loads_nothing_until_a_name_is_used() -> None:
    code = (
        "import sys, retrieval; before = set(sys.modules); retrieval.Embedder; print('torch' in before, dir(retrieval))"
    )
    command = [sys.executable, "-c", code]
    result = processes.run(command, {"PYTHONPATH": str(processes.ROOT)}, limit_s=60)
    result.check_returncode()
    assert result.stdout.startswith("False ") and all(f"'{name}'" in result.stdout for name in retrieval.__all__)
    assert all(callable(getattr(retrieval, name)) for name in retrieval.__all__)
    with pytest.raises(AttributeError, match="module 'retrieval' has no attribute 'embeder'"):
        retrieval.embeder  # type: ignore[attr-defined]  # noqa: B018


def test_a_notebook_mines_indexes_and_searches_in_one_process(tmp_path: Path) -> None:
    pytest.importorskip("faiss", reason="an optional library: lodestar-embeddings[databases]")
    model, texts = tiny.trained(tmp_path / "model", tmp_path / "plain"), tiny.texts(30, seed=3)
    examples = [{"query": texts[i], "pos": [texts[15 + i]]} for i in range(15)]
    train = tiny.write_jsonl(tmp_path / "train.jsonl", examples)
    mining = {"model": model, "data": [train], "output": tmp_path / "mined.jsonl", "mine": {"first_rank": 0}}
    for negatives in (2, 3):  # a process can mine again
        path = retrieval.mine(mining, f"mine.negatives={negatives}")
        assert path == tmp_path / "mined.jsonl"
        assert all(len(json.loads(line)["neg"]) == negatives for line in path.read_text().splitlines())
    corpus = tiny.write_jsonl(tmp_path / "corpus.jsonl", [{"id": i, "text": text} for i, text in enumerate(texts)])
    recipe = {"model": model, "corpus": corpus, "store": {"kind": "faiss", "path": tmp_path / "db"}}
    assert retrieval.index(recipe).documents == 30
    with retrieval.open_searcher(recipe) as searcher:
        assert len(searcher.search(texts[4], 3)) == 3


def test_a_mistake_names_the_field() -> None:
    with pytest.raises(ConfigError, match=r"^recipe: mine.first_rank: must be at least 0, got -1 \(raise it\)$"):
        retrieval.mine({"model": "m", "data": ["d"], "output": "o", "mine": {"first_rank": -1}})
    with pytest.raises(ConfigError, match=r"^command line: store.tabel: unknown key \(did you mean 'table'\?\)$"):
        retrieval.index({"model": "m", "corpus": "c", "store": {"kind": "faiss", "path": "p"}}, "store.tabel=t")
