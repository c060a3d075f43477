"""The weights in a model folder, by the headers of their files: damage, pickle, NaN. Loads without torch."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import safe_open

from lodestar.errors import ModelError, names
from lodestar.files import NO_SUCH_FILE, file_problem

SAFETENSORS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = "pytorch_model*.bin"
FETCH = "fetch the folder again, or save the model once more"
ENCODER = "model.encoder: "
"""The prefix of messages about a training recipe's encoder, whose section has keys that allow more."""
_EXPONENT = {"F64": 0x7FF0 << 48, "F32": 0x7F80 << 16, "BF16": 0x7F80, "F16": 0x7C00}
"""The dtypes that weights may have -> the bits that are all 1 in NaN and infinity alone."""
_BLOCK = 1 << 24
"""Elements read at once."""


class TensorHeader(NamedTuple):
    """What a safetensors file says about one of its tensors."""

    file: Path
    name: str
    dtype: str
    shape: list[int]
    start: int
    """Of its bytes in the file."""
    end: int


def read_headers(file: Path, prefix: str = "") -> dict[str, TensorHeader]:
    """The tensors of a safetensors file, by name; ModelError where it is damaged, or holds no floating-point weights.

    prefix   of messages, as "model.encoder: "
    """
    if problem := file_problem(file):
        raise ModelError(f"{prefix}{file}: {problem} ({FETCH})")
    try:
        with safe_open(file, framework="np"):
            pass  # the header and every offset are right
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            entries: dict[str, Any] = json.loads(opened.read(length))
    except Exception:  # a header may hold anything
        size = file.stat().st_size
        problem = f"is damaged: its header does not fit its {size:,} bytes" if size else "is empty"
        raise ModelError(f"{prefix}{file}: {problem} ({FETCH})") from None
    entries.pop("__metadata__", None)
    if not entries:
        raise ModelError(f"{prefix}{file}: holds no tensor ({FETCH})")
    headers = {
        name: TensorHeader(file, name, entry["dtype"], entry["shape"], *(8 + length + i for i in entry["data_offsets"]))
        for name, entry in entries.items()
    }
    for name, header in headers.items():
        if name.endswith((".weight", ".bias", ".gamma", ".beta")) and header.dtype not in _EXPONENT:
            known = ", ".join(_EXPONENT)
            raise ModelError(f"{prefix}{file}: {names([name])}: has dtype {header.dtype} (save the model in {known})")
    return headers


def weight_files(folder: Path, index: Mapping[str, Any] | None, prefix: str, *, allow_pickle: bool) -> list[Path]:
    """The files of a folder's weights: those that transformers would open.

    index          the content of INDEX; none where the folder has none
    allow_pickle   whether a folder with pickled weights alone passes
    Raises ModelError for a folder without weights, or with an index that does not fit.
    """
    if file_problem(folder / SAFETENSORS) != NO_SUCH_FILE:
        return [folder / SAFETENSORS]
    if index is not None:
        return _shards(folder, index, prefix)
    if others := sorted(folder.glob("*.safetensors")):
        remedy = f"fetch {INDEX} too" if len(others) > 1 else f"rename it to {SAFETENSORS}"
        raise ModelError(f"{prefix}{others[0]}: is neither {SAFETENSORS} nor in an index ({remedy})")
    pickles = sorted(folder.glob(PICKLES))
    if not pickles:
        remedy = "set model.random_weights: true to start randomly initialised" if prefix == ENCODER else FETCH
        raise ModelError(f"{prefix}{folder}: has no weights: holds no *.safetensors ({remedy})")
    if not allow_pickle:
        remedy = f"convert it: {convert_command(folder)}" + (
            ", or set model.allow_pickle: true" if prefix == ENCODER else ""
        )
        raise ModelError(f"{prefix}{pickles[0]}: is pickle, which can run code ({remedy})")
    return pickles


def convert_command(folder: Path) -> str:
    """The command that writes a folder's pickled weights as safetensors; it runs no code that they hold."""
    code = (
        "import sys, pathlib, torch, safetensors.torch as s; d = pathlib.Path(sys.argv[1]); "
        f's.save_file({{k: v.clone() for f in d.glob("{PICKLES}") '
        'for k, v in torch.load(f, map_location="cpu", weights_only=True).items()}, '
        f'd / "{SAFETENSORS}", {{"format": "pt"}})'
    )
    return f"python -c {shlex.quote(code)} {shlex.quote(str(folder))}"


def _shards(folder: Path, index: Mapping[str, Any], prefix: str) -> list[Path]:
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise ModelError(f"{prefix}{folder / INDEX}: weight_map: must name a file for each tensor ({FETCH})")
    files = {name: folder / name for name in sorted(set(weight_map.values()))}
    for name, file in files.items():
        if file.parent != folder or file.suffix != ".safetensors":
            raise ModelError(f"{prefix}{folder / INDEX}: {names([name])}: no *.safetensors of this folder ({FETCH})")
    tensors = {name: read_headers(file, prefix) for name, file in files.items()}
    for tensor, name in weight_map.items():
        if tensor not in tensors[name]:
            raise ModelError(f"{prefix}{folder / INDEX}: {names([tensor])}: is not in {name} ({FETCH})")
    return list(files.values())


def check_finite(headers: Mapping[str, TensorHeader], prefix: str = "") -> None:
    """ModelError for a tensor that holds NaN or infinity."""
    for name, header in headers.items():
        if header.dtype not in _EXPONENT or header.start == header.end:
            continue
        bytes_N = np.memmap(header.file, np.uint8, "r", header.start, (header.end - header.start,))
        bits_N = bytes_N.view(f"<u{_ITEM_BYTES[header.dtype]}")
        exponent, without_sign = _EXPONENT[header.dtype], (1 << 8 * bits_N.itemsize - 1) - 1
        for start in range(0, len(bits_N), _BLOCK):
            largest = int((bits_N[start : start + _BLOCK] & bits_N.dtype.type(without_sign)).max())
            if largest >= exponent:
                what = "NaN" if largest > exponent else "infinite values"
                raise ModelError(f"{prefix}{header.file}: {names([name])}: holds {what} (take an earlier checkpoint)")


_ITEM_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}
