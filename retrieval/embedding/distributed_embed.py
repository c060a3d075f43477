"""Embeddings of the same texts on every rank, by a trained model and from its cache.

Shape suffixes: N texts, D embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor

from lodestar.config.schema import Precision
from lodestar.distributed.collectives import agreed
from retrieval.embedding.cache import cache_path, load_or_compute
from retrieval.embedding.config import Role
from retrieval.embedding.embed_in_turns import embed_in_turns
from retrieval.embedding.encode_texts import encode_texts

CACHE_SHARD_ROWS = 100_000
"""Rows of one file of the embedding cache. An interrupted run repeats at most this many on each rank."""


def embed(
    model: SentenceTransformer,
    texts: Sequence[str],
    role: Role,
    *,
    folder: Path | None = None,
    batch_tokens: int | None = None,
    precision: Precision = "fp32",
    progress: bool = False,
) -> Tensor:
    """(N, D) fp32 on the CPU, on every rank, with the model's own prompt for the role ("text": without any).

    folder   caches this model's embeddings, one file per CACHE_SHARD_ROWS; none: no cache
    """
    encode = partial(encode_texts, batch_tokens=batch_tokens, precision=precision, progress=progress)

    def embed_indices(indices: Sequence[int]) -> Tensor:
        shards = []
        with agreed():
            for start in range(0, max(1, len(indices)), CACHE_SHARD_ROWS):
                part = [texts[i] for i in indices[start : start + CACHE_SHARD_ROWS]]
                file = cache_path(folder, role, precision, texts=part) if folder else None
                shards.append(load_or_compute(file, len(part), lambda part=part: encode(model, part, role).vectors_ND))
        return shards[0] if len(shards) == 1 else torch.cat(shards)

    return embed_in_turns(range(len(texts)), embed_indices)
