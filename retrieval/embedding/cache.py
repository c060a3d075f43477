"""An embedding cache on the disk, so that a repeated or interrupted run does not embed again. Loads without torch.

Shape suffixes: N texts, D embedding width.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from lodestar.files import NO_SUCH_FILE, kept_file_problem, replacing_hashed_file
from retrieval.embedding.model_folder import fingerprint

if TYPE_CHECKING:
    from torch import Tensor


def load_or_compute(file: Path | None, num_rows: int, compute: Callable[[], Tensor]) -> Tensor:
    """(N, D) fp32 from a safetensors file; computed and saved if the file is missing, damaged or of another length."""
    from safetensors.torch import load_file, save_file

    if file is None:
        return compute()
    problem = kept_file_problem(file)
    if problem is None:
        with suppress(SafetensorError, KeyError):
            cached_ND = load_file(file)["embeddings"]
            if len(cached_ND) == num_rows:
                return cached_ND
    elif problem != NO_SUCH_FILE:
        print(f"warning: {file}: {problem} (nothing to do: embedded again)", file=sys.stderr, flush=True)
    computed_ND = compute()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing_hashed_file(file) as tmp:
            save_file({"embeddings": computed_ND.contiguous()}, tmp)
    except (OSError, SafetensorError) as error:  # safetensors turns an OSError into its own
        print(f"warning: {file}: cannot be written, so the next start embeds again: {error}", file=sys.stderr)
    return computed_ND


def cache_path(folder: Path, *settings: str, texts: Iterable[object]) -> Path:
    """`folder`/KEY.safetensors, where KEY is a hash of the settings and of the texts in their order."""
    digest = hashlib.blake2b(json.dumps(settings).encode(), digest_size=12)
    for text in texts:
        digest.update(json.dumps(text).encode())
    return folder / f"{digest.hexdigest()}.safetensors"


def search_cache_file(model_folder: Path, documents: Iterable[str]) -> Path:
    """`search_cache/KEY.safetensors` beside the model: embeddings of documents, in fp32 with the model's own prompt.

    KEY changes with the model's files and the documents.
    """
    return cache_path(model_folder.resolve().parent / "search_cache", fingerprint(str(model_folder)), texts=documents)
