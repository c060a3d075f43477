"""Checks and identity of a model folder. Loads without torch, so that commands report mistakes at once."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from lodestar.data.readers import Source
from lodestar.errors import ConfigError, ModelError, naming
from lodestar.models.folder_checks import check_embedding_model, embedding_width, local_folder
from retrieval.embedding.config import Prompts
from retrieval.embedding.known_models import resolve_prompts


def check_folder(path: str | Path, field: str = "model", *, finite: bool = False) -> None:
    """ModelError if a folder does not exist, is damaged, or is not in sentence-transformers' format; hub names pass.

    field    of the recipe that names it
    finite   also read all weights, for NaN
    """
    with naming(field):
        _check_folder(path, finite=finite)


def _check_folder(path: str | Path, *, finite: bool) -> None:
    folder = local_folder(path, remedy="name a sentence-transformers folder, as model/ of a run")
    if folder is None:
        return
    if not os.path.lexists(folder / "modules.json"):
        # Without this check sentence-transformers adds mean pooling to a bare encoder and goes on.
        raise ModelError(
            f"{path}: no modules.json there (name a sentence-transformers folder, as model/ of a run; docs/models.md "
            "says how a bare encoder becomes one)"
        )
    check_embedding_model(folder, finite=finite)


def check_width(path: str | Path, width: int | None, field: str) -> None:
    """ConfigError where a folder's embeddings have fewer dimensions than are to be kept."""
    full_width = embedding_width(Path(path)) if width and Path(path).is_dir() else None
    if full_width is not None and width is not None and width > full_width:
        raise ConfigError(f"{field}: {width}: {path} gives only {full_width} dimensions (lower it, or leave it out)")


def fingerprint(model: str, prompts: Prompts | None = None) -> str:
    """A hash of the weights, configuration, tokenizer and prompts in a folder; a hub name stands for itself.

    prompts   replace the folder's own
    """
    prompts = resolve_prompts(model, prompts)
    folder, digest = Path(model), hashlib.blake2b(digest_size=12)
    if prompts:
        digest.update(json.dumps(prompts, sort_keys=True).encode())
    if not folder.is_dir():
        return f"{model} {digest.hexdigest()}" if prompts else model
    patterns = ("*.safetensors", "*.bin", "*.json", "*.model", "vocab.txt", "merges.txt")
    for path in sorted(path for pattern in patterns for path in folder.rglob(pattern)):
        digest.update(f"{path.relative_to(folder)} {Source('file', str(path)).fingerprint}\n".encode())
    return digest.hexdigest()
