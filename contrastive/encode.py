"""A corpus to embeddings on the disk: shards in input order, on all devices of all ranks, restartable at the shard.

Shape suffixes: N rows of a shard, D width as stored.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from pydantic import Field

from chassis.cli import door
from chassis.config import Section
from chassis.errors import ConfigError, DataError
from chassis.plan import Missing
from chassis.runtime import Placement
from chassis.schema import Count
from chassis.sources import count_rows, find_sources, make_folder, read_rows
from contrastive.embedder import Embedder, Precision, Prompts, Role, fingerprint

if TYPE_CHECKING:
    import numpy as np

    from chassis.runtime import Runtime

MANIFEST = "encoding.json"
RANGES = "ranges.json"
CALIBRATION_ROWS = 1000
NO_ROW = "texts: {}: no row (name files with texts)"
Dtype = Literal["float32", "float16", "int8", "binary"]
TIMEOUT_MINUTES = 24 * 60.0
"""How long a rank waits for the others: theirs may be the longer texts."""


class Encode(Section):
    devices: list[str] | None = None
    """As [cuda:1, cuda:3], or [cpu, cpu] for two processes; none: all visible GPUs of all ranks, or the CPU."""
    precision: Precision = "fp32"
    batch_tokens: Count | None = None
    """Tokens at once on a device, padding counted; none: 4,096 on a CPU, 65,536 on a GPU."""
    shard_rows: Count = 10_000
    """Rows of a file; what an interrupted run has to do again on each device."""


class Output(Section):
    dir: str
    format: Literal["safetensors", "parquet"] = "safetensors"
    dtype: Dtype = "float32"
    """int8: by the range of each dimension in the first rows; binary: a bit for each dimension, eight to a byte."""
    width: Count | None = None
    """Only the first so many dimensions, normalised again (Matryoshka); none: all."""


class EncodeRecipe(Section):
    """Embeddings of a corpus."""

    model: str
    """A sentence-transformers folder or hub name."""
    texts: Annotated[list[str], Field(min_length=1)]
    """Files (JSONL, Parquet, text; gz too), globs, folders, hub names; or one folder in BEIR's layout."""
    field: str = "text"
    id_field: str | None = None
    """none: `_id` or `id`, or else the number of the row."""
    role: Role = "document"
    """Whose prompt is put before each text; of a BEIR folder also which file is read."""
    encode: Encode = Encode()
    output: Output
    prompts: Prompts = {}


class Shard(NamedTuple):
    number: int
    ids: list[str]
    texts: list[str]


# --- texts -----------------------------------------------------------------------------------


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


# --- files -----------------------------------------------------------------------------------


def shard_file(output: Output, number: int) -> Path:
    return Path(output.dir) / f"shard-{number:05d}.{output.format}"


def write_shard(path: Path, ids: Sequence[str], vectors_ND: np.ndarray, facts: dict[str, str]) -> None:
    """Whole or absent; `facts` stand in its header."""
    draft = path.with_name(f".{path.name}.draft")
    if path.suffix == ".parquet":
        import pyarrow as pa
        from pyarrow import parquet

        column = pa.FixedSizeListArray.from_arrays(pa.array(vectors_ND.reshape(-1)), vectors_ND.shape[1])
        table = pa.table({"id": list(ids), "embedding": column})
        try:
            parquet.write_table(table.replace_schema_metadata(facts), draft)
        except OSError as error:
            raise ConfigError(f"{path}: cannot be written: {error} (make room, or name another folder)") from None
    else:
        from safetensors import SafetensorError
        from safetensors.numpy import save_file

        try:
            save_file({"embeddings": vectors_ND}, draft, {**facts, "ids": json.dumps(list(ids))})
        except SafetensorError as error:
            if "header" not in str(error).lower():
                raise ConfigError(f"{path}: cannot be written: {error} (make room, or name another folder)") from None
            reason = f"{len(ids):,} ids do not go into a file's header, which ends at 100 MB"
            raise ConfigError(f"encode.shard_rows: {reason} (fewer rows, or output.format: parquet)") from None
    draft.replace(path)


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


# --- numbers ---------------------------------------------------------------------------------


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
        _write(path, kept)
    return kept["ranges"]


def _write(path: Path, value: Any) -> None:
    draft = path.with_name(f".{path.name}.draft")
    draft.write_text(json.dumps(value, indent=2 if isinstance(value, dict) else None) + "\n", encoding="utf-8")
    draft.replace(path)


# --- the door --------------------------------------------------------------------------------


