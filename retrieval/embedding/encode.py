"""A corpus to embeddings on the disk: shards in input order, on all devices of all ranks, restartable at the shard.

Shape suffixes: N rows of a shard, D width as stored.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lodestar.cli import entry_point
from lodestar.data.readers import count_rows, find_sources
from lodestar.distributed.runtime import Placement
from lodestar.errors import ConfigError, DataError
from lodestar.files import make_folder, write_json
from lodestar.planning.plan import PlanWarnings
from retrieval.embedding.config import EncodeRecipe, Role
from retrieval.embedding.embedder import Embedder, fingerprint
from retrieval.embedding.shards import (
    MANIFEST,
    NO_ROW,
    RANGES,
    Shard,
    _facts,
    _ranges,
    files_of,
    read_texts,
    shard_file,
    shards,
    stored,
    write_shard,
)

if TYPE_CHECKING:
    import numpy as np

    from lodestar.distributed.runtime import Runtime

TIMEOUT_MINUTES = 24 * 60.0
"""How long a rank waits for the others: theirs may be the longer texts."""


# --- the command -----------------------------------------------------------------------------


def plan(recipe: EncodeRecipe, world_size: int, device: str | None = None) -> dict[str, Any]:
    """What `--plan` prints."""
    missing = PlanWarnings([])
    rows = missing.or_default(None, lambda: count_rows(find_sources(files_of(recipe), "texts")), "rows are not known")
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
    from lodestar.distributed.session import distributed_session

    with distributed_session(placement, TIMEOUT_MINUTES, recipe) as runtime:
        encode(recipe, runtime)
    return 0


def encode(recipe: EncodeRecipe, runtime: Runtime, *, tells: bool = True) -> None:
    """Rank r of W makes the shards r, r + W, ... that are not there yet; then rank 0 writes the manifest, and tells."""
    from lodestar.distributed.collectives import agreed, gather_objects, on_main

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
        write_json(Path(output.dir) / MANIFEST, {**facts, **kept, "files": names})
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
    return entry_point(argv, usage="Embed a corpus with a trained model.", schema=EncodeRecipe, plan=plan, run=run)
