"""Speed of the four places where training spends its time; one JSON line for each, with its units and the machine.

    python benchmarks/bench.py [--threads 1]

head    summed_nll against torch's cross-entropy on whole logits, forward and backward
loss    contrastive_share in tiles, as a share of the rate of the same three matrix products alone
masks   the masks of a text of 512 tokens: the encoder's, and 256 sets of the decoder's
gather  rows from all ranks to all ranks and their gradient back, over gloo
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
from torch.nn import functional as F

from chassis.collectives import gather_rows
from chassis.testing import run_world
from contrastive.loss import contrastive_share
from retromae.loss import summed_nll
from retromae.masks import decoder_visibility, mask_tokens
from tests.tiny import distinct_texts

CHANCE = torch.Generator().manual_seed(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    torch.set_num_threads(parser.parse_args().threads)
    torch.set_flush_denormal(True)
    for bench in (head, loss, masks, gather):
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


def loss(queries: int = 2048, passages: int = 16_384, width: int = 256) -> dict[str, Any]:
    q = F.normalize(torch.randn(queries, width, generator=CHANCE), dim=1).requires_grad_()
    d = F.normalize(torch.randn(passages, width, generator=CHANCE), dim=1).requires_grad_()
    identity = distinct_texts(queries, passages)
    before = _peak_bytes()
    seconds = _seconds(
        lambda: contrastive_share(q, d, d[:queries], identity, temperature=0.02, weight=1 / queries).value.backward()
    )
    grown = _peak_bytes() - before
    with torch.no_grad():
        products = 3 * _seconds(lambda: q @ d.T)
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


def _seconds(call: Callable[[], Any], least: float = 1.0) -> float:
    """The fastest of several calls that take `least` seconds together: the others were disturbed."""
    call()
    times: list[float] = []
    while sum(times) < least or len(times) < 3:
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