def plan(recipe: EncodeRecipe, world_size: int, device: str | None = None) -> dict[str, Any]:
    """What `--plan` prints."""
    missing = Missing([])
    rows = missing.instead(None, lambda: count_rows(find_sources(files_of(recipe), "texts")), "rows are not known")
    width = recipe.output.width
    config = Path(recipe.model) / "config.json"
    if width is None and config.is_file():
        width = json.loads(config.read_text(encoding="utf-8")).get("hidden_size")
    bytes_each = {"float32": 4.0, "float16": 2.0, "int8": 1.0, "binary": 1 / 8}[recipe.output.dtype]
    return {
        "model": recipe.model,
        "output_dir": recipe.output.dir,
        "world_size": world_size,
        "devices": ", ".join(recipe.encode.devices or ["all that each rank sees"]),
        "rows": rows,
        "shards": None if rows is None else -(-rows // recipe.encode.shard_rows),
        "width": width,
        **({} if rows is None or width is None else {"output_bytes": int(rows * width * bytes_each)}),
        "missing": missing.lines,
    }


def run(recipe: EncodeRecipe, placement: Placement) -> int:
    from chassis.session import together

    with together(placement, TIMEOUT_MINUTES, recipe) as runtime:
        encode(recipe, runtime)
    return 0


def encode(recipe: EncodeRecipe, runtime: Runtime, *, tells: bool = True) -> None:
    """Rank r of W makes the shards r, r + W, ... that are not there yet; then rank 0 writes the manifest, and tells."""
    from chassis.collectives import agreed, gather_objects, on_main

    output = recipe.output
    with agreed():
        make_folder(output.dir, "output.dir")
    key = on_main(lambda: _key(recipe))
    with agreed():
        how = recipe.encode.model_dump(include={"precision", "batch_tokens"})
        devices = recipe.encode.devices or runtime.own_devices()
        embedder = Embedder(recipe.model, devices, width=output.width, prompts=recipe.prompts, **how)
    with embedder:
        ranges_2D = None
        if output.dtype == "int8":
            import numpy as np

            ranges_2D = np.array(
                on_main(lambda: _ranges(recipe, key, lambda texts: embedder.encode(texts, recipe.role))),
                dtype=np.float32,
            )
        with agreed():
            rows, files = _make(recipe, runtime, embedder, key, ranges_2D)
    truncated = sum(gather_objects(sum(int(_facts(shard_file(output, i))["truncated"]) for i in files)))

    def conclude() -> None:
        count = -(-rows // recipe.encode.shard_rows)
        facts = {"model": recipe.model, "role": recipe.role, "rows": rows, "truncated": truncated, "key": key}
        kept = {"dtype": output.dtype, "width": embedder.width, "ranges": RANGES if ranges_2D is not None else None}
        names = [shard_file(output, i).name for i in range(count)]
        if absent := [name for name in names if not (Path(output.dir) / name).is_file()]:
            raise ConfigError(f"output.dir: {output.dir}: {absent[0]} is not there (name a folder that all nodes see)")
        _write(Path(output.dir) / MANIFEST, {**facts, **kept, "files": names})
        if tells:
            done = f"{rows:,} embeddings of width {embedder.width} in {count:,} files, {truncated:,} texts cut"
            print(f"{output.dir}: {done}", flush=True)

    on_main(conclude)


def _key(recipe: EncodeRecipe) -> str:
    """Of everything that decides what lies in the shards; a folder that holds others is an error."""
    sources = [source.fingerprint for source in find_sources(files_of(recipe), "texts")]
    said = recipe.model_dump(include={"field", "id_field", "role", "output"}) | {"output": recipe.output.model_dump()}
    said["output"].pop("dir")
    said |= {"precision": recipe.encode.precision, "shard_rows": recipe.encode.shard_rows}
    every = json.dumps([fingerprint(recipe.model, recipe.prompts), sources, said])
    key = hashlib.blake2b(every.encode(), digest_size=12).hexdigest()
    for path in sorted(Path(recipe.output.dir).glob("shard-*")):
        if _facts(path).get("key", key) != key:
            raise ConfigError(
                f"output.dir: {recipe.output.dir}: {path.name} is of another model, corpus or setting "
                "(name another folder, or delete this one)"
            )
    return key


def _make(
    recipe: EncodeRecipe, runtime: Runtime, embedder: Embedder, key: str, ranges_2D: np.ndarray | None
) -> tuple[int, list[int]]:
    """(rows of all ranks, numbers of this rank's shards)."""
    from tqdm import tqdm

    output, total, mine = recipe.output, 0, []
    waiting: deque[Shard] = deque()
    bar = tqdm(unit="text", disable=not (runtime.is_main and sys.stderr.isatty()))

    def jobs() -> Iterator[tuple[list[str], Role]]:
        nonlocal total
        for shard in shards(read_texts(recipe), recipe.encode.shard_rows):
            total += len(shard.ids)
            if shard.number % runtime.world_size != runtime.rank:
                continue
            mine.append(shard.number)
            if _facts(shard_file(output, shard.number)):
                bar.update(len(shard.ids))
                continue
            waiting.append(shard)
            yield shard.texts, recipe.role

    with bar:
        for found in embedder.stream(jobs()):
            shard = waiting.popleft()
            vectors_ND = stored(found.vectors_ND.numpy(), output.dtype, ranges_2D)
            facts = {"key": key, "truncated": str(found.truncated)}
            write_shard(shard_file(output, shard.number), shard.ids, vectors_ND, facts)
            bar.update(len(shard.ids))
    if not total:
        raise DataError(NO_ROW.format(", ".join(recipe.texts)))
    return total, mine


def main(argv: Sequence[str] | None = None) -> int:
    return door(argv, usage="Embed a corpus with a trained model.", schema=EncodeRecipe, plan=plan, run=run)
