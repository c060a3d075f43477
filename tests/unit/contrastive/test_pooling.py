"""One pooling everywhere: the training forward, sentence-transformers on the exported folder, and our embedder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from lodestar.data.padding import padded
from lodestar.errors import ModelError
from lodestar.models.load import load_tokenizer
from retrieval.embedding.embedder import Embedder
from tests import tiny
from tests.distributed import steps

TEXTS = [*tiny.texts(7, seed=5), "mask", "mask rows " * 40]
"""Of all lengths; the last is truncated."""


def task_of(folder: Path, stage: str, encoder: Path, *overrides: str) -> Any:
    """The training task of a recipe on that encoder, whose weights are saved to `folder`/model."""
    run_recipe = steps.recipe(stage, folder, f"model.encoder={encoder}", *overrides)
    task, _ = steps.built_task(run_recipe, 0, 1)
    task.module.eval()
    task.export(dict(task.module.named_parameters()), folder / "model", {})
    return task


def forward(module: Any, tokenizer: Any) -> np.ndarray:
    """The embeddings of TEXTS as training computes them."""
    ids = tokenizer(TEXTS, truncation=True, max_length=32)["input_ids"]
    with torch.no_grad():
        return module(padded(ids, tokenizer.pad_token_id), torch.tensor([len(row) for row in ids]))[0].numpy()


@pytest.mark.parametrize(
    ("family", "pooling"),
    [
        ("bert", "cls"),
        ("bert", "mean"),
        ("bert", "last_token"),
        ("decoder", "last_token"),
        ("bidirectional decoder", "mean"),
    ],
)
def test_the_exported_folder_gives_the_vectors_of_training(family: str, pooling: Any, tmp_path: Path) -> None:
    if family == "bert":
        encoder = tiny.encoder(tmp_path / "encoder", "bert")
    else:
        encoder = tiny.decoder(tmp_path / "encoder", **({} if family == "decoder" else {"is_causal": False}))
    task = task_of(tmp_path, "finetune", encoder, f"model.pooling={pooling}")
    tokenizer = load_tokenizer(steps.recipe("finetune", tmp_path, f"model.encoder={encoder}").model, pooling)
    expected_ND, folder = forward(task.module, tokenizer), tmp_path / "model"
    card = (folder / "README.md").read_text()
    words = {"cls": "[CLS] vector", "mean": "mean of", "last_token": "vector of the last token"}
    assert [word in card for word in words.values()] == [name == pooling for name in words]
    config = folder / "tokenizer_config.json"
    for side in ("right", "left"):
        config.write_text(json.dumps({**json.loads(config.read_text()), "padding_side": side}))
        opened = SentenceTransformer(str(folder), device="cpu")
        assert opened.tokenizer.padding_side == side
        ours_ND, theirs_ND = Embedder(folder).encode_documents(TEXTS), opened.encode_document(TEXTS)
        np.testing.assert_allclose(ours_ND, theirs_ND, rtol=0, atol=1e-6)
        if side == "right" or family != "bert":  # BERT counts positions from the first token, padding or not
            np.testing.assert_allclose(theirs_ND, expected_ND, rtol=0, atol=1e-6)
    assert not np.allclose(expected_ND[0], expected_ND[1], atol=1e-2)


def test_texts_that_begin_alike_differ_by_their_last_token(tmp_path: Path) -> None:
    encoder = tiny.decoder(tmp_path / "encoder")
    with pytest.raises(ModelError, match="is a causal decoder"):
        task_of(tmp_path, "finetune", encoder)
    task_of(tmp_path, "finetune", encoder, "model.pooling=last_token")
    a_D, b_D = Embedder(tmp_path / "model").encode_documents(["mask rows of a tensor", "mask rows of a graph"])
    assert a_D @ b_D < 0.999


def test_a_mean_pooled_encoder_is_trained_and_exported_with_its_own_pooling(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    encoder = tiny.with_pooling(tiny.encoder(tmp_path / "encoder", "bert"), pooling_mode="mean")
    task = task_of(tmp_path, "finetune", encoder)
    assert f"model.pooling: mean, as {encoder} embeds\n" in capsys.readouterr().err
    assert task.identity["pooling"] == "mean"
    values = json.loads((tmp_path / "model/1_Pooling/config.json").read_text())
    assert values["pooling_mode"] == "mean" and values["pooling_mode_mean_tokens"]
    assert [key for key, value in values.items() if value is True] == ["pooling_mode_mean_tokens", "include_prompt"]
    task_of(tmp_path, "finetune", encoder, "model.pooling=cls")
    assert "embeds by mean pooling; this run trains and saves cls pooling" in capsys.readouterr().err
    assert json.loads((tmp_path / "model/1_Pooling/config.json").read_text())["pooling_mode"] == "cls"


def test_stage_1_keeps_cls_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    encoder = tiny.with_pooling(tiny.encoder(tmp_path / "encoder", "bert"), pooling_mode="mean")
    task_of(tmp_path, "pretrain", encoder)
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert warnings == [
        f"warning: model.pooling: {encoder} embeds by mean pooling; this run trains and saves cls pooling"
    ]
    assert json.loads((tmp_path / "model/1_Pooling/config.json").read_text())["pooling_mode"] == "cls"
    assert "[CLS] vector" in (tmp_path / "model/README.md").read_text()
