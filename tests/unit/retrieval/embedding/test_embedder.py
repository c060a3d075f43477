"""Texts to embeddings, on one device and on several."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from lodestar.errors import ConfigError, ModelError
from retrieval.embedding.embedder import Embedder
from retrieval.embedding.encode_texts import cut_batches, encode_texts
from retrieval.embedding.load_model import load_model
from retrieval.embedding.model_folder import fingerprint
from tests import tiny

TEXTS = [*tiny.texts(40, seed=5), "", "mask " * 100]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    return tiny.trained(root / "model", root / "plain")


@pytest.mark.parametrize("devices", [None, ["cpu", "cpu"]])
def test_embeddings_are_sentence_transformers_own_with_the_prompt_of_each_role(
    devices: list[str] | None, folder: Path
) -> None:
    theirs = SentenceTransformer(str(folder), device="cpu")
    with Embedder(folder, devices, batch_tokens=200) as embedder:
        for ours, expected in (
            (embedder.encode_queries(TEXTS), theirs.encode_query(TEXTS)),
            (embedder.encode_documents(TEXTS), theirs.encode_document(TEXTS)),
        ):
            assert ours.dtype == np.float32 and ours.shape == expected.shape
            np.testing.assert_allclose(ours, expected, atol=1e-6)
        assert not np.allclose(embedder.encode_queries(TEXTS), embedder.encode_documents(TEXTS))
        assert embedder.encode_queries([]).shape == (0, 32)


def test_a_single_text_and_an_array_of_texts_serve(folder: Path) -> None:
    embedder = Embedder(folder)
    np.testing.assert_array_equal(embedder.encode_queries(TEXTS[0]), embedder.encode_queries(TEXTS[:1])[0])
    assert embedder.encode_queries(np.array(TEXTS[:3])).shape == (3, 32)


def test_a_fingerprint_changes_with_all_that_decides(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    shutil.copytree(folder, copy)
    assert fingerprint(str(copy)) == fingerprint(str(folder))
    (copy / "README.md").write_text("another card")
    assert fingerprint(str(copy)) == fingerprint(str(folder))
    (copy / "1_Pooling/config.json").write_text('{"pooling_mode": "mean"}')
    assert fingerprint(str(copy)) != fingerprint(str(folder))


def test_fewer_dimensions_are_normalised_again(folder: Path) -> None:
    whole, narrow = (Embedder(folder, width=width).encode_documents(TEXTS) for width in (None, 8))
    np.testing.assert_allclose(narrow, whole[:, :8] / np.linalg.norm(whole[:, :8], axis=1, keepdims=True), rtol=1e-5)


def test_texts_that_are_cut_are_counted(folder: Path) -> None:
    model = load_model(folder, "cpu")
    assert encode_texts(model, ["mask", "mask " * 30, "mask " * 31, "mask " * 100], "document").truncated == 2


def test_batches_keep_to_the_budget_and_hold_each_text_once() -> None:
    lengths = [3, 50, 8, 8, 20, 7]
    order = sorted(range(6), key=lengths.__getitem__, reverse=True)
    batches = [list(batch) for batch in cut_batches(order, lengths, 24)]
    assert batches == [[1], [4], [2, 3, 5], [0]]  # the longest has a batch of its own although it is over the budget


def test_a_stream_keeps_the_order_of_its_jobs(folder: Path) -> None:
    jobs = [TEXTS[i : i + 5] for i in range(0, 40, 5)]
    with Embedder(folder, ["cpu", "cpu"]) as embedder:
        vectors = [embeddings.vectors_ND.numpy() for embeddings in embedder.stream((job, "document") for job in jobs)]
    np.testing.assert_allclose(np.concatenate(vectors), Embedder(folder).encode_documents(TEXTS[:40]), atol=1e-6)


def test_a_device_that_is_not_there_and_a_folder_without_a_model_are_one_line(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cuda:99: this machine has"):
        Embedder(folder, ["cuda:99"])
    with pytest.raises(ConfigError, match="unknown kind of device"):
        Embedder(folder, ["gpu1"])
    shutil.copytree(folder, tmp_path / "torn")
    weights = tmp_path / "torn/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="cannot be opened"):
        Embedder(tmp_path / "torn")
    for devices in (None, ["cpu", "cpu"]):
        with pytest.raises(ModelError, match="no such folder"):
            Embedder(tmp_path / "absent", devices)


def test_a_folder_without_its_tokenizers_files_is_an_error(folder: Path, tmp_path: Path) -> None:
    """transformers would make up a tokenizer, to which every text is [UNK]."""
    shutil.copytree(folder, tmp_path / "model")
    for path in (tmp_path / "model").glob("*token*"):
        path.unlink()
    with pytest.raises(ModelError, match=r"no token but special ones|cannot be opened"):
        load_model(tmp_path / "model", "cpu")
