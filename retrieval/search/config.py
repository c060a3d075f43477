"""The recipe of indexing a corpus. Loads without torch."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from lodestar.config.loader import Section
from lodestar.config.schema import Count
from retrieval.embedding.config import EncodeConfig, Prompts
from retrieval.search.vector_stores import StoreKind


class StoreConfig(Section):
    kind: StoreKind
    """The database: a name that vector_stores.STORES lists."""
    path: str
    """The database's folder; created if it does not exist."""
    table: Annotated[str, Field(pattern=r"^\w[\w-]*$")] = "documents"
    """Qdrant calls it a collection."""


class IndexEncodeConfig(EncodeConfig):
    width: Count | None = None
    """The first so many dimensions, normalised again (Matryoshka); none: all."""


class IndexRecipe(Section):
    """A corpus, the model that embeds it, and the table that stores it."""

    model: str
    """A folder (or hub name) in sentence-transformers' format."""
    corpus: str
    """A BEIR folder, or files whose rows have _id or id, text, and maybe title and metadata."""
    store: StoreConfig
    encode: IndexEncodeConfig = IndexEncodeConfig()
    prompts: Prompts = {}
