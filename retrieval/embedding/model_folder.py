"""Checks and identity of a model folder. Loads without torch, so that commands report mistakes at once."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from lodestar.data.readers import Source
from lodestar.errors import ModelError
from retrieval.embedding.config import Prompts
from retrieval.embedding.known_models import resolve_prompts


def check_folder(path: str | Path) -> Path:
    """ModelError if the folder does not exist or is not in sentence-transformers' format; hub names pass."""
    folder = Path(path)
    is_local = folder.exists() or str(path).startswith((".", "/", "~")) or str(path).count("/") > 1  # hub names: one /
    if is_local and not (folder / "modules.json").is_file():
        # Without this check sentence-transformers adds mean pooling to a bare encoder and goes on.
        problem = "no modules.json there" if folder.exists() else "no such folder"
        raise ModelError(
            f"{path}: {problem} (name a sentence-transformers folder, as model/ of a run; docs/models.md says how a "
            "bare encoder becomes one)"
        )
    return folder


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
