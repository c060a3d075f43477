"""The texts of a mining run on the disk: queries, and a corpus that holds each text once.

Shape suffix: N texts of the corpus.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np

from lodestar.data.findings import Findings
from lodestar.data.readers import find_sources, read_json, read_rows
from lodestar.data.training_examples import check_row, content_hash
from lodestar.errors import DataError
from lodestar.files import kept_file_problem, make_folder, read_object, replacing_hashed_file
from retrieval.embedding.corpus import files_of, read_texts
from retrieval.embedding.model_folder import fingerprint
from retrieval.mining.config import MineRecipe

CORPUS, QUERIES = "corpus", "queries"
"""NAME.jsonl in the folder, and the folder of their embeddings."""
_TEXT_FILES = (f"{QUERIES}.jsonl", f"{CORPUS}.jsonl", "hashes.npy")


class MiningTexts(NamedTuple):
    folder: Path
    """Named by everything that decides what is in it."""
    candidates: int
    """The first so many texts of the corpus; the others are positives alone."""
    queries: int


def check_files(recipe: MineRecipe) -> None:
    """DataError where a file is missing, or is at once an input and the output, or training data and corpus."""
    corpus = recipe.corpus_recipe
    data = {os.path.realpath(source.path) for source in find_sources(recipe.data, "data")}
    texts = {os.path.realpath(source.path) for source in find_sources(files_of(corpus) if corpus else [], "corpus")}
    if os.path.realpath(recipe.output) in data | texts:
        raise DataError(f"output: {recipe.output}: is also an input (name another file)")
    if data & texts:
        remedy = "name files with one text in each row, or leave corpus out to mine from all passages of data"
        raise DataError(f"corpus: {min(data & texts)}: is also training data ({remedy})")


def read_examples(recipe: MineRecipe, findings: Findings | None = None) -> Iterator[Mapping[str, Any]]:
    """The checked examples of `data`, in order, without those whose query is empty."""
    for source in find_sources(recipe.data, "data"):
        for location, row in read_rows(source):
            example = check_row(location, row, findings)
            if example is not None:
                yield example


def write_texts(recipe: MineRecipe) -> MiningTexts:
    """Write the texts, unless an earlier run did."""
    folder = recipe.work / _key(recipe)
    counts_file = folder / "texts.json"
    problems = {path: kept_file_problem(path) for path in (counts_file, *(folder / name for name in _TEXT_FILES))}
    if any(problems.values()):
        for path, problem in problems.items() if counts_file.exists() else ():
            if problem:
                print(f"warning: {path}: {problem} (nothing to do: written again)", file=sys.stderr, flush=True)
        make_folder(folder, "output")
        queries = _write_queries(recipe, folder)
        if not queries:
            raise DataError(f"data: {', '.join(recipe.data)}: no row (name files with query and pos)")
        candidates = _write_corpus(recipe, folder)
        if not candidates:
            raise DataError(f"corpus: {', '.join(recipe.corpus or [])}: holds no text (name files with texts)")
        with replacing_hashed_file(counts_file) as tmp:  # last: without it the texts are unfinished
            tmp.write_text(json.dumps({"candidates": candidates, "queries": queries}), encoding="utf-8")
    counts = read_object(counts_file)
    return MiningTexts(folder, counts["candidates"], counts["queries"])


def _key(recipe: MineRecipe) -> str:
    corpus = recipe.corpus_recipe
    sources = [find_sources(recipe.data, "data"), find_sources(files_of(corpus) if corpus else [], "corpus")]
    fingerprints = [[source.fingerprint for source in group] for group in sources]
    encode = recipe.encode.model_dump(include={"precision", "shard_rows"})
    content = json.dumps([fingerprints, fingerprint(recipe.model, recipe.prompts), encode])
    return hashlib.blake2b(content.encode(), digest_size=8).hexdigest()


def _write_corpus(recipe: MineRecipe, folder: Path) -> int:
    """Each text once: the candidates, whose number it returns, then the other positives."""
    hashes: dict[int, None] = {}  # as an ordered set
    with replacing_hashed_file(folder / f"{CORPUS}.jsonl") as tmp, tmp.open("w", encoding="utf-8") as file:
        _write_new(_candidates(recipe), hashes, file)
        candidates = len(hashes)
        _write_new((text for example in read_examples(recipe) for text in example["pos"]), hashes, file)
    with replacing_hashed_file(folder / "hashes.npy") as tmp, tmp.open("wb") as file:
        np.save(file, np.fromiter(hashes, dtype=np.int64, count=len(hashes)))
    return candidates


def _candidates(recipe: MineRecipe) -> Iterator[str]:
    if corpus := recipe.corpus_recipe:
        yield from (text for _, text in read_texts(corpus))
        return
    for example in read_examples(recipe):
        yield from example["pos"]
        yield from example["neg"]


def _write_new(texts: Iterable[str], hashes: dict[int, None], file: TextIO) -> None:
    for text in texts:
        if text.strip() and (content := content_hash(text)) not in hashes:
            hashes[content] = None
            file.write(json.dumps({"text": text}) + "\n")


def _write_queries(recipe: MineRecipe, folder: Path) -> int:
    count, findings = 0, Findings()
    with replacing_hashed_file(folder / f"{QUERIES}.jsonl") as tmp, tmp.open("w", encoding="utf-8") as file:
        for example in read_examples(recipe, findings):
            file.write(json.dumps({"text": example["query"]}) + "\n")
            count += 1
    findings.print()
    return count


class CorpusRows:
    """Which row of the corpus a text is."""

    def __init__(self, folder: Path) -> None:
        """folder   as `MiningTexts` names it"""
        hashes_N = np.load(folder / "hashes.npy")
        self._order_N = np.argsort(hashes_N)
        self._sorted_N = hashes_N[self._order_N]

    def find(self, text: str) -> int | None:
        """None for a text that is not in the corpus."""
        content = content_hash(text)
        place = int(np.searchsorted(self._sorted_N, content))
        if place == len(self._sorted_N) or self._sorted_N[place] != content:
            return None
        return int(self._order_N[place])

    def of(self, texts: Sequence[str]) -> list[int]:
        """Of texts that are all in the corpus, as positives are."""
        rows = [row for text in texts if (row := self.find(text)) is not None]
        assert len(rows) == len(texts)
        return rows


def read_corpus_texts(folder: Path, rows: Collection[int]) -> dict[int, str]:
    """The texts of some rows of the corpus."""
    texts = read_json(folder / f"{CORPUS}.jsonl")
    return {number: row["text"] for number, (_, row) in enumerate(texts) if number in rows}
