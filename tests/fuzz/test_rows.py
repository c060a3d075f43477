"""Mutated rows through every reader: no exception but ours, no hang, no message without its place and remedy."""

from __future__ import annotations

import gzip
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lodestar.data.findings import Findings
from lodestar.data.readers import find_sources, read_rows
from lodestar.data.training_examples import check_row
from retrieval.embedding.config import EncodeRecipe, OutputConfig
from retrieval.embedding.corpus import read_texts
from retrieval.evaluation.beir import read_beir
from retrieval.evaluation.config import ClassificationConfig, PairClassificationConfig, StsConfig
from retrieval.evaluation.tasks import read_task
from retrieval.search.corpus import find_corpus, read_chunks
from retromae.text_check import TextCheck
from tests.fuzz.mutate import MESSAGE, as_line, mutate_bytes, mutate_value, refused

ROWS: list[dict[str, Any]] = [
    {"query": "a", "pos": ["b", "c"], "neg": ["d"], "pos_scores": [0.5, 1], "neg_scores": [0.1], "prompt": "p: ",
     "type": "normal"},
    {"anchor": "a", "positive": "b", "negative_1": "c"},
    {"text": "a b", "_id": "1", "title": "t", "metadata": {"lang": "en"}},
    {"text": "c d", "label": 0, "sentence1": "a", "sentence2": "b", "score": 0.5},
]  # fmt: skip
NAMES = ["query", "pos", "neg", "pos_scores", "text", "_id", "id", "label", "score", "title", "anchor", "positive"]


def training(path: Path) -> Iterator[object]:
    findings = Findings()
    for source in find_sources([str(path)]):
        for where, row in read_rows(source):
            yield check_row(where, row, findings)
    for line in findings.warnings:
        assert MESSAGE.fullmatch(line), line


def pretraining(path: Path) -> Iterator[object]:
    check = TextCheck("text")
    return (check(where, row) for source in find_sources([str(path)]) for where, row in read_rows(source))


def encoding(path: Path) -> Iterable[object]:
    return read_texts(EncodeRecipe(model="m", texts=[str(path)], output=OutputConfig(dir="o")))


def indexing(path: Path) -> Iterable[object]:
    return read_chunks(find_corpus(str(path)), 10)


def tasks(path: Path) -> Iterator[object]:
    data = str(path)
    yield read_task(ClassificationConfig(kind="classification", train=data, test=data), "t")
    yield read_task(StsConfig(kind="sts", data=data), "t")


def pairs(path: Path) -> Iterator[object]:
    yield read_task(PairClassificationConfig(kind="pair_classification", data=str(path)), "t")


def beir(path: Path) -> Iterator[object]:
    folder = path.parent / "beir"
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    content = path.read_bytes()
    (folder / "corpus.jsonl").write_bytes(content)
    (folder / "queries.jsonl").write_bytes(content if len(content) % 2 else as_line({"_id": "q", "text": "a"}))
    (folder / "qrels/test.tsv").write_bytes(b"query-id\tcorpus-id\tscore\nq\t1\t1\n" + content[: len(content) % 7])
    yield read_beir(folder)


READERS: list[Callable[[Path], Iterable[object]]] = [training, pretraining, encoding, indexing, tasks, pairs, beir]


def fuzz(folder: Path, cases: int, seed: int) -> int:
    """Read `cases` mutated files; returns how many were refused."""
    rng, num_refused = random.Random(seed), 0
    for case in range(cases):
        lines = [as_line(rng.choice(ROWS)) for _ in range(rng.randint(1, 4))]
        lines.insert(rng.randrange(len(lines) + 1), as_line(mutate_value(rng.choice(ROWS), rng, NAMES)))
        content = b"".join(lines)
        if case % 2:
            content = mutate_bytes(content, rng)
        path = folder / rng.choice(["a.jsonl", "a.jsonl", "a.json", "a.txt", "a.jsonl.gz"])
        if path.suffix == ".gz":
            content = mutate_bytes(gzip.compress(content, mtime=0), rng) if rng.random() < 0.7 else content
        path.write_bytes(content)
        for read in READERS:
            where = f"seed {seed}, case {case}, {read.__name__}"
            num_refused += refused(lambda p=path, r=read: deque(r(p), maxlen=0), (where, content[:500]))
    return num_refused


def test_mutated_rows_are_read_or_refused_in_one_line(tmp_path: Path) -> None:
    assert fuzz(tmp_path, 200, seed=1) > 200


@pytest.mark.slow
def test_many_mutated_rows_are_read_or_refused_in_one_line(tmp_path: Path) -> None:
    assert fuzz(tmp_path, 4000, seed=2) > 4000
