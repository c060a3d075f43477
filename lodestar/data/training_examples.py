"""Training examples of fine-tuning: FlagEmbedding's JSONL or sentence-transformers' columns, in one form."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import TypedDict

import datasets

from lodestar.data.findings import Findings
from lodestar.data.readers import Row
from lodestar.errors import DataError, closest, shown

SCORES = datasets.List(datasets.Value("float32"))
TYPES = ("normal", "only_1neg", "symmetric_class", "symmetric_sts", "symmetric_clustering")


class TrainingExample(TypedDict):
    """A query with its passages, as FlagEmbedding's JSONL has it."""

    query: str
    prompt: str | None
    """The query's instruction; none: the recipe's."""
    type: str
    """One of TYPES."""
    pos: list[str]
    pos_scores: list[float]
    """Of a teacher, one for each text; or empty."""
    neg: list[str]
    neg_scores: list[float]


_FIELDS = ("query", "pos", "neg", "pos_scores", "neg_scores", "prompt", "type")
_COLUMNS = ("anchor", "positive", "negative")
_MEANT = {
    "q": "query", "question": "query", "posi": "pos", "positive": "pos", "positives": "pos", "answer": "pos",
    "passage": "pos", "negs": "neg", "negative": "neg", "negatives": "neg", "hard_negatives": "neg",
    "instruction": "prompt",
}  # fmt: skip
"""Names that other tools use -> ours."""
_UNRELATED = ("id", "_id", "pos_id", "neg_id", "pos_ids", "neg_ids", "query_id", "title", "text", "types")
_LARGEST = 3.4e38
"""Of a float32, in which scores are kept."""


def check_row(where: str, row: Row, findings: Findings | None = None) -> TrainingExample | None:
    """The example in a row of FlagEmbedding's JSONL or of sentence-transformers' columns; none for an empty query.

    where      FILE:LINE; the DataError of a bad row begins with it
    findings   get what is odd in a row but may be meant
    """
    is_columns = row.get("query") is None and row.get("anchor") is not None  # tables hold all columns in every row
    columns = row if is_columns else None
    if columns is not None:
        row = _from_columns(where, columns)
    query, prompt, kind = row.get("query"), row.get("prompt"), row.get("type")
    if not isinstance(query, str):
        raise _missing(where, row, "query", "a text")
    kind = "normal" if kind is None or kind == "" else kind
    if kind not in TYPES:
        raise DataError(f"{where}: type: {shown(kind)} is not known (one of {', '.join(TYPES)})")
    if not isinstance(prompt, (str, type(None))):
        raise DataError(f"{where}: prompt: must be a text, got {type(prompt).__name__} (put it in quotes)")
    if row.get("pos") is None:
        raise _missing(where, row, "pos", "a list of texts")
    pos, pos_scores = _passages(where, "pos", row)
    if not pos:
        raise DataError(f"{where}: pos: must hold at least one text (add a passage that answers the query)")
    neg, neg_scores = _passages(where, "neg", row)
    if not query.strip():
        return None
    example = TrainingExample(
        query=query, prompt=prompt, type=kind, pos=pos, pos_scores=pos_scores, neg=neg, neg_scores=neg_scores
    )
    if findings is not None:
        _find(where, columns or row, example, findings, (*_COLUMNS, "query") if is_columns else _FIELDS)
    return example


def _missing(where: str, row: Row, field: str, expected: str) -> DataError:
    """For a required field that is absent or of another type: names the one that was meant."""
    if row.get(field) is None:
        for name in row:
            if row[name] is not None and _meant(name, _FIELDS) == field:
                return DataError(f"{where}: {field}: not set, but {shown(name)} is (call it {field})")
    got = type(row.get(field)).__name__
    return DataError(f"{where}: {field}: must be {expected}, got {got} (a row has query, pos, neg)")


@lru_cache(maxsize=10_000)
def _meant(name: str, known: tuple[str, ...]) -> str | None:
    """The known field that an unknown one seems to mean."""
    if name in known or name in _UNRELATED or (name.startswith("negative_") and "negative" in known):
        return None
    meant = _MEANT.get(name.lower())
    return meant if meant in known else closest(name, known, cutoff=0.75)


def _passages(where: str, name: str, row: Row) -> tuple[list[str], list[float]]:
    """The texts that are not blank, with their scores; DataError where they do not match."""
    texts, scores = ([] if row.get(key) is None else row[key] for key in (name, f"{name}_scores"))
    if not isinstance(texts, list):
        raise DataError(f"{where}: {name}: must be a list of texts, got {type(texts).__name__} (put it in [ ])")
    for i, text in enumerate(texts, 1):
        if not isinstance(text, str):
            raise DataError(
                f"{where}: {name}: must be a list of texts, but number {i} is {shown(text)} (correct or drop it)"
            )
    if not isinstance(scores, list):
        raise DataError(f"{where}: {name}_scores: must be a list of numbers, got {shown(scores)} (put it in [ ])")
    if scores and len(scores) != len(texts):
        problem = f"{len(scores)} scores for {len(texts)} texts"
        raise DataError(f"{where}: {name}_scores: {problem} (give one for each, or none)")
    for score in scores:
        if isinstance(score, bool) or not isinstance(score, (int, float)):
            raise DataError(f"{where}: {name}_scores: must be numbers, got {shown(score)} (correct or drop the row)")
        if not abs(score) <= _LARGEST:
            raise DataError(f"{where}: {name}_scores: must be finite, got {shown(score)} (correct or drop the row)")
    indices = [i for i, text in enumerate(texts) if text.strip()]
    return [texts[i] for i in indices], [float(scores[i]) for i in indices] if scores else []


def _from_columns(where: str, row: Row) -> Row:
    """A row of sentence-transformers' columns in FlagEmbedding's form."""
    names = ["anchor", "positive", *(name for name in row if name == "negative" or name.startswith("negative_"))]
    for name in names:
        value = row.get(name)
        if not isinstance(value, str) and (value is not None or name == "positive"):
            raise DataError(
                f"{where}: {name}: must be a text, got {type(value).__name__} (a row has anchor, positive, negative_1)"
            )
    return {
        "query": row["anchor"],
        "pos": [row["positive"]],
        "neg": [row[name] for name in names[2:] if row[name] is not None],
    }


def _find(where: str, row: Row, example: TrainingExample, findings: Findings, known: tuple[str, ...]) -> None:
    """Count what is odd in a row."""
    for name in row:
        if row[name] is not None and (meant := _meant(name, known)) and row.get(meant) is None:
            findings.add(where, name, f"unknown field, ignored; {meant!r} is not set", f"did you mean {meant!r}?")
    positives = {text.strip() for text in example["pos"]}
    if example["query"].strip() in positives:
        findings.add(where, "pos", "a query equals its own positive", "drop such rows")
    if any(text.strip() in positives for text in example["neg"]):
        findings.add(where, "neg", "a positive is among its row's negatives", "drop it from neg")


def instructions(kind: str, prompt: str | None, query: str, passage: str) -> tuple[str, str]:
    """What goes before the query and before each passage of a row, by its type and its own prompt.

    query, passage   the recipe's instructions
    """
    own = query if prompt is None else prompt
    return own, own if kind in ("symmetric_sts", "symmetric_clustering") else passage


def content_hash(text: str) -> int:
    """63 bits of the text without its instruction, by which equal texts are recognised."""
    return int.from_bytes(hashlib.blake2b(text.strip().encode(), digest_size=8).digest(), "big") >> 1
