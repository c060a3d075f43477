"""A corpus to embeddings on the disk: shards in input order, on all devices of all ranks.

A restarted run writes only the shards that are missing.
Shape suffixes: N rows of a shard, D width as stored.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from lodestar.data.readers import find_sources
from lodestar.distributed.collectives import agreed, gather_objects, on_main
from lodestar.distributed.runtime import Runtime
from lodestar.errors import ConfigError
from lodestar.files import NO_HASH, NO_SUCH_FILE, kept_file_problem, make_folder, write_json
from retrieval.embedding.config import EncodeRecipe, Role
from retrieval.embedding.corpus import Shard, cut_shards, files_of, no_rows, read_texts
from retrieval.embedding.embedder import Embedder
from retrieval.embedding.model_folder import fingerprint
from retrieval.embedding.quantization import RANGES, calibrate, quantize
from retrieval.embedding.shards import MANIFEST, Manifest, read_header, shard_path, write_shard

TIMEOUT_MINUTES = 24 * 60.0
"""How long a rank waits for the others: they may have the longer texts."""


def encode(recipe: EncodeRecipe, runtime: Runtime, *, verbose: bool = True) -> None:
    """Rank r of W writes the missing ones of the shards r, r + W, ...; then rank 0 writes the manifest.

    verbose   print a line at the end
    """
    output = recipe.output
    with agreed():
        make_folder(output.dir, "output.dir")
    key = on_main(lambda: _settings_key(recipe))
    with agreed():
        embedder = Embedder(
            recipe.model,
            recipe.encode.devices or runtime.own_devices(),
            precision=recipe.encode.precision,
            batch_tokens=recipe.encode.batch_tokens,
            width=output.width,
            prompts=recipe.prompts,
        )
    with embedder:
        ranges_2D = None
        if output.dtype == "int8":
            ranges = on_main(lambda: calibrate(recipe, key, lambda texts: embedder.encode(texts, recipe.role)))
            ranges_2D = np.array(ranges, dtype=np.float32)
        with agreed():
            num_rows, own_shards = _encode_shards(recipe, runtime, embedder, key, ranges_2D)
    own_truncated = sum(int(read_header(shard_path(output, number))["truncated"]) for number in own_shards)
    manifest: Manifest = {
        "model": recipe.model,
        "role": recipe.role,
        "rows": num_rows,
        "truncated": sum(gather_objects(own_truncated)),
        "key": key,
        "dtype": output.dtype,
        "width": embedder.width,
        "ranges": RANGES if ranges_2D is not None else None,
        "files": [shard_path(output, number).name for number in range(-(-num_rows // recipe.encode.shard_rows))],
    }
    on_main(lambda: _finish(Path(output.dir), manifest, verbose))


def _is_written(path: Path) -> bool:
    """Whether an earlier run wrote the shard; a damaged one is told, and is none."""
    problem = kept_file_problem(path)
    if problem not in (None, NO_SUCH_FILE):
        print(f"warning: {path}: {problem} (nothing to do: encoded again)", file=sys.stderr, flush=True)
    return problem is None


def _finish(folder: Path, manifest: Manifest, verbose: bool) -> None:
    files = manifest["files"]
    if missing := [name for name in files if not (folder / name).is_file()]:
        raise ConfigError(f"output.dir: {folder}: {missing[0]} is not there (name a folder that all nodes see)")
    write_json(folder / MANIFEST, manifest)
    if verbose:
        rows = f"{manifest['rows']:,} embeddings of width {manifest['width']} in {len(files):,} files"
        print(f"{folder}: {rows}, {manifest['truncated']:,} texts truncated", flush=True)


def _settings_key(recipe: EncodeRecipe) -> str:
    """Hash of everything that determines the shards; ConfigError if the folder holds shards with another key."""
    sources = [source.fingerprint for source in find_sources(files_of(recipe), "texts")]
    settings = recipe.model_dump(include={"field", "id_field", "role", "output"})
    settings["output"].pop("dir")
    settings |= {"precision": recipe.encode.precision, "shard_rows": recipe.encode.shard_rows}
    content = json.dumps([fingerprint(recipe.model, recipe.prompts), sources, settings])
    key = hashlib.blake2b(content.encode(), digest_size=12).hexdigest()
    for path in sorted(Path(recipe.output.dir).glob("shard-*")):
        if read_header(path).get("key", key) != key and kept_file_problem(path) in (None, NO_HASH):
            raise ConfigError(
                f"output.dir: {recipe.output.dir}: {path.name} is of another model, corpus or setting "
                "(name another folder, or delete this one)"
            )
    return key


def _encode_shards(
    recipe: EncodeRecipe, runtime: Runtime, embedder: Embedder, key: str, ranges_2D: np.ndarray | None
) -> tuple[int, list[int]]:
    """(rows of all ranks, numbers of this rank's shards)."""
    output, num_rows = recipe.output, 0
    own_shards: list[int] = []
    in_progress: deque[Shard] = deque()
    bar = tqdm(unit="text", disable=not (runtime.is_main and sys.stderr.isatty()))

    def jobs() -> Iterator[tuple[list[str], Role]]:
        nonlocal num_rows
        for shard in cut_shards(read_texts(recipe), recipe.encode.shard_rows):
            num_rows += len(shard.ids)
            if shard.number % runtime.world_size != runtime.rank:
                continue
            own_shards.append(shard.number)
            if _is_written(shard_path(output, shard.number)):
                bar.update(len(shard.ids))
                continue
            in_progress.append(shard)
            yield shard.texts, recipe.role

    with bar:
        for embeddings in embedder.stream(jobs()):
            shard = in_progress.popleft()
            vectors_ND = quantize(embeddings.vectors_ND.numpy(), output.dtype, ranges_2D)
            header = {"key": key, "truncated": str(embeddings.truncated)}
            write_shard(shard_path(output, shard.number), shard.ids, vectors_ND, header)
            bar.update(len(shard.ids))
    if not num_rows:
        raise no_rows(recipe)
    return num_rows, own_shards
