"""Kinds of task: what they read, which texts they embed, and with which prompts."""

from __future__ import annotations

import json
import random
from functools import partial
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter

from lodestar.errors import DataError
from retrieval.embedding.distributed_embed import embed
from retrieval.embedding.load_model import load_model
from retrieval.evaluation.config import TaskConfig
from retrieval.evaluation.tasks import READERS, Task, read_task, undersample
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


def read(section: dict[str, object]) -> Task:
    return read_task(TypeAdapter(TaskConfig).validate_python(section), "mine")


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


def test_undersampling_takes_so_many_of_each_label_another_few_each_time():
    labels = ["a"] * 30 + ["b"] * 5 + ["c"] * 2
    chosen_EM = undersample(labels, 3, 4, seed=1)
    assert chosen_EM.shape == (4, 8)
    for rows in chosen_EM:
        assert sorted(labels[i] for i in rows) == ["a"] * 3 + ["b"] * 3 + ["c"] * 2 and len(set(rows)) == 8
    assert len({tuple(sorted(rows)) for rows in chosen_EM}) == 4
    assert np.array_equal(chosen_EM, undersample(labels, 3, 4, seed=1))
    assert not np.array_equal(chosen_EM, undersample(labels, 3, 4, seed=2))


def test_a_task_is_a_function_of_its_seed(model_folder, data):
    by_model = partial(embed, load_model(model_folder, CPU))
    for kind in ("classification", "clustering"):
        one, again, other = (read({**data[kind], "seed": seed}).measure(by_model, CPU).metrics for seed in (1, 1, 2))
        assert one == again != other


def test_every_kind_of_task_has_a_reader() -> None:
    assert set(READERS) == set(get_args(get_args(TaskConfig)[0]))


def test_labels_of_one_kind_cannot_be_told_apart(tmp_path):
    path = tiny.write_jsonl(tmp_path / "one.jsonl", [{"text": "a", "label": 1}] * 3)
    with pytest.raises(DataError, match="1 labels"):
        read({"kind": "clustering", "data": str(path)})
