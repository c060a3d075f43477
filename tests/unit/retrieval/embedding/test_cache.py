"""A cached embedding is used only where every byte is as it was written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from retrieval.embedding.cache import load_or_compute


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
