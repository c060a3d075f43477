"""Hub names whose model cards are known."""

from __future__ import annotations

from pathlib import Path

import pytest

from retrieval.embedding.known_models import CHINESE, ENGLISH, find_known, resolve_prompts
from retrieval.embedding.model_folder import fingerprint


@pytest.mark.parametrize(
    ("name", "prompts"),
    [
        ("BAAI/bge-small-en-v1.5", {"query": ENGLISH}),
        ("BAAI/bge-large-zh", {"query": CHINESE}),
        ("BAAI/bge-large-zh-noinstruct", {}),
        ("intfloat/e5-base-v2", {"query": "query: ", "document": "passage: "}),
        ("thenlper/gte-base", {}),
        ("BAAI/bge-small-en-v1.5-finetuned", {}),
        ("someone/else", {}),
    ],
)
def test_a_known_name_brings_its_instructions(name: str, prompts: dict[str, str]) -> None:
    assert resolve_prompts(name, None) == resolve_prompts(name, {}) == prompts
    assert resolve_prompts(name, {"query": "mine: "}) == {"query": "mine: "}


def test_a_folder_speaks_for_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("BAAI/bge-small-en").mkdir(parents=True)
    assert find_known("BAAI/bge-small-en") is None and find_known("BAAI/bge-small-en-v1.5") is not None


def test_cached_embeddings_of_a_known_model_change_with_its_instruction() -> None:
    name = "BAAI/bge-small-en"
    assert fingerprint(name) == fingerprint(name, {"query": ENGLISH}) != fingerprint(name, {"query": "other: "})
