"""The recipe of indexing a corpus. Loads without torch."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, Field, model_validator

from lodestar.config.loader import Section
from lodestar.config.values import Location, Width
from retrieval.embedding.config import EncodeConfig, Prompts
from retrieval.search.vector_stores import STORES, StoreKind

_SECRET = re.compile(r"://[^@]*:.*@|[?&](\w*password|api[-_]?key|token)=", re.IGNORECASE | re.DOTALL)
"""In a URL."""


def _check_variable(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z_]\w*", name):  # the name is not shown: it may be the secret itself
        raise ValueError("must be the name of an environment variable, as DATABASE_URL (export the secret under it)")
    return name


Variable = Annotated[str, AfterValidator(_check_variable)]


class StoreConfig(Section, hide_input_in_errors=True):
    kind: StoreKind
    """The database: a name that vector_stores.STORES lists."""
    path: Location | None = None
    """The folder of a database on this machine; created if it does not exist."""
    url: Annotated[str, Field(min_length=1)] | None = None
    """A server, without a password: http://HOST:6333 (qdrant), postgresql://USER@HOST/DATABASE (pgvector)."""
    url_env: Variable | None = None
    """The environment variable that holds the URL, which may have a password (pgvector)."""
    api_key_env: Variable | None = None
    """The environment variable that holds the API key (qdrant, with url)."""
    table: Annotated[str, Field(pattern=r"^\w[\w-]*$", max_length=100)] = "documents"
    """Qdrant calls it a collection."""

    @property
    def place(self) -> str:
        """For messages: the folder, the URL or the name of the variable."""
        return self.path or self.url or f"${self.url_env}"

    @model_validator(mode="after")
    def _one_place(self) -> StoreConfig:
        store = STORES[self.kind]
        keys = [key for key in ("path", "url", "url_env") if getattr(self, key) is not None]
        if len(keys) != 1 or keys[0] not in store.keys:
            allowed = ("exactly one of " if len(store.keys) > 1 else "") + " and ".join(store.keys)
            raise ValueError(f"{self.kind} needs {allowed}, got {' and '.join(keys) or 'none'} (correct it)")
        if self.api_key_env and not (store.has_api_key and self.url):
            raise ValueError("api_key_env: only a server by url that takes an API key needs one (remove it)")
        if self.url and _SECRET.search(self.url):
            key = "url_env" if "url_env" in store.keys else "api_key_env"
            raise ValueError(f"url: holds a secret (take it out, and name an environment variable: {key})")
        if self.url and self.url.partition("://")[0] not in store.schemes:
            raise ValueError(
                f"url: must begin with {' or '.join(f'{scheme}://' for scheme in store.schemes)} (correct it)"
            )
        if self.path and "://" in self.path:
            raise ValueError("path: must be a folder, not a URL (name one)")
        return self


class IndexEncodeConfig(EncodeConfig):
    width: Width | None = None
    """The first so many dimensions, normalised again (Matryoshka); none: all."""


class IndexRecipe(Section, hide_input_in_errors=True):
    """A corpus, the model that embeds it, and the table that stores it."""

    model: Location
    """A folder (or hub name) in sentence-transformers' format."""
    corpus: Location
    """A BEIR folder, or files whose rows have _id or id, text, and maybe title and metadata."""
    store: StoreConfig
    work: Location | None = None
    """The folder of the embeddings until the table has them all; none: TABLE.work in store.path, or, with a server, in
    the current folder."""
    encode: IndexEncodeConfig = IndexEncodeConfig()
    prompts: Prompts = {}
