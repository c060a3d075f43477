"""Texts to embeddings, on one device and on several."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from lodestar.errors import ConfigError, ModelError
from retrieval.embedding.embedder import Embedder
from tests import tiny

TEXTS = [*tiny.texts(40, seed=5), "", "mask " * 100]


@pytest.fixture(scope="module")
def one_device(model_folder: Path) -> Embedder:
    return Embedder(model_folder, batch_tokens=200)


@pytest.fixture(scope="module")
def two_devices(model_folder: Path) -> Iterator[Embedder]:
    with Embedder(model_folder, ["cpu", "cpu"], batch_tokens=200) as embedder:
        yield embedder


@pytest.mark.parametrize("name", ["one_device", pytest.param("two_devices", marks=pytest.mark.slow)])
def test_embeddings_are_sentence_transformers_own_with_the_prompt_of_each_role(
    name: str, model_folder: Path, request: pytest.FixtureRequest
) -> None:
    theirs, embedder = SentenceTransformer(str(model_folder), device="cpu"), request.getfixturevalue(name)
    for ours, expected in (
        (embedder.encode_queries(TEXTS), theirs.encode_query(TEXTS)),
        (embedder.encode_documents(TEXTS), theirs.encode_document(TEXTS)),
    ):
        assert ours.dtype == np.float32 and ours.shape == expected.shape
        np.testing.assert_allclose(ours, expected, atol=1e-6)
    assert not np.allclose(embedder.encode_queries(TEXTS), embedder.encode_documents(TEXTS))
    assert embedder.encode_queries([]).shape == (0, 32)


def test_a_single_text_and_an_array_of_texts_serve(model_folder: Path) -> None:
    embedder = Embedder(model_folder)
    np.testing.assert_array_equal(embedder.encode_queries(TEXTS[0]), embedder.encode_queries(TEXTS[:1])[0])
    assert embedder.encode_queries(np.array(TEXTS[:3])).shape == (3, 32)


def test_fewer_dimensions_are_normalised_again(model_folder: Path) -> None:
    whole, narrow = (Embedder(model_folder, width=width).encode_documents(TEXTS) for width in (None, 8))
    np.testing.assert_allclose(narrow, whole[:, :8] / np.linalg.norm(whole[:, :8], axis=1, keepdims=True), rtol=1e-5)


@pytest.mark.slow
def test_a_stream_keeps_the_order_of_its_jobs(two_devices: Embedder, model_folder: Path) -> None:
    jobs = [TEXTS[i : i + 5] for i in range(0, 40, 5)]
    vectors = [embeddings.vectors_ND.numpy() for embeddings in two_devices.stream((job, "document") for job in jobs)]
    np.testing.assert_allclose(np.concatenate(vectors), Embedder(model_folder).encode_documents(TEXTS[:40]), atol=1e-6)


def test_a_device_that_is_not_there_and_a_folder_without_a_model_are_one_line(
    model_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="cuda:99: this machine has"):
        Embedder(model_folder, ["cuda:99"])
    with pytest.raises(ConfigError, match="unknown kind of device"):
        Embedder(model_folder, ["gpu1"])
    shutil.copytree(model_folder, tmp_path / "torn")
    weights = tmp_path / "torn/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match=r"torn/model\.safetensors: is damaged"):
        Embedder(tmp_path / "torn")
    for devices in (None, ["cpu", "cpu"]):
        with pytest.raises(ModelError, match="no such folder"):
            Embedder(tmp_path / "absent", devices)
