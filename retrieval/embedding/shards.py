"""Embeddings on the disk: files of so many rows, whole or absent, each with its ids and its settings.

Shape suffixes: N rows of a shard, D width as stored.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lodestar.data.readers import find_sources, read_rows
from lodestar.errors import ConfigError, DataError
from lodestar.files import replacing_file, write_json
from retrieval.embedding.config import Dtype, EncodeRecipe, Output

if TYPE_CHECKING:
    import numpy as np


MANIFEST = "encoding.json"


RANGES = "ranges.json"


CALIBRATION_ROWS = 1000


NO_ROW = "texts: {}: no row (name files with texts)"


class Shard(NamedTuple):
    number: int
    ids: list[str]
    texts: list[str]


def files_of(recipe: EncodeRecipe) -> list[str]:
    """The recipe's texts, a BEIR folder as its file of the role."""
    (first, *more), name = recipe.texts, "queries" if recipe.role == "query" else "corpus"
    if not more:
        for path in (Path(first) / f"{name}.jsonl", Path(first) / f"{name}.jsonl.gz"):
            if path.is_file():
                return [str(path)]
    return recipe.texts


def read_texts(recipe: EncodeRecipe) -> Iterator[tuple[str, str]]:
    """(id, text) of each row, in order; a title goes before its text, as BEIR has it."""
    number = 0
    for source in find_sources(files_of(recipe), "texts"):
        for where, row in read_rows(source):
            text = row.get(recipe.field)
            if not isinstance(text, str):
                raise DataError(
                    f"{where}: {recipe.field}: must be a text, got {type(text).__name__} (name it in field)"
                )
            names = ("_id", "id") if recipe.id_field is None else (recipe.id_field,)
            found = next((row[name] for name in names if row.get(name) is not None), None)
            if found is None and recipe.id_field is not None:
                raise DataError(f"{where}: {recipe.id_field}: not set (every row needs it, or leave id_field out)")
            title = row.get("title") if recipe.field == "text" else None
            yield str(number if found is None else found), f"{title} {text}" if title else text
            number += 1


def shards(rows: Iterable[tuple[str, str]], size: int) -> Iterator[Shard]:
    """Runs of `size` rows, the last one shorter."""
    rows, number = iter(rows), 0
    while part := list(islice(rows, size)):
        yield Shard(number, [name for name, _ in part], [text for _, text in part])
        number += 1


def shard_file(output: Output, number: int) -> Path:
    return Path(output.dir) / f"shard-{number:05d}.{output.format}"


def write_shard(path: Path, ids: Sequence[str], vectors_ND: np.ndarray, facts: dict[str, str]) -> None:
    """Whole or absent; `facts` stand in its header."""
    with replacing_file(path) as tmp:
        _write_shard(path, tmp, ids, vectors_ND, facts)


def _write_shard(path: Path, tmp: Path, ids: Sequence[str], vectors_ND: np.ndarray, facts: dict[str, str]) -> None:
    if path.suffix == ".parquet":
        import pyarrow as pa
        from pyarrow import parquet

        column = pa.FixedSizeListArray.from_arrays(pa.array(vectors_ND.reshape(-1)), vectors_ND.shape[1])
        table = pa.table({"id": list(ids), "embedding": column})
        try:
            parquet.write_table(table.replace_schema_metadata(facts), tmp)
        except OSError as error:
            raise ConfigError(f"{path}: cannot be written: {error} (make room, or name another folder)") from None
    else:
        from safetensors import SafetensorError
        from safetensors.numpy import save_file

        try:
            save_file({"embeddings": vectors_ND}, tmp, {**facts, "ids": json.dumps(list(ids))})
        except SafetensorError as error:
            if "header" not in str(error).lower():
                raise ConfigError(f"{path}: cannot be written: {error} (make room, or name another folder)") from None
            reason = f"{len(ids):,} ids do not go into a file's header, which ends at 100 MB"
            raise ConfigError(f"encode.shard_rows: {reason} (fewer rows, or output.format: parquet)") from None


def read_shard(path: Path) -> tuple[list[str], np.ndarray]:
    """(ids, (N, D) as stored)."""
    if path.suffix == ".parquet":
        from pyarrow import parquet

        table = parquet.read_table(path)
        flat = table["embedding"].combine_chunks()
        return table["id"].to_pylist(), flat.flatten().to_numpy().reshape(len(table), -1)
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        return json.loads(file.metadata()["ids"]), file.get_tensor("embeddings")


def read_embeddings(folder: str | Path) -> Iterator[tuple[list[str], np.ndarray]]:
    """(ids, (N, D) as stored) of each shard of a folder that `launch/encode.py` has finished, in input order."""
    for name in read_manifest(folder)["files"]:
        yield read_shard(Path(folder) / name)


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """What `encoding.json` says: rows, width, truncated, files; DataError for a folder that is not finished."""
    manifest = Path(folder) / MANIFEST
    if not manifest.is_file():
        raise DataError(f"{folder}: no {MANIFEST}: not finished (run launch/encode.py again: it goes on)")
    return json.loads(manifest.read_text(encoding="utf-8"))


def _facts(path: Path) -> dict[str, str]:
    """The header of a shard; empty for none, or for one that is damaged."""
    if path.is_file():
        with suppress(Exception):  # neither library has a common class for what can be wrong with a file
            if path.suffix == ".parquet":
                from pyarrow import parquet

                return {k.decode(): v.decode() for k, v in (parquet.read_schema(path).metadata or {}).items()}
            from safetensors import safe_open

            with safe_open(path, framework="numpy") as file:
                return file.metadata() or {}
    return {}


def stored(vectors_ND: np.ndarray, dtype: Dtype, ranges_2D: np.ndarray | None) -> np.ndarray:
    """float32 as it is kept: int8 and binary as sentence-transformers quantises, with values beyond a range clipped."""
    import numpy as np
    from sentence_transformers.util import quantize_embeddings

    if dtype in ("float32", "float16"):
        return vectors_ND.astype(dtype)
    if ranges_2D is not None:
        vectors_ND = np.clip(vectors_ND, ranges_2D[0], ranges_2D[1])
    return quantize_embeddings(vectors_ND, precision=dtype, ranges=ranges_2D)  # type: ignore[arg-type, return-value]


def _ranges(recipe: EncodeRecipe, key: str, embed: Callable[[list[str]], np.ndarray]) -> list[list[float]]:
    """The smallest and largest value of each dimension in the first rows; kept, so that a restart takes the same."""
    path = Path(recipe.output.dir) / RANGES
    kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if kept.get("key") != key:
        texts = [text for _, text in islice(read_texts(recipe), CALIBRATION_ROWS)]
        if not texts:
            raise DataError(NO_ROW.format(", ".join(recipe.texts)))
        first_ND = embed(texts)
        kept = {"key": key, "ranges": [first_ND.min(0).tolist(), first_ND.max(0).tolist()]}
        write_json(path, kept)
    return kept["ranges"]
