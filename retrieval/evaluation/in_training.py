"""Retrieval measured during training: all ranks embed a BEIR folder, whose texts are tokenized once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lodestar.config.schema import EvaluateConfig, TrainingRecipe
from lodestar.data.loader import cut
from lodestar.data.padding import padded
from lodestar.distributed.collectives import from_main
from lodestar.distributed.runtime import Runtime
from lodestar.training.engine import autocast
from retrieval.embedding.embed_in_turns import embed_in_turns
from retrieval.embedding.exact_search import distributed_search
from retrieval.embedding.protocols import EmbedTokens
from retrieval.evaluation.beir import read_beir
from retrieval.evaluation.metrics import evaluate_run


class InTrainingEvaluator:
    """A BEIR folder that measures the encoder in training."""

    def __init__(
        self,
        config: EvaluateConfig,
        tokenizer: PreTrainedTokenizerBase,
        runtime: Runtime,
        *,
        max_lengths: Mapping[str, int],
        prompts: Mapping[str, str],
    ) -> None:
        """max_lengths, prompts   by role: query, document"""
        assert config.data is not None
        self._beir = read_beir(
            config.data, config.split, max_queries=config.max_queries, max_documents=config.max_documents
        )
        self.name = Path(config.data).name
        self._batch_size, self._runtime, self._pad_id = config.batch_size, runtime, tokenizer.pad_token_id

        def token_ids(role: str, texts: Sequence[str]) -> list[list[int]]:
            texts_with_prompt = [prompts.get(role, "") + text for text in texts]
            return tokenizer(texts_with_prompt, truncation=True, max_length=max_lengths[role])["input_ids"]

        self._query_ids = token_ids("query", self._beir.queries)
        self._document_ids = token_ids("document", self._beir.documents)

    def measure(self, embed: EmbedTokens) -> dict[str, float]:
        """The metrics, the same on every rank; every rank must call."""
        query_QD, document_ND = (self._embed(embed, ids) for ids in (self._query_ids, self._document_ids))
        ranking = distributed_search(query_QD, document_ND, 100, self._runtime.device)
        return from_main(evaluate_run(self._beir, *ranking) if self._runtime.is_main else None)

    @torch.no_grad()
    def _embed(self, embed: EmbedTokens, token_ids: Sequence[Sequence[int]]) -> Tensor:
        """(N, D) fp32 on the CPU: the longest texts first, the same number of batches on every rank."""
        longest_first = sorted(range(len(token_ids)), key=lambda i: -len(token_ids[i]))
        most_per_rank = -(-len(token_ids) // self._runtime.world_size)
        num_batches = -(-most_per_rank // self._batch_size)

        def embed_indices(indices: Sequence[int]) -> Tensor:
            embeddings = []
            for batch_indices in cut(indices, num_batches):
                # With sharded parameters all ranks must embed together: a rank without texts embeds any text.
                ids = [token_ids[i] for i in batch_indices or longest_first[:1]]
                input_ids_BL, length_B = padded(ids, self._pad_id), torch.tensor([len(row) for row in ids])  # type: ignore[arg-type]
                embedding_BD = embed(input_ids_BL.to(self._runtime.device), length_B.to(self._runtime.device))
                embeddings.append(embedding_BD[: len(batch_indices)].float())
            return torch.cat(embeddings)

        return embed_in_turns(longest_first, embed_indices)


def in_training_evaluation(
    recipe: TrainingRecipe,
    tokenizer: PreTrainedTokenizerBase,
    runtime: Runtime,
    embed: EmbedTokens,
    *,
    prompts: Mapping[str, str],
) -> Callable[[], dict[str, Any]] | None:
    """Evaluates `embed`, under the run's autocast, on evaluate.data; none where the recipe names no data.

    prompts   by role: query, document
    """
    if not recipe.evaluate.data:
        return None
    max_lengths = {"query": recipe.model.max_length, "document": recipe.model.max_length}
    evaluator = InTrainingEvaluator(recipe.evaluate, tokenizer, runtime, max_lengths=max_lengths, prompts=prompts)

    def embed_under_autocast(ids_BL: Tensor, lengths_B: Tensor) -> Tensor:
        with autocast(runtime.device, recipe.precision):
            return embed(ids_BL, lengths_B)

    return lambda: {"evaluation": evaluator.name, **evaluator.measure(embed_under_autocast)}
