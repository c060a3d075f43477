"""Retrieval during training: texts embedded by all ranks, tokenized once, measured on a BEIR folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lodestar.config.schema import EvaluateConfig, TrainingRecipe
from lodestar.data.loader import cut, padded
from lodestar.distributed.collectives import from_main, gather_rows
from lodestar.distributed.runtime import Runtime
from lodestar.training.engine import autocast
from retrieval.embedding.exact_search import search_together
from retrieval.evaluation.beir import read_beir
from retrieval.evaluation.metrics import evaluate_run

Embed = Callable[[Tensor, Tensor], Tensor]
"""(B, L) ids, (B,) lengths -> (B, D) unit vectors, fp32."""


class InTrainingEvaluator:
    """A BEIR folder, and the numbers that an encoder reaches on it."""

    def __init__(
        self,
        section: EvaluateConfig,
        tokenizer: PreTrainedTokenizerBase,
        runtime: Runtime,
        *,
        max_lengths: Mapping[str, int],
        prompts: Mapping[str, str],
    ) -> None:
        """max_lengths, prompts   by role: query, document"""
        assert section.data is not None
        self._beir = read_beir(
            section.data, section.split, max_queries=section.max_queries, max_documents=section.max_documents
        )
        self.name = Path(section.data).name
        self._batch_size, self._runtime, self._fill = section.batch_size, runtime, tokenizer.pad_token_id
        texts = {"query": self._beir.queries, "document": self._beir.documents}
        self._ids = {
            role: tokenizer(
                [prompts.get(role, "") + text for text in those], truncation=True, max_length=max_lengths[role]
            )["input_ids"]
            for role, those in texts.items()
        }

    def measure(self, embed: Embed) -> dict[str, float]:
        """The metrics, the same on every rank; every rank must call."""
        query_QD, document_ND = (self._embed(embed, self._ids[role]) for role in ("query", "document"))
        run = search_together(query_QD, document_ND, 100, self._runtime.device)
        return from_main(evaluate_run(self._beir, *run) if self._runtime.is_main else None)

    @torch.no_grad()
    def _embed(self, embed: Embed, ids: Sequence[Sequence[int]]) -> Tensor:
        """(N, D) fp32 on the CPU: texts sorted by length, dealt out to the ranks in turn, as many batches on each."""
        size, device = self._runtime.world_size, self._runtime.device
        by_length = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
        dealt = [by_length[rank::size] for rank in range(size)]
        mine = dealt[self._runtime.rank]
        parts = []
        for run in cut(mine, -(-len(dealt[0]) // self._batch_size)):
            chosen = list(run) or by_length[:1]  # sharded parameters are gathered by all ranks distributed_session
            rows = padded([ids[i] for i in chosen], self._fill)  # type: ignore[arg-type]
            lengths = torch.tensor([len(ids[i]) for i in chosen])
            parts.append(embed(rows.to(device), lengths.to(device))[: len(run)].float())
        gathered = gather_rows(torch.cat(parts), [len(rows) for rows in dealt]).cpu()
        result = torch.empty_like(gathered)
        result[torch.tensor([i for rows in dealt for i in rows])] = gathered
        return result


def in_training_evaluation(
    recipe: TrainingRecipe,
    tokenizer: PreTrainedTokenizerBase,
    runtime: Runtime,
    embed: Embed,
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
