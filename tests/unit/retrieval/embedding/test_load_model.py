"""Model folders that are refused, and what a fingerprint depends on."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lodestar.errors import ModelError
from retrieval.embedding.encode_texts import encode_texts
from retrieval.embedding.load_model import load_model
from retrieval.embedding.model_folder import fingerprint
from tests import tiny

TEXTS = tiny.texts(7, seed=5)


def test_a_bare_encoder_is_refused_because_its_pooling_would_be_guessed(model_folder: Path) -> None:
    with pytest.raises(ModelError, match=r"no modules\.json there"):
        load_model(model_folder.parent / "plain", "cpu")


def test_a_folder_without_one_of_its_tensors_is_refused_and_one_without_a_pooler_is_not(
    model_folder: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(model_folder, copy)
    tensors = load_file(copy / "model.safetensors")
    without_pooler = {name: tensor for name, tensor in tensors.items() if "pooler" not in name}
    save_file(without_pooler, copy / "model.safetensors", {"format": "pt"})
    expected, got = (encode_texts(load_model(path, "cpu"), TEXTS, "document") for path in (model_folder, copy))
    assert torch.equal(got.vectors_ND, expected.vectors_ND)
    without_pooler.pop("encoder.layer.1.output.dense.bias")
    save_file(without_pooler, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"encoder\.layer\.1\.output\.dense\.bias not in its files"):
        load_model(copy, "cpu")


def test_a_folder_without_its_tokenizers_files_is_an_error(model_folder: Path, tmp_path: Path) -> None:
    """transformers would make up a tokenizer, to which every text is [UNK]."""
    shutil.copytree(model_folder, tmp_path / "model")
    for path in (tmp_path / "model").glob("*token*"):
        path.unlink()
    with pytest.raises(ModelError, match="has no tokenizer files"):
        load_model(tmp_path / "model", "cpu")


def test_a_fingerprint_changes_with_all_that_decides(model_folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    shutil.copytree(model_folder, copy)
    assert fingerprint(str(copy)) == fingerprint(str(model_folder))
    (copy / "README.md").write_text("another card")
    assert fingerprint(str(copy)) == fingerprint(str(model_folder))
    (copy / "1_Pooling/config.json").write_text('{"pooling_mode": "mean"}')
    assert fingerprint(str(copy)) != fingerprint(str(model_folder))
