"""Hard negatives: what a model ranks high for a query and nobody called an answer, as BGE's JSONL for stage 2.

Exact: every query against every candidate, shard of the corpus by shard, so that only one is in memory. Margins to the
positive's score: Moreira et al. 2024, "NV-Retriever", 3.2.
Shape suffixes: Q queries of a block, N candidates of a shard, K candidates that are looked at, D width.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lodestar.cli import entry_point
from lodestar.data.readers import count_rows, find_sources, read_json, read_rows
from lodestar.distributed.runtime import Placement
from lodestar.errors import DataError, ModelError
from lodestar.files import make_folder, replacing_file, write_json
from lodestar.planning.plan import PlanWarnings
from retrieval.embedding.config import EncodeRecipe, Role
from retrieval.embedding.config import OutputConfig as Output
from retrieval.embedding.corpus import files_of, read_texts
from retrieval.embedding.model_folder import check_folder, fingerprint
from retrieval.embedding.shards import read_embeddings
from retrieval.mining.config import MineRecipe
from retrieval.mining.shard_search import _Rows, _vectors, choose, search_shards

if TYPE_CHECKING:
    from sentence_transformers import CrossEncoder

    from lodestar.distributed.runtime import Runtime


# --- what there is ---------------------------------------------------------------------------


def read_training(recipe: MineRecipe) -> Iterator[Mapping[str, Any]]:
    """The checked rows of `data`, in order, without those whose query is empty."""
    from lodestar.data.training_examples import check_row

    for source in find_sources(recipe.data, "data"):
        for where, row in read_rows(source):
            kept = check_row(where, row)
            if kept is not None:
                yield kept


def _corpus(recipe: MineRecipe) -> EncodeRecipe | None:
    """The corpus as something to read, a BEIR folder as its documents."""
    if recipe.corpus is None:
        return None
    found = EncodeRecipe(model=recipe.model, texts=recipe.corpus, output=Output(dir=""))
    return found.model_copy(update={"texts": files_of(found)})


def _candidates(recipe: MineRecipe) -> Iterator[str]:
    if corpus := _corpus(recipe):
        yield from (text for _, text in read_texts(corpus))
        return
    for row in read_training(recipe):
        yield from row["pos"]
        yield from row["neg"]


def _lay_out(recipe: MineRecipe) -> tuple[str, dict[str, int]]:
    """Write queries.jsonl, corpus.jsonl (each text once: candidates, then other positives) and their hashes.

    returns   (the folder, named by all that decides its content; how many `candidates` and `queries` there are)
    """
    import numpy as np

    from lodestar.data.training_examples import content_hash

    corpus = _corpus(recipe)
    files = [find_sources(recipe.data, "data"), find_sources(corpus.texts if corpus else [], "corpus")]
    sources = [[source.fingerprint for source in each] for each in files]
    how = recipe.encode.model_dump(include={"precision", "shard_rows"})
    said = json.dumps([sources, fingerprint(recipe.model, recipe.prompts), how])
    key = hashlib.blake2b(said.encode(), digest_size=8).hexdigest()
    folder = recipe.work / key
    facts = folder / "texts.json"
    if not facts.is_file():
        make_folder(folder, "output")
        seen: set[int] = set()
        hashes: list[int] = []
        with (folder / "corpus.jsonl").open("w", encoding="utf-8") as file:

            def add(texts: Iterable[str]) -> None:
                for text in texts:
                    if text.strip() and (found := content_hash(text)) not in seen:
                        seen.add(found)
                        file.write(json.dumps({"text": text}) + "\n")
                        hashes.append(found)

            add(_candidates(recipe))
            candidates = len(hashes)
            add(text for row in read_training(recipe) for text in row["pos"])
        with (folder / "queries.jsonl").open("w", encoding="utf-8") as file:
            queries = sum(1 for row in read_training(recipe) if file.write(json.dumps({"text": row["query"]}) + "\n"))
        np.save(folder / "hashes.npy", np.array(hashes, dtype=np.int64))
        write_json(facts, {"candidates": candidates, "queries": queries})
    return str(folder), json.loads(facts.read_text(encoding="utf-8"))


# --- the run ---------------------------------------------------------------------------------


def mine(recipe: MineRecipe, runtime: Runtime) -> None:
    """Embed, search block by block (rank r of W takes the blocks r, r + W, ...), join the parts."""
    import numpy as np

    from lodestar.distributed.collectives import agreed, barrier, on_main
    from retrieval.embedding.encode import encode

    check_folder(recipe.model)  # now, not after the corpus was read
    name, counts = on_main(lambda: _lay_out(recipe))
    folder = Path(name)
    roles: dict[str, Role] = {"corpus": "document", "queries": "query"}
    for texts, role in roles.items():
        output = Output(dir=str(folder / texts))
        source = [str(folder / f"{texts}.jsonl")]
        how = {"role": role, "encode": recipe.encode, "prompts": recipe.prompts}
        encode(EncodeRecipe(model=recipe.model, texts=source, output=output, **how), runtime)
    with agreed():
        teacher = _cross_encoder(recipe.cross_encoder, runtime) if recipe.cross_encoder else None
    size, blocks = _block_rows(recipe, counts["queries"], runtime.world_size), 0
    parts = folder / on_main(lambda: _parts_name(recipe, size))
    with agreed():
        parts.mkdir(exist_ok=True)
        rows_of = _Rows(np.load(folder / "hashes.npy"))
        for number, block in enumerate(_blocks(read_training(recipe), size)):
            part, blocks = _part(parts, number), number + 1
            if number % runtime.world_size == runtime.rank and not part.is_file():
                with replacing_file(part) as tmp, tmp.open("w", encoding="utf-8") as file:
                    candidates, first = counts["candidates"], number * size
                    for row in _mined(recipe, runtime, folder, rows_of, candidates, first, block, teacher):
                        file.write(json.dumps(row, ensure_ascii=False) + "\n")
    barrier()
    on_main(lambda: _join(recipe, [_part(parts, number) for number in range(blocks)]))


def _block_rows(recipe: MineRecipe, queries: int, world_size: int) -> int:
    """So that each rank has a block."""
    return min(recipe.mine.block_rows, max(1, -(-queries // world_size)))


def _parts_name(recipe: MineRecipe, size: int) -> str:
    teacher = fingerprint(recipe.cross_encoder) if recipe.cross_encoder else None
    said = json.dumps([recipe.mine.model_dump(), teacher, size])
    return f"mined-{hashlib.blake2b(said.encode(), digest_size=8).hexdigest()}"


def _part(parts: Path, number: int) -> Path:
    return parts / f"part-{number:05d}.jsonl"


def _blocks(rows: Iterator[Mapping[str, Any]], size: int) -> Iterator[list[Mapping[str, Any]]]:
    while block := list(islice(rows, size)):
        yield block


def _mined(
    recipe: MineRecipe,
    runtime: Runtime,
    folder: Path,
    rows_of: _Rows,
    candidates: int,
    first: int,
    block: list[Mapping[str, Any]],
    teacher: CrossEncoder | None,
) -> Iterator[dict[str, Any]]:
    """The rows of a block with their negatives."""
    import numpy as np
    import torch
    from tqdm import tqdm

    from lodestar import rng
    from lodestar.data.training_examples import content_hash

    asked, answers = {content_hash(row["query"]) for row in block}, defaultdict[int, set[int]](set)
    for row in read_training(recipe):  # the same question may stand in several rows
        if (question := content_hash(row["query"])) in asked:
            answers[question].update(rows_of[row["pos"]])
    known = [
        answers[content_hash(row["query"])] | {at for at in rows_of[[row["query"]]] if at is not None} for row in block
    ]
    query_QD = _vectors(folder / "queries", first, len(block))
    positive_scores: dict[int, list[float]] = defaultdict(list)
    negatives: dict[int, tuple[list[int], list[float]]] = {}
    # A query with many answers needs a deep search, the others do not: each depth is a search of its own.
    room_Q = np.array([max(64, 1 << (len(rows) - 1).bit_length()) for rows in known])
    for room in np.unique(room_Q).tolist():
        these = np.flatnonzero(room_Q == room).tolist()
        pairs = [(at, row) for at, i in enumerate(these) for row in rows_of[block[i]["pos"]]]
        shards = tqdm(
            (vectors_ND for _, vectors_ND in read_embeddings(folder / "corpus")),
            desc=f"searching for {len(these):,} queries",
            unit="shard",
            leave=False,
            disable=not (runtime.is_main and sys.stderr.isatty()),
        )
        scores_QK, rows_QK, pair_scores_P = search_shards(
            query_QD[these],
            shards,
            candidates=candidates,
            k=recipe.mine.last_rank + room,
            pairs_2P=np.array(pairs, dtype=np.int64).T,
            device=str(runtime.device),
        )
        for (at, _), score in zip(pairs, pair_scores_P.tolist(), strict=True):
            positive_scores[these[at]].append(score)
        for i, scores_K, rows_K in zip(these, scores_QK, rows_QK, strict=True):
            draw = torch.tensor(rng.key(recipe.mine.seed, "mine", first + i))
            keys_K = rng.hashed(draw, torch.arange(len(rows_K))).numpy()
            places = choose(scores_K, rows_K, known[i], min(positive_scores[i]), recipe.mine, keys_K)
            negatives[i] = rows_K[places].tolist(), scores_K[places].tolist()
    texts = _texts(folder / "corpus.jsonl", {row for rows, _ in negatives.values() for row in rows})
    found = [
        {
            **{name: row[name] for name in ("query", "pos")},
            "neg": [texts[at] for at in negatives[i][0]],
            "pos_scores": positive_scores[i],
            "neg_scores": negatives[i][1],
            **({"prompt": row["prompt"]} if row["prompt"] is not None else {}),
            **({"type": row["type"]} if row["type"] != "normal" else {}),
        }
        for i, row in enumerate(block)
    ]
    yield from _rescored(teacher, found, runtime.is_main) if teacher else found


def _texts(path: Path, wanted: set[int]) -> dict[int, str]:
    return {i: row["text"] for i, (_, row) in enumerate(read_json(path)) if i in wanted}


def _cross_encoder(name: str, runtime: Runtime) -> CrossEncoder:
    from safetensors import SafetensorError
    from sentence_transformers import CrossEncoder

    try:
        model = CrossEncoder(name, device=str(runtime.device))
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ModelError(f"cross_encoder: {name}: cannot be opened: {reason} (check the name)") from None
    if model.num_labels != 1:
        raise ModelError(f"cross_encoder: {name}: gives {model.num_labels} scores for a pair (take one that gives one)")
    return model


def _rescored(model: CrossEncoder, rows: list[dict[str, Any]], tells: bool) -> Iterator[dict[str, Any]]:
    """The rows with a cross-encoder's logits: behind its usual sigmoid, a softmax could hardly tell them apart."""
    import torch

    pairs = [(row["query"], text) for row in rows for text in (*row["pos"], *row["neg"])]
    shown = tells and sys.stderr.isatty()
    scores, at = model.predict(pairs, activation_fn=torch.nn.Identity(), show_progress_bar=shown), 0
    for row in rows:
        own = [float(score) for score in scores[at : at + len(row["pos"]) + len(row["neg"])]]
        at += len(own)
        yield {**row, "pos_scores": own[: len(row["pos"])], "neg_scores": own[len(row["pos"]) :]}


