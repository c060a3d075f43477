"""Speed and memory of the places where training spends them; one JSON line for each, with its units and the machine.

    PYTHONPATH=. python benchmarks/bench.py [--threads 1] [NAME ...]

head    summed_nll against torch's fused linear_cross_entropy and its cross-entropy on whole logits, with gradients
loss    contrastive_local_loss: its share of the rate of the same three matrix products alone; memory beside info_nce's
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
from functools import partial
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.modules.linear_cross_entropy_options import LinearCrossEntropyOptions

from contrastive.loss import contrastive_local_loss, info_nce
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
    fused = partial(F.linear_cross_entropy, options=LinearCrossEntropyOptions())
    arms = {
        "ms": lambda: summed_nll(hidden, weight, bias, target).backward(),
        "torch_fused_ms": lambda: fused(hidden, weight, target, linear_bias=bias, reduction="sum").backward(),
        "plain_ms": lambda: F.cross_entropy(hidden @ weight.T + bias, target, reduction="sum").backward(),
    }
    milliseconds = {name: seconds * 1e3 for name, seconds in zip(arms, _interleaved(*arms.values()), strict=True)}
    return {"labels": labels, "width": width, "vocabulary": vocabulary, **milliseconds}


def loss(queries: int = 8192, passages: int = 16_384, width: int = 768, *, once: bool = False) -> dict[str, Any]:
    q, d = _unit_rows(queries, passages, width)
    tile, scale = q.detach()[:512], queries / min(512, queries)
    if once:
        seconds, products = _seconds(lambda: _local_loss(q, d), once=True), _seconds(_products(tile, d))
    else:
        seconds, products = _interleaved(lambda: _local_loss(q, d), _products(tile, d))
    # `whole` leaves the plain arm out: its scores take 8 GiB, and their gradient as much.
    arms = ("tiles",) if once else ("tiles", "plain")
    grown = {name: run_world(_loss_bytes, 1, name, queries, passages, width)[0] / 2**20 for name in arms}
    return {
        "queries": queries,
        "passages": passages,
        "width": width,
        "ms": seconds * 1e3,
        "products_ms": products * scale * 1e3,
        "share_of_product_rate": products * scale / seconds,
        **{f"peak_memory_growth_mib_{name}": mib for name, mib in grown.items()},
    }


def _unit_rows(queries: int, passages: int, width: int) -> tuple[Tensor, Tensor]:
    q = F.normalize(torch.randn(queries, width, generator=CHANCE), dim=1).requires_grad_()
    return q, F.normalize(torch.randn(passages, width, generator=CHANCE), dim=1).requires_grad_()


def _local_loss(q: Tensor, d: Tensor) -> tuple[Tensor, ...]:
    identity = tiny.distinct_texts(len(q), len(d))
    total = contrastive_local_loss(q, d, None, identity, temperature=0.02, weight=1 / len(q)).value
    return torch.autograd.grad(total, (q, d))


def _loss_bytes(rank: int, size: int, name: str, queries: int, passages: int, width: int) -> int:
    """How much the peak memory of a fresh process grows; `plain` holds all scores."""
    _local_loss(*_unit_rows(64, 64, 64))  # libraries are loaded before memory is looked at
    q, d = _unit_rows(queries, passages, width)
    before = _peak_bytes()
    if name == "tiles":
        _local_loss(q, d)
    else:
        torch.autograd.grad(info_nce(q, d, torch.arange(queries), temperature=0.02).mean(), (q, d))
    return _peak_bytes() - before


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


def _products(tile: Tensor, d: Tensor) -> Callable[[], None]:
    """The three matrix products of one tile of scores, with no memory to be found for their results."""
    scores, dq, dd = tile.new_empty(len(tile), len(d)), torch.empty_like(tile), torch.zeros_like(d)

    def three() -> None:
        with torch.no_grad():
            torch.mm(tile, d.T, out=scores)
            torch.mm(scores, d, out=dq)
            dd.addmm_(scores.T, tile, alpha=1e-9)

    return three


def whole(queries: int = 32_768, passages: int = 65_536, width: int = 768) -> dict[str, Any]:
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


def _interleaved(*calls: Callable[[], Any], rounds: int = 5) -> list[float]:
    """The fastest of a few calls of each, in turns: what disturbs the machine disturbs all."""
    times = [[_seconds(call, once=True) for call in calls] for _ in range(rounds + 1)]
    return [min(column[1:]) for column in zip(*times, strict=True)]


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
