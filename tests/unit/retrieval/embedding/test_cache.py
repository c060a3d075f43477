"""A cached embedding is used only where every byte is as it was written."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from retrieval.embedding.cache import load_or_compute, search_cache_file
from retrieval.embedding.model_folder import fingerprint
from tests import tiny


def test_a_cache_with_a_flipped_byte_is_computed_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, calls = tmp_path / "cache/a.safetensors", 0
    embeddings_ND = torch.arange(12.0).view(3, 4)

    def compute() -> torch.Tensor:
        nonlocal calls
        calls += 1
        return embeddings_ND

    for _ in range(2):
        assert load_or_compute(file, 3, compute).equal(embeddings_ND)
    assert calls == 1 and not capsys.readouterr().err
    content = bytearray(file.read_bytes())
    content[-2] ^= 1  # of a number
    file.write_bytes(content)
    assert load_or_compute(file, 3, compute).equal(embeddings_ND) and calls == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {file}: damaged: ") and line.endswith("(nothing to do: embedded again)")
    assert load_or_compute(file, 3, compute).equal(embeddings_ND) and calls == 2


def test_the_cache_of_search_is_named_by_the_models_files_and_the_documents(model_folder: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(model_folder, tmp_path / "run/model"))
    texts = tiny.texts(9, seed=5)

    def file(documents: Iterable[str]) -> Path:
        return search_cache_file(model, fingerprint(str(model)), documents)

    original = file(texts)
    assert original.parent == tmp_path / "run/search_cache"
    assert file(iter(texts)) == original
    assert len({original, file(texts[::-1]), file([*texts[:-1], "else"])}) == 3
    (model / "config.json").write_text((model / "config.json").read_text() + " ")
    assert file(texts) != original
