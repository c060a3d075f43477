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

if TYPE_CHECKING:
    from torch import Tensor


def load_or_compute(file: Path | None, num_rows: int, compute: Callable[[], Tensor]) -> Tensor:
    """(N, D) fp32 from a safetensors file; computed and saved if the file is missing, damaged or of another length."""
    from safetensors.torch import load_file

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
    write_embeddings(file, computed_ND)
    return computed_ND


def write_embeddings(file: Path, embeddings_ND: Tensor) -> None:
    """Warns where that is not possible."""
    from safetensors.torch import save_file

    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing_hashed_file(file) as tmp:
            save_file({"embeddings": embeddings_ND.contiguous()}, tmp)
    except (OSError, SafetensorError) as error:  # safetensors turns an OSError into its own
        print(f"warning: {file}: cannot be written, so the next start embeds again: {error}", file=sys.stderr)


def cache_path(folder: Path, *settings: str, texts: Iterable[object]) -> Path:
    """`folder`/KEY.safetensors, where KEY is a hash of the settings and of the texts in their order."""
    digest = hashlib.blake2b(json.dumps(settings).encode(), digest_size=12)
    for text in texts:
        digest.update(json.dumps(text).encode())
    return folder / f"{digest.hexdigest()}.safetensors"


def search_cache_file(model_folder: Path, fingerprint: str, documents: Iterable[str]) -> Path:
    """`search_cache/KEY.safetensors` beside the model: embeddings of documents, in fp32 with the model's own prompt.

    fingerprint   of the model's files: `model_folder.fingerprint`
    """
    return cache_path(model_folder.resolve().parent / "search_cache", fingerprint, texts=documents)
