"""Hard negatives: texts that a model ranks high for a query and that are no known answer, as BGE's JSONL for stage 2.

Ranks share the blocks of queries; each block becomes a file, so that an interrupted run repeats only its last blocks.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from lodestar.distributed.collectives import agreed, barrier, on_main
from lodestar.distributed.runtime import Runtime
from lodestar.errors import DataError
from lodestar.files import NO_SUCH_FILE, kept_file_problem, replacing_file, replacing_hashed_file
from retrieval.embedding.config import EncodeRecipe, OutputConfig, Role
from retrieval.embedding.encode import encode
from retrieval.embedding.model_folder import check_folder, fingerprint
from retrieval.mining.block_miner import BlockMiner
from retrieval.mining.config import MineRecipe
from retrieval.mining.cross_encoder import load_cross_encoder
from retrieval.mining.texts import CORPUS, QUERIES, CorpusRows, read_examples, write_texts


def mine(recipe: MineRecipe, runtime: Runtime) -> None:
    """Embed, search block by block (rank r of W takes the blocks r, r + W, ...), join the parts."""
    check_folder(recipe.model)  # before the corpus is read
    texts = on_main(lambda: write_texts(recipe))
    _embed_texts(recipe, runtime, texts.folder)
    with agreed():
        cross_encoder = load_cross_encoder(recipe.cross_encoder, runtime.device) if recipe.cross_encoder else None
    block_size = recipe.block_size(texts.queries, runtime.world_size)
    parts_folder = texts.folder / on_main(lambda: _parts_name(recipe, block_size))
    with agreed():
        parts_folder.mkdir(exist_ok=True)
        miner = BlockMiner(recipe, runtime, texts, CorpusRows(texts.folder), cross_encoder)
        parts = _mine_blocks(miner, parts_folder, block_size)
    barrier()
    on_main(lambda: _join(recipe, parts))


def _embed_texts(recipe: MineRecipe, runtime: Runtime, folder: Path) -> None:
    roles: dict[str, Role] = {CORPUS: "document", QUERIES: "query"}
    for name, role in roles.items():
        encode_recipe = EncodeRecipe(
            model=recipe.model,
            texts=[str(folder / f"{name}.jsonl")],
            output=OutputConfig(dir=str(folder / name)),
            role=role,
            encode=recipe.encode,
            prompts=recipe.prompts,
        )
        encode(encode_recipe, runtime)


def _parts_name(recipe: MineRecipe, block_size: int) -> str:
    cross_encoder = fingerprint(recipe.cross_encoder) if recipe.cross_encoder else None
    content = json.dumps([recipe.mine.model_dump(), cross_encoder, block_size])
    return f"mined-{hashlib.blake2b(content.encode(), digest_size=8).hexdigest()}"


def _mine_blocks(miner: BlockMiner, folder: Path, block_size: int) -> list[Path]:
    """Write this rank's parts that an interrupted run did not write; returns the parts of all ranks."""
    parts: list[Path] = []
    runtime = miner.runtime
    for number, block in enumerate(_blocks(read_examples(miner.recipe), block_size)):
        part = folder / f"part-{number:05d}.jsonl"
        parts.append(part)
        if number % runtime.world_size == runtime.rank and not _is_written(part):
            with replacing_hashed_file(part) as tmp, tmp.open("w", encoding="utf-8") as file:
                file.writelines(_json_line(example) for example in miner.mine(block, number * block_size))
    return parts


def _is_written(part: Path) -> bool:
    """Whether an earlier run wrote the part; a damaged one is told, and is none."""
    problem = kept_file_problem(part)
    if problem not in (None, NO_SUCH_FILE):
        print(f"warning: {part}: {problem} (nothing to do: mined again)", file=sys.stderr, flush=True)
    return problem is None


def _blocks(examples: Iterator[Mapping[str, Any]], size: int) -> Iterator[list[Mapping[str, Any]]]:
    while block := list(islice(examples, size)):
        yield block


def _json_line(example: Mapping[str, Any]) -> str:
    fields = {name: example[name] for name in ("query", "pos", "neg", "pos_scores", "neg_scores")}
    if example["prompt"] is not None:
        fields["prompt"] = example["prompt"]
    if example["type"] != "normal":
        fields["type"] = example["type"]
    return json.dumps(fields, ensure_ascii=False) + "\n"


def _join(recipe: MineRecipe, parts: Sequence[Path]) -> None:
    """The parts as one file, and a line about it."""
    output = Path(recipe.output)
    if absent := [part for part in parts if not part.is_file()]:
        raise DataError(f"{absent[0]}: does not exist (name an output in a folder that all nodes see)")
    counts: list[int] = []  # negatives of each example
    with replacing_file(output) as tmp, tmp.open("w", encoding="utf-8") as file:
        for part in parts:
            for line in part.open(encoding="utf-8"):
                counts.append(len(json.loads(line)["neg"]))
                file.write(line)
    average, short = sum(counts) / len(counts), sum(count < recipe.mine.negatives for count in counts)
    hint = " (for more: raise mine.last_rank, or loosen mine.margin and mine.relative_margin)" if short else ""
    print(f"{output}: {len(counts):,} examples with {average:.1f} negatives each, {short:,} with fewer{hint}")