def _join(recipe: MineRecipe, parts: Sequence[Path]) -> None:
    """The parts as one file, and a line about it."""
    output = Path(recipe.output)
    if absent := [part for part in parts if not part.is_file()]:
        raise DataError(f"{absent[0]}: is not there (name an output in a folder that all nodes see)")
    rows = negatives = short = 0
    with replacing_file(output) as tmp:
        with tmp.open("w", encoding="utf-8") as file:
            for part in parts:
                for line in part.open(encoding="utf-8"):
                    found = len(json.loads(line)["neg"])
                    rows, negatives, short = rows + 1, negatives + found, short + (found < recipe.mine.negatives)
                    file.write(line)
        if not rows:
            raise DataError(f"data: {', '.join(recipe.data)}: no row (name files with query and pos)")
    print(f"{output}: {rows:,} rows with {negatives / rows:.1f} negatives each, {short:,} with fewer than asked for")


# --- the command -----------------------------------------------------------------------------


def plan(recipe: MineRecipe, world_size: int, device: str | None = None) -> dict[str, Any]:
    """What `--plan` prints."""
    corpus, missing = _corpus(recipe), PlanWarnings([])

    def count(files: Sequence[str], name: str) -> int | None:
        return missing.or_default(None, lambda: count_rows(find_sources(files, name)), "rows are not known")

    queries = count(recipe.data, "data")
    return {
        "model": recipe.model,
        "output": recipe.output,
        "work": str(recipe.work),
        "world_size": world_size,
        "queries": queries,
        "corpus_rows": count(corpus.texts, "corpus") if corpus else "all passages of data",
        "negatives_per_query": recipe.mine.negatives,
        "ranks": f"{recipe.mine.first_rank} to {recipe.mine.last_rank}, {recipe.mine.pick}",
        "blocks": None if queries is None else -(-queries // _block_rows(recipe, queries, world_size)),
        "missing": missing.lines,
    }


def run(recipe: MineRecipe, placement: Placement) -> int:
    from lodestar.distributed.session import distributed_session
    from retrieval.embedding.encode import TIMEOUT_MINUTES

    try:
        import faiss  # noqa: F401
    except ImportError:
        raise ModelError("mine: faiss is not installed (pip install 'lodestar-embeddings[mine]')") from None
    with distributed_session(placement, TIMEOUT_MINUTES, recipe) as runtime:
        mine(recipe, runtime)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return entry_point(argv, usage="Find hard negatives with a trained model.", schema=MineRecipe, plan=plan, run=run)
