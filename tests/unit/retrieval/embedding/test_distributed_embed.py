"""Embeddings on every rank: those of the model, whatever the number of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from lodestar.distributed.testing import run_world
from retrieval.embedding.distributed_embed import embed, embed_in_turns
from retrieval.embedding.load_model import load_model
from tests import tiny

TEXTS = tiny.texts(7, seed=5)


def test_embeddings_are_the_cls_vectors_in_the_order_of_the_texts_with_the_query_prompt(
    model_folder: Path,
) -> None:
    encoder, tokenizer = AutoModel.from_pretrained(model_folder).eval(), AutoTokenizer.from_pretrained(model_folder)
    for role, prompt in (("query", "search "), ("document", "")):
        got = embed(load_model(model_folder, "cpu"), TEXTS, role, batch_tokens=32)
        for row, text in zip(got, TEXTS, strict=True):  # one at a time: no padding, no sorting
            with torch.no_grad():
                cls = encoder(
                    **tokenizer(prompt + text, truncation=True, max_length=32, return_tensors="pt")
                ).last_hidden_state[0, 0]
            expected = torch.nn.functional.normalize(cls, dim=0)
            torch.testing.assert_close(row, expected, rtol=1e-4, atol=1e-5)  # batches change the order of sums


ORDERS = [range(5), [4, 0, 3, 1, 2], range(2), [1, 0], []]  # of 3 ranks, some have no text


@pytest.mark.parametrize("world_size", [1, 3])
def test_ranks_embed_in_turns_and_each_gets_all_in_order(world_size: int) -> None:
    for results in run_world(_embed_in_turns, world_size):
        for order, (embedding_ND, num_embedded) in zip(ORDERS, results, strict=True):
            assert torch.equal(embedding_ND, torch.arange(float(len(order)))[:, None].expand(-1, 3))
            assert num_embedded in (len(order) // world_size, -(-len(order) // world_size))


def _embed_in_turns(_rank: int, _world_size: int) -> list[tuple[torch.Tensor, int]]:
    results = []
    for order in ORDERS:
        own: list[int] = []

        def embed_indices(indices: Sequence[int], own: list[int] = own) -> torch.Tensor:
            own.extend(indices)
            return torch.tensor(own, dtype=torch.float32)[:, None].expand(-1, 3)

        results.append((embed_in_turns(order, embed_indices), len(own)))
    return results
