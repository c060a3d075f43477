"""What the model cards of known hub models say: pooling, instructions, length, languages. Loads without torch.

The hub's folders of these models hold no prompts, so a caller who does not know the card embeds queries wrongly.
docs/models.md shows the same table.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal, NamedTuple

from retrieval.embedding.config import Prompts

ENGLISH = "Represent this sentence for searching relevant passages: "
CHINESE = "为这个句子生成表示以用于检索相关文章："


class KnownModel(NamedTuple):
    name: str
    """A pattern that the whole hub name matches."""
    pooling: Literal["cls", "mean"]
    query: str
    """The instruction before a query."""
    document: str
    """The instruction before a passage."""
    max_length: int
    """In tokens."""
    languages: str


KNOWN_MODELS = (
    KnownModel(r"BAAI/bge-(small|base|large)-en", "cls", ENGLISH, "", 512, "English"),
    KnownModel(r"BAAI/bge-(small|base|large)-en-v1\.5", "cls", ENGLISH, "", 512, "English"),
    KnownModel(r"BAAI/bge-(small|base|large)-zh", "cls", CHINESE, "", 512, "Chinese"),
    KnownModel(r"BAAI/bge-(small|base|large)-zh-v1\.5", "cls", CHINESE, "", 512, "Chinese"),
    KnownModel(r"BAAI/bge-large-zh-noinstruct", "cls", "", "", 512, "Chinese"),
    KnownModel(r"BAAI/bge-m3", "cls", "", "", 8192, "more than 100"),
    KnownModel(r"intfloat/e5-(small|base|large)(-v2)?", "mean", "query: ", "passage: ", 512, "English"),
    KnownModel(r"intfloat/multilingual-e5-(small|base|large)", "mean", "query: ", "passage: ", 512, "100"),
    KnownModel(r"thenlper/gte-(small|base|large)", "mean", "", "", 512, "English"),
    KnownModel(r"thenlper/gte-(small|base|large)-zh", "cls", "", "", 512, "Chinese"),
    KnownModel(r"Alibaba-NLP/gte-modernbert-base", "cls", "", "", 8192, "English"),
    KnownModel(r"sentence-transformers/all-MiniLM-L6-v2", "mean", "", "", 256, "English"),
    KnownModel(r"sentence-transformers/all-mpnet-base-v2", "mean", "", "", 384, "English"),
)


def find_known(name: str | Path) -> KnownModel | None:
    """The entry of a hub name; none for a folder of that name, which speaks for itself."""
    if Path(name).is_dir():
        return None
    return next((model for model in KNOWN_MODELS if re.fullmatch(model.name, str(name))), None)


def resolve_prompts(name: str | Path, prompts: Prompts | None) -> Prompts:
    """The given prompts where there are any, else those of a known model; a folder keeps its own."""
    known = find_known(name)
    if prompts or known is None:
        return prompts or {}
    known_prompts: Prompts = {"query": known.query, "document": known.document}
    return {role: prompt for role, prompt in known_prompts.items() if prompt}
