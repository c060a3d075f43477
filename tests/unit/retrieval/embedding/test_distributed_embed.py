"""Embeddings by a trained model, beside those of transformers."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModel, AutoTokenizer

from retrieval.embedding.distributed_embed import embed
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
