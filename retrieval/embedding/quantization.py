"""Embeddings as smaller numbers, as sentence-transformers quantises them.

Shape suffixes: N texts, D embedding width.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
from sentence_transformers.util import quantize_embeddings

from lodestar.files import NO_SUCH_FILE, kept_file_problem, read_object, replacing_hashed_file
from retrieval.embedding.config import Dtype, EncodeRecipe
from retrieval.embedding.corpus import no_rows, read_texts

RANGES = "ranges.json"
CALIBRATION_ROWS = 1000


def quantize(vectors_ND: np.ndarray, dtype: Dtype, ranges_2D: np.ndarray | None) -> np.ndarray:
    """(N, D) of the dtype, for binary (N, D / 8); values outside the ranges are clipped."""
    if dtype in ("float32", "float16"):
        return vectors_ND.astype(dtype)
    if ranges_2D is not None:
        vectors_ND = np.clip(vectors_ND, ranges_2D[0], ranges_2D[1])
    return quantize_embeddings(vectors_ND, precision=dtype, ranges=ranges_2D)  # type: ignore[arg-type, return-value]


def calibrate(recipe: EncodeRecipe, key: str, embed: Callable[[list[str]], np.ndarray]) -> list[list[float]]:
    """The smallest and the largest value of each dimension in the first rows; saved, so that a restart uses the same.

    key   of the embeddings; ranges saved under another key are replaced
    """
    path = Path(recipe.output.dir) / RANGES
    problem = kept_file_problem(path)
    saved = read_object(path) if problem is None else {}
    if problem not in (None, NO_SUCH_FILE):
        print(f"warning: {path}: {problem} (nothing to do: measured again)", file=sys.stderr, flush=True)
    if saved.get("key") != key:
        texts = [text for _, text in islice(read_texts(recipe), CALIBRATION_ROWS)]
        if not texts:
            raise no_rows(recipe)
        vectors_ND = embed(texts)
        saved = {"key": key, "ranges": [vectors_ND.min(0).tolist(), vectors_ND.max(0).tolist()]}
        with replacing_hashed_file(path) as tmp:
            tmp.write_text(json.dumps(saved), encoding="utf-8")
    return saved["ranges"]
