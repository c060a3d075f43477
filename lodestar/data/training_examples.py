"""Training examples of fine-tuning: FlagEmbedding's JSONL or sentence-transformers' columns, in one form."""

from __future__ import annotations

import hashlib
from typing import TypedDict

import datasets

from lodestar.data.readers import Row
from lodestar.errors import DataError

_TEXTS, SCORES = datasets.List(datasets.Value("string")), datasets.List(datasets.Value("float32"))

ROW_FEATURES = datasets.Features(
    {
        "query": datasets.Value("string"),
        "prompt": datasets.Value("string"),
        "type": datasets.Value("string"),
        "pos": _TEXTS,
        "pos_scores": SCORES,
        "neg": _TEXTS,
        "neg_scores": SCORES,
    }
)


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


def check_row(where: str, row: Row) -> TrainingExample | None:
    """The example in a row of FlagEmbedding's JSONL or of sentence-transformers' columns; none for an empty query.

    where   FILE:LINE; the DataError of a bad row begins with it
    """
    if row.get("query") is None and row.get("anchor") is not None:  # tables hold all columns in every row
        row = _from_columns(row)
    query, prompt, kind = row.get("query"), row.get("prompt"), row.get("type") or "normal"
    if not isinstance(query, str):
        raise DataError(f"{where}: query: must be a text, got {type(query).__name__} (a row has query, pos, neg)")
    if kind not in TYPES:
        raise DataError(f"{where}: type: {kind!r} is not known (one of {', '.join(TYPES)})")
    if not isinstance(prompt, (str, type(None))):
        raise DataError(f"{where}: prompt: must be a text, got {type(prompt).__name__}")
    pos, pos_scores = _passages(where, "pos", row.get("pos"), row.get("pos_scores") or [])
    if not pos:
        raise DataError(f"{where}: pos: must hold at least one text")
    neg, neg_scores = _passages(where, "neg", [] if row.get("neg") is None else row["neg"], row.get("neg_scores") or [])
    if not query.strip():
        return None
    return TrainingExample(
        query=query, prompt=prompt, type=kind, pos=pos, pos_scores=pos_scores, neg=neg, neg_scores=neg_scores
    )


def _passages(where: str, name: str, texts: object, scores: object) -> tuple[list[str], list[float]]:
    """The texts that are not blank, with their scores; DataError where they do not match."""
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise DataError(f"{where}: {name}: must be a list of texts, got {type(texts).__name__}")
    count = len(scores) if isinstance(scores, list) else 1
    if scores and (not isinstance(scores, list) or count != len(texts)):
        raise DataError(f"{where}: {name}_scores: {count} scores for {len(texts)} texts (give one for each, or none)")
    scores = scores if isinstance(scores, list) else []
    if not all(isinstance(score, (int, float)) and not isinstance(score, bool) for score in scores):
        raise DataError(f"{where}: {name}_scores: must be numbers")
    indices = [i for i, text in enumerate(texts) if text.strip()]
    return [texts[i] for i in indices], [float(scores[i]) for i in indices] if scores else []


def _from_columns(row: Row) -> Row:
    """A row of sentence-transformers' columns in FlagEmbedding's form."""
    names = [name for name in row if name == "negative" or name.startswith("negative_")]
    return {
        "query": row["anchor"],
        "pos": [row.get("positive")],
        "neg": [row[name] for name in names if row[name] is not None],
    }


def content_hash(text: str) -> int:
    """63 bits of the text without its instruction, by which equal texts are recognised."""
    return int.from_bytes(hashlib.blake2b(text.strip().encode(), digest_size=8).digest(), "big") >> 1
