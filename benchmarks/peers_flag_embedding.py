"""FlagEmbedding 1.4.2 and RetroMAE as its authors published it, in the environment that `make bench-peers` makes.

    python -m benchmarks.peers_flag_embedding finetune|pretrain PROBLEM.json

RetroMAE's code is the package retromae_pretrain of FlagEmbedding 1.2.11, unchanged: its collator, its model, its loss.
It needs the transformers of its day, which lies beside it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer

from benchmarks.peers_worker import mixed_precision, serve

RETROMAE = Path(".venv-peers/retromae/FlagEmbedding/baai_general_embedding")


def finetune(problem: dict[str, Any]) -> Callable[[int], object]:
    from FlagEmbedding.abc.finetune.embedder.AbsDataset import AbsEmbedderCollator  # type: ignore[import-not-found]
    from FlagEmbedding.finetune.embedder.encoder_only.base import (  # type: ignore[import-not-found]
        BiEncoderOnlyEmbedderModel,
    )

    tokenizer = AutoTokenizer.from_pretrained(problem["encoder"])
    model = BiEncoderOnlyEmbedderModel(
        AutoModel.from_pretrained(problem["encoder"]), tokenizer=tokenizer, temperature=problem["temperature"],
        normalize_embeddings=True,
    )  # fmt: skip
    collate = AbsEmbedderCollator(
        tokenizer, query_max_len=problem["query_tokens"], passage_max_len=problem["passage_tokens"]
    )
    rows = [(query, passages, None) for query, *passages in problem["triples"]]
    return _step(model, problem["precision"], lambda: model(**collate(rows)).loss)


def pretrain(problem: dict[str, Any]) -> Callable[[int], object]:
    sys.path.insert(0, str(RETROMAE))
    from retromae_pretrain.data import RetroMAECollator  # type: ignore[import-not-found]
    from retromae_pretrain.modeling import RetroMAEForPretraining  # type: ignore[import-not-found]

    tokenizer = AutoTokenizer.from_pretrained(problem["encoder"])
    model = RetroMAEForPretraining(AutoModelForMaskedLM.from_pretrained(problem["encoder"]), None)
    collate = RetroMAECollator(
        tokenizer, encoder_mlm_probability=0.3, decoder_mlm_probability=0.5, max_seq_length=problem["max_tokens"]
    )
    return _step(model, problem["precision"], lambda: model(**collate(problem["texts"]))[0])


def _step(model: torch.nn.Module, precision: str, loss_of_batch: Callable[[], torch.Tensor]) -> Callable[[int], object]:
    """A step as transformers' Trainer takes it: gradient, clipping, AdamW."""
    mixed_precision(model, precision)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step(i: int) -> None:
        loss_of_batch().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


if __name__ == "__main__":
    torch.set_num_threads(1)
    serve({"finetune": finetune, "pretrain": pretrain}[sys.argv[1]](json.loads(Path(sys.argv[2]).read_text())))
