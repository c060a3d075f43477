"""Rows to fine-tune on: BGE's JSONL or sentence-transformers' columns, in one form."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import datasets

from lodestar.errors import DataError

_STRINGS, _SCORES = datasets.List(datasets.Value("string")), datasets.List(datasets.Value("float32"))


ROW_FEATURES = datasets.Features(
    {
        "query": datasets.Value("string"),
        "prompt": datasets.Value("string"),
        "type": datasets.Value("string"),
        "pos": _STRINGS,
        "pos_scores": _SCORES,
        "neg": _STRINGS,
        "neg_scores": _SCORES,
    }
)


TYPES = ("normal", "only_1neg", "symmetric_class", "symmetric_sts", "symmetric_clustering")


def check_row(where: str, row: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """A row of BGE's JSONL or of sentence-transformers' columns in one form; none for an empty query."""
    if row.get("query") is None and row.get("anchor") is not None:  # tables hold all columns in every row
        row = _from_columns(row)
    query = row.get("query")
    if not isinstance(query, str):
        raise DataError(f"{where}: query: must be a text, got {type(query).__name__} (a row has query, pos, neg)")
    kept: dict[str, Any] = {"query": query, "prompt": row.get("prompt"), "type": row.get("type") or "normal"}
    if kept["type"] not in TYPES:
        raise DataError(f"{where}: type: {kept['type']!r} is not known (one of {', '.join(TYPES)})")
    if not isinstance(kept["prompt"], (str, type(None))):
        raise DataError(f"{where}: prompt: must be a text, got {type(kept['prompt']).__name__}")
    for name in ("pos", "neg"):
        texts = row.get(name)
        texts = [] if texts is None and name == "neg" else texts
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise DataError(f"{where}: {name}: must be a list of texts, got {type(texts).__name__}")
        scores = row.get(f"{name}_scores") or []
        if scores and (not isinstance(scores, list) or len(scores) != len(texts)):
            raise DataError(
                f"{where}: {name}_scores: {len(scores)} scores for {len(texts)} texts (give one for each, or none)"
            )
        if not all(isinstance(score, (int, float)) and not isinstance(score, bool) for score in scores):
            raise DataError(f"{where}: {name}_scores: must be numbers")
        full = [i for i, text in enumerate(texts) if text.strip()]
        kept[name] = [texts[i] for i in full]
        kept[f"{name}_scores"] = [float(scores[i]) for i in full] if scores else []
    if not kept["pos"]:
        raise DataError(f"{where}: pos: must hold at least one text")
    return kept if query.strip() else None


def _from_columns(row: Mapping[str, Any]) -> dict[str, Any]:
    names = [name for name in row if name == "negative" or name.startswith("negative_")]
    return {
        "query": row["anchor"],
        "pos": [row.get("positive")],
        "neg": [row[name] for name in names if row[name] is not None],
    }


def content_hash(text: str) -> int:
    """63 bits by which equal texts are recognised, whatever instruction stands before them."""
    return int.from_bytes(hashlib.blake2b(text.strip().encode(), digest_size=8).digest(), "big") >> 1
