"""Embeddings on the disk: one file per shard, whole or absent, each with its ids and settings. Loads without torch.

Shape suffixes: N rows of a shard, D width as stored.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypedDict

import numpy as np
import pyarrow as pa
from pyarrow import parquet
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from lodestar.errors import ConfigError, DataError
from lodestar.files import replacing_hashed_file
from retrieval.embedding.config import Dtype, OutputConfig, Role

MANIFEST = "encoding.json"


class Manifest(TypedDict):
    """`encoding.json`, written last: a folder without it is unfinished."""

    model: str
    role: Role
    rows: int
    truncated: int
    """Number of texts that were longer than the model reads."""
    key: str
    """Hash of all settings and inputs that determine the embeddings."""
    dtype: Dtype
    width: int
    ranges: str | None
    """The file with the ranges of int8 embeddings."""
    files: list[str]


def shard_path(output: OutputConfig, number: int) -> Path:
    return Path(output.dir) / f"shard-{number:05d}.{output.format}"


def write_shard(path: Path, ids: Sequence[str], vectors_ND: np.ndarray, header: Mapping[str, str]) -> None:
    """Write the file, whole or not at all; `header` becomes part of it."""
    write = _write_parquet if path.suffix == ".parquet" else _write_safetensors
    with replacing_hashed_file(path) as tmp:
        try:
            write(tmp, ids, vectors_ND, header)
        except (OSError, SafetensorError) as error:  # safetensors turns an OSError into its own
            raise ConfigError(f"{path}: cannot be written: {error} (make room, or name another folder)") from None


def _write_parquet(path: Path, ids: Sequence[str], vectors_ND: np.ndarray, header: Mapping[str, str]) -> None:
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors_ND.reshape(-1)), vectors_ND.shape[1])
    table = pa.table({"id": list(ids), "embedding": column})
    parquet.write_table(table.replace_schema_metadata(dict(header)), path)


def _write_safetensors(path: Path, ids: Sequence[str], vectors_ND: np.ndarray, header: Mapping[str, str]) -> None:
    try:
        save_file({"embeddings": vectors_ND}, path, {**header, "ids": json.dumps(list(ids))})
    except SafetensorError as error:
        if "header" not in str(error).lower():
            raise
        problem = f"{len(ids):,} ids do not fit into the header of a file, at most 100 MB"
        raise ConfigError(f"encode.shard_rows: {problem} (fewer rows, or output.format: parquet)") from None


def read_shard(path: Path) -> tuple[list[str], np.ndarray]:
    """(ids, (N, D) as stored)."""
    if path.suffix == ".parquet":
        table = parquet.read_table(path)
        embeddings = table["embedding"].combine_chunks()
        return table["id"].to_pylist(), embeddings.flatten().to_numpy().reshape(len(table), -1)
    with safe_open(path, framework="numpy") as file:
        return json.loads(file.metadata()["ids"]), file.get_tensor("embeddings")


def read_header(path: Path) -> dict[str, str]:
    """The header of a shard; empty if the file is missing or damaged."""
    if path.is_file():
        with suppress(Exception):  # the two libraries share no class for damaged files
            if path.suffix == ".parquet":
                metadata = parquet.read_schema(path).metadata or {}
                return {key.decode(): value.decode() for key, value in metadata.items()}
            with safe_open(path, framework="numpy") as file:
                return file.metadata() or {}
    return {}


def read_embeddings(folder: str | Path) -> Iterator[tuple[list[str], np.ndarray]]:
    """(ids, (N, D) as stored) of each shard of a finished folder of `launch/encode.py`, in input order."""
    for name in read_manifest(folder)["files"]:
        yield read_shard(Path(folder) / name)


def read_manifest(folder: str | Path) -> Manifest:
    """The content of `encoding.json`; DataError for an unfinished folder."""
    manifest = Path(folder) / MANIFEST
    if not manifest.is_file():
        raise DataError(f"{folder}: no {MANIFEST}: not finished (run launch/encode.py again: it goes on)")
    return json.loads(manifest.read_text(encoding="utf-8"))
