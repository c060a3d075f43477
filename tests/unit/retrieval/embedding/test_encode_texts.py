"""Texts to embeddings on one device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lodestar.errors import ModelError
from retrieval.embedding.encode_texts import cut_batches, encode_texts
from retrieval.embedding.load_model import load_model
from tests import tiny


def test_embeddings_that_are_not_numbers_are_an_error_not_a_low_score(model_folder: Path) -> None:
    model = load_model(model_folder, "cpu")
    with torch.no_grad():
        next(model.parameters()).fill_(torch.nan)
    with pytest.raises(ModelError, match="not all are finite"):
        encode_texts(model, ["mask"], "document")


def test_truncated_texts_are_counted(model_folder: Path) -> None:
    model = load_model(model_folder, "cpu")
    assert encode_texts(model, ["mask", "mask " * 30, "mask " * 31, "mask " * 100], "document").truncated == 2


@pytest.mark.parametrize("include_prompt", [True, False])
def test_texts_of_any_length_are_embedded_as_sentence_transformers_does(
    include_prompt: bool, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("retrieval.embedding.encode_texts.CHUNK", 7)
    model = load_model(model_folder, "cpu")
    model.prompts = {"query": "mask the", "passage": "a text:", "default": "cover"}
    model.default_prompt_name = "default"
    model.set_pooling_include_prompt(include_prompt)
    texts = [*tiny.texts(20, seed=3), "", "mask " * 100]
    for role, encode in (("query", model.encode_query), ("document", model.encode_document)):
        expected_ND = torch.from_numpy(encode(texts, batch_size=1))
        vectors_ND = encode_texts(model, texts, role, batch_tokens=64).vectors_ND
        torch.testing.assert_close(vectors_ND, expected_ND, rtol=0, atol=1e-6)
    plain_ND = encode_texts(model, texts, "text").vectors_ND
    torch.testing.assert_close(plain_ND, torch.from_numpy(model.encode(texts, prompt="")), rtol=0, atol=1e-6)
    assert (plain_ND - vectors_ND).abs().max() > 1e-3


def test_batches_keep_to_the_budget_and_hold_each_text_once() -> None:
    lengths = [3, 50, 8, 8, 20, 7]
    order = sorted(range(6), key=lengths.__getitem__, reverse=True)
    batches = [list(batch) for batch in cut_batches(order, lengths, 24)]
    assert batches == [[1], [4], [2, 3, 5], [0]]  # the longest has a batch of its own although it is over the budget


CASES = {
    "cls": {},
    "mean": {"pooling_mode": "mean"},
    "two poolings": {"pooling_mode": ("cls", "mean")},
    "without the prompt": {"include_prompt": False},
}


@pytest.mark.parametrize("case", [*CASES, "left padding", "another module"])
def test_the_last_layer_computes_what_the_pooling_reads(case: str, model_folder: Path) -> None:
    model: Any = load_model(model_folder, "cpu")
    for name, value in CASES.get(case, {}).items():
        setattr(model[1], name, value)
    if case == "left padding":
        model.tokenizer.padding_side = "left"
    if case == "another module":
        model.append(nn.Identity())
    texts = tiny.texts(5, seed=3)
    expected_ND = model.encode_document(texts, convert_to_tensor=True)
    padded = model.preprocess(texts)["attention_mask"].numel()
    counts = tiny.tokens_of_last_layer(model[0].model)
    vectors_ND = encode_texts(model, texts, "document").vectors_ND
    torch.testing.assert_close(vectors_ND, expected_ND, rtol=0, atol=1e-6)
    assert counts == [5 if case == "cls" else padded]
    assert model.encode(texts[0], output_value="token_embeddings").shape[0] > 1  # the model itself is as it was


def test_an_error_leaves_the_model_as_it_was(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = load_model(model_folder, "cpu")
    monkeypatch.setattr(model[0].model.encoder.layer[-1].output, "forward", None)
    with pytest.raises(TypeError):
        encode_texts(model, ["mask"], "document")
    monkeypatch.undo()
    assert model.encode("mask the cover", output_value="token_embeddings").shape[0] > 1
