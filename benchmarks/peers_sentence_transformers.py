"""sentence-transformers, for `make bench-peers`.

python -m benchmarks.peers_sentence_transformers finetune|gradcache|encode PROBLEM.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
)

from benchmarks.peers_worker import mixed_precision, serve

COLUMNS: tuple[str, ...] = ("anchor", "positive", "negative")


def finetune(problem: dict[str, Any], loss_class: Any = MultipleNegativesRankingLoss) -> Callable[[int], object]:
    """A step as its Trainer takes it: collator, loss, gradient, clipping, AdamW."""
    model = SentenceTransformer(problem["model"], device="cpu")
    model.max_seq_length = problem["passage_tokens"]
    mixed_precision(model, problem["precision"])
    loss = loss_class(model, scale=1 / problem["temperature"])
    collate = SentenceTransformerDataCollator(model.preprocess)
    rows = [dict(zip(COLUMNS, triple, strict=True)) for triple in problem["triples"]]
    loss.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step(i: int) -> None:
        batch = collate(rows)
        features = [
            {key.removeprefix(f"{name}_"): value for key, value in batch.items() if key.startswith(f"{name}_")}
            for name in COLUMNS
        ]
        loss(features, None).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def gradcache(problem: dict[str, Any]) -> Callable[[int], object]:
    return finetune(problem, CachedMultipleNegativesRankingLoss)


def encode(problem: dict[str, Any]) -> Callable[[int], object]:
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[problem["precision"]]
    model = SentenceTransformer(problem["model"], device="cpu", model_kwargs={"dtype": dtype})
    return lambda i: model.encode_document(problem["texts"], show_progress_bar=False)


if __name__ == "__main__":
    torch.set_num_threads(1)
    command = {"finetune": finetune, "gradcache": gradcache, "encode": encode}[sys.argv[1]]
    serve(command(json.loads(Path(sys.argv[2]).read_text())))
