"""Embeddings that are kept on disk, so that what was interrupted, or is asked again, does not make them anew.

Shape suffixes: N texts, D embedding width.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lodestar.files import replacing_file

if TYPE_CHECKING:
    from torch import Tensor


def cached(file: Path | None, rows: int, make: Callable[[], Tensor]) -> Tensor:
    """(N, D) fp32 from a safetensors file; made, and put there, where there are none, damaged ones or not `rows`."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save_file

    if file is None:
        return make()
    if file.is_file():
        try:
            found_ND = load_file(file)["embeddings"]
            if len(found_ND) == rows:
                return found_ND
        except (SafetensorError, KeyError):
            pass
    made_ND = make()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing_file(file) as tmp:
            save_file({"embeddings": made_ND.contiguous()}, tmp)
    except (OSError, SafetensorError) as error:  # the latter is what save_file makes of the former
        print(f"warning: {file}: cannot be written, so the next start embeds again: {error}", file=sys.stderr)
    return made_ND


def file_for(folder: Path, *said: Any, texts: Iterable[Any]) -> Path:
    """`folder`/KEY.safetensors; the key changes with all that is said, and with the texts and their order."""
    digest = hashlib.blake2b(json.dumps(said).encode(), digest_size=12)
    for text in texts:
        digest.update(json.dumps(text).encode())
    return folder / f"{digest.hexdigest()}.safetensors"
