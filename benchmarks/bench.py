"""Speed and memory of the places where training spends them; one JSON line for each, with its units and the machine.

    PYTHONPATH=. python benchmarks/bench.py [--threads 1] [NAME ...]

head    summed_nll against torch's cross-entropy on whole logits, forward and backward
loss    contrastive_local_loss in tiles, as a share of the rate of the same three matrix products alone
masks   the masks of a text of 512 tokens: the encoder's, and 256 sets of the decoder's
gather  rows from all ranks to all ranks and their gradient back, over gloo
loader  batches of fine-tuning, built in one process
kept    a step of fine-tuning whose first graphs are kept, against one that computes every chunk twice
encode  texts of 6 to 64 tokens to embeddings, against sentence-transformers' own encode

Two take minutes, and run only where they are named:

whole   the loss at its full size: 32,768 queries x 65,536 passages x 768
curve   peak memory of a whole step by global batch, from 256 to 32,768, in chunks of 64 rows
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from contrastive.config import TILE_BYTES
from contrastive.loss import contrastive_local_loss
from lodestar.distributed.collectives import gather_rows
from lodestar.distributed.runtime import Placement, joined
from lodestar.distributed.testing import run_world
from lodestar.training.build_engine import build
from lodestar.training.synthetic import generated_text
from retrieval.embedding.encode_texts import encode_texts
from retrieval.embedding.load_model import load_model
from retromae.loss import summed_nll
from retromae.masks import decoder_visibility, mask_tokens
from tests import tiny
from tests.distributed import steps

CHANCE = torch.Generator().manual_seed(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="which; none: all that take seconds")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)
    quick = (head, loss, masks, gather, loader, kept, encode)
    known = {bench.__name__: bench for bench in (*quick, whole, curve)}
    if unknown := set(options.names) - known.keys():
        parser.error(f"{', '.join(sorted(unknown))}: not one of {', '.join(known)}")
    for bench in [known[name] for name in options.names] or quick:
        machine = {"torch": version("torch"), "machine": _machine(), "threads": torch.get_num_threads()}
        print(json.dumps({"bench": bench.__name__, **bench(), **machine}), flush=True)


def head(labels: int = 2048, width: int = 256, vocabulary: int = 30_522) -> dict[str, Any]:
    hidden = torch.randn(labels, width, generator=CHANCE).requires_grad_()
    weight = (torch.randn(vocabulary, width, generator=CHANCE) / 16).requires_grad_()
    bias = torch.zeros(vocabulary, requires_grad=True)
    target = torch.randint(vocabulary, (labels,), generator=CHANCE)
    ours = _seconds(lambda: summed_nll(hidden, weight, bias, target).backward())
    plain = _seconds(lambda: F.cross_entropy(hidden @ weight.T + bias, target, reduction="sum").backward())
    return {"labels": labels, "width": width, "vocabulary": vocabulary, "ms": ours * 1e3, "plain_ms": plain * 1e3}


def loss(queries: int = 2048, passages: int = 16_384, width: int = 256, *, once: bool = False) -> dict[str, Any]:
    q = F.normalize(torch.randn(queries, width, generator=CHANCE), dim=1).requires_grad_()
    d = F.normalize(torch.randn(passages, width, generator=CHANCE), dim=1).requires_grad_()
    identity = tiny.distinct_texts(queries, passages)
    before = _peak_bytes()
    seconds = _seconds(
        lambda: contrastive_local_loss(
            q, d, d[:queries], identity, temperature=0.02, weight=1 / queries
        ).value.backward(),
        once=once,
    )
    grown = _peak_bytes() - before
    with torch.no_grad():
        tile = q[: TILE_BYTES // (4 * passages)]
        products = _products(tile, d) * queries / len(tile)
    return {
        "queries": queries,
        "passages": passages,
        "width": width,
        "ms": seconds * 1e3,
        "products_ms": products * 1e3,
        "share_of_product_rate": products / seconds,
        "peak_memory_growth_mib": grown / 2**20,
    }


def masks(texts: int = 32, length: int = 512, sets: int = 256) -> dict[str, Any]:
    ids = torch.randint(10, 1000, (texts, length), generator=CHANCE)
    words = torch.arange(length).repeat(texts, 1) // 2
    words[:, 0] = words[:, -1] = -1
    lengths = torch.full((texts,), length)
    keys = torch.randint(2**60, (texts,), generator=CHANCE)
    ordinary = torch.arange(10, 1000)
    encoder = _seconds(lambda: mask_tokens(ids, words.short(), lengths, keys, 0.3, 4, ordinary))
    decoder = _seconds(lambda: decoder_visibility(words.short(), lengths, keys, 0.5, sets))
    return {
        "length": length,
        "sets": sets,
        "encoder_ms_per_text": encoder / texts * 1e3,
        "decoder_ms_per_text": decoder / texts * 1e3,
    }


def gather(ranks: int = 2, rows: int = 4096, width: int = 768) -> dict[str, Any]:
    seconds = max(run_world(_gather, ranks, rows, width))
    return {"ranks": ranks, "rows_per_rank": rows, "width": width, "ms": seconds * 1e3}


def _gather(rank: int, size: int, rows: int, width: int) -> float:
    x = torch.randn(rows, width, requires_grad=True)
    return _seconds(lambda: gather_rows(x, [rows] * size).sum().backward())


def _products(tile: Tensor, d: Tensor) -> float:
    """Seconds of the three matrix products of one tile of scores, with no memory to be found for their results."""
    scores, dq, dd = tile.new_empty(len(tile), len(d)), torch.empty_like(tile), torch.zeros_like(d)

    def three() -> None:
        torch.mm(tile, d.T, out=scores)
        torch.mm(scores, d, out=dq)
        dd.addmm_(scores.T, tile, alpha=1e-9)

    return _seconds(three)


def whole(queries: int = 32_768, passages: int = 65_536, width: int = 768) -> dict[str, Any]:
    loss(256, 1024, 64)  # libraries are loaded before memory is looked at
    return loss(queries, passages, width, once=True)


def loader(rows: int = 2048) -> dict[str, Any]:
    with TemporaryDirectory() as name:
        made = _recipe(Path(name), rows, micro_size=rows)
        task, _ = steps.built_task(made, 0, 1)
        batch: Any = next(task.batches(0))
        seconds = _seconds(lambda: next(task.batches(0)))
    texts = sum(batch.texts_per_rank)
    return {"texts_per_second": texts / seconds, "tokens_per_text": batch.tokens / texts}


def kept(rows: int = 256, micro_size: int = 32) -> dict[str, Any]:
    found: dict[str, Any] = {"rows": rows, "micro_size": micro_size}
    with TemporaryDirectory() as name:
        for keep in (0, 4, 7, 8):
            made = _recipe(Path(name), rows, micro_size, f"batch.keep_graph={keep}")
            found[f"seconds_with_{keep}_of_8_chunks_kept"] = _step(made)
    return found


def curve() -> dict[str, Any]:
    """In a fresh process for each size, because a process never forgets its peak."""
    found = {}
    for rows in (256, 1024, 4096, 16_384, 32_768):
        with TemporaryDirectory() as name:
            made = _recipe(Path(name), rows, 64)
            (grown,) = run_world(_grown, 1, made)
        found[f"{rows}_rows"] = {"peak_growth_mib": grown / 2**20, "embeddings_mib": 4 * 128 * 3 * rows / 2**20}
    return found


def _grown(rank: int, size: int, made: Any) -> int:
    task, runtime = steps.built_task(made, rank, size)
    engine = build(task.module, runtime, made.engine, made.optim, made.precision)
    batch = next(task.batches(0))
    before = _peak_bytes()
    task.stage.backward(batch, engine, 0)
    return _peak_bytes() - before


def _step(made: Any) -> float:
    """Seconds of one step on this process."""
    with joined(Placement(0, 1, 0)) as runtime:
        task, _ = steps.built_task(made, 0, 1)
        engine = build(task.module, runtime, made.engine, made.optim, made.precision)
        batch = next(task.batches(0))
        return _seconds(lambda: (task.stage.backward(batch, engine, 0), engine.step(0.0)))


def encode() -> dict[str, Any]:
    texts = [generated_text(4 + 58 * i * i // 999**2, i) for i in range(1000)]  # many short, few long
    texts = [texts[i] for i in torch.randperm(len(texts), generator=CHANCE).tolist()]
    with TemporaryDirectory() as name:
        plain = tiny.encoder(Path(name) / "plain", "bert", layers=4, width=256)
        model = load_model(tiny.trained(Path(name) / "model", plain, max_length=64), "cpu")
        ours = _seconds(lambda: encode_texts(model, texts, "document"))
        theirs = _seconds(lambda: model.encode_document(texts, show_progress_bar=False))
    return {"texts_per_second": len(texts) / ours, "sentence_transformers": len(texts) / theirs}


def _recipe(folder: Path, rows: int, micro_size: int, *more: str) -> Any:
    """Fine-tuning of a small encoder on distinct texts of about 32 tokens, each query with one negative."""
    if not (folder / "bert").exists():
        tiny.encoder(folder / "bert", "bert", layers=2, width=128)
        made = [generated_text(30, i) for i in range(3 * rows)]
        lines = [{"query": made[i], "pos": [made[rows + i]], "neg": [made[2 * rows + i]]} for i in range(rows)]
        tiny.write_jsonl(folder / "finetune.jsonl", lines)
    return steps.recipe("finetune", folder, f"batch.global_size={rows}", f"batch.micro_size={micro_size}", *more)


def _seconds(call: Callable[[], Any], least: float = 1.0, *, once: bool = False) -> float:
    """The fastest of several calls that take `least` seconds together: the others were disturbed."""
    if not once:
        call()
    times: list[float] = []
    while not times or (not once and (sum(times) < least or len(times) < 3)):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _machine() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
