"""The shipped recipes at their full size, on as many real processes as they name, against one process; and their start.

    PYTHONPATH=. python benchmarks/prove_scale.py finetune --ranks 48
    PYTHONPATH=. python benchmarks/prove_scale.py pretrain --ranks 24
    PYTHONPATH=. python benchmarks/prove_scale.py start --rows 10000000
    PYTHONPATH=. python benchmarks/prove_scale.py tokenize --rows 200000 --ranks 2

The first two: one optimizer step of the recipe, on a tiny encoder and texts of a few tokens, so that 48 processes fit
two cores: the loss and the whole gradient must agree with those of one process within 1e-6. Prints one JSON line.

The third: seconds, without imports, of a run of one step on short texts: with an empty token cache, with one that is
whole but was not checked since, and with one that was. `read_mib` counts read calls; mapped files are not among them.

The last: seconds in which nodes of one core each, as many as ranks, build a token cache that they share and load a tiny
encoder, and in which one alone does, by turns.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from contrastive.config import FinetuneRecipe
from lodestar.config import loader
from lodestar.data import cache_parts
from lodestar.distributed.collectives import barrier
from lodestar.distributed.runtime import Runtime
from lodestar.distributed.testing import run_world
from retromae.config import PretrainRecipe
from retromae.task import build_task
from tests import tiny
from tests.distributed import steps

RECIPES: dict[str, tuple[Any, str]] = {
    "pretrain": (PretrainRecipe, "configs/pretrain/24gpu.yaml"),
    "finetune": (FinetuneRecipe, "configs/finetune/48gpu.yaml"),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=[*RECIPES, "start", "tokenize"])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rows", type=int, default=10**6)
    parser.add_argument("--engine", choices=["ddp", "deepspeed"], default="deepspeed")
    options = parser.parse_args()
    if options.stage == "start":
        return _measure_starts(options.rows)
    if options.stage == "tokenize":
        return _measure_tokenizing(options.rows, options.ranks)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        overrides = [*_prepare(folder, options.stage), f"engine.kind={options.engine}"]
        alone, seconds_alone, _ = _run(1, options.stage, overrides)
        together, seconds, mib = _run(options.ranks, options.stage, overrides)
    error = max(steps.distance(outcome["outcome"], alone[0]["outcome"]) for outcome in together)
    found = {
        "stage": options.stage,
        "engine": options.engine,
        "ranks": options.ranks,
        "rows_per_rank": sorted({outcome["rows"] for outcome in together}, reverse=True),
        "rows": sum(outcome["rows"] for outcome in together),
        "negatives_per_query": together[0]["negatives_per_query"],
        "masked_false_negatives": together[0]["masked_false_negatives"],
        "loss": together[0]["outcome"][0],
        "loss_alone": alone[0]["outcome"][0],
        "relative_error": error,
        "seconds": round(seconds, 1),
        "seconds_alone": round(seconds_alone, 1),
        "memory_mib_per_rank": round(mib),
    }
    print(json.dumps(found))
    return 0 if error < 1e-6 else 1


ONE_RUN = """
import json, sys, time
from pathlib import Path
import contrastive.task, lodestar.training.trainer, retromae.task
from retromae.cli import main

def read_bytes():
    return int(Path("/proc/self/io").read_text().split()[1])

start, read = time.perf_counter(), read_bytes()
assert main(sys.argv[1:]) == 0
print(json.dumps({"seconds": round(time.perf_counter() - start, 2), "read_mib": (read_bytes() - read) >> 20}))
"""


def _measure_starts(rows: int) -> int:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        overrides = [override for override in _prepare(folder, "pretrain") if override != "data.processes=1"]
        overrides += ["engine.kind=ddp", "data.processes=2", "schedule.steps=1"]
        corpus, texts = folder / "rows.jsonl", [json.dumps({"text": text}) for text in tiny.texts(10_000)]
        with corpus.open("w") as file:
            for start in range(0, rows, len(texts)):
                file.write("\n".join(texts[: rows - start]) + "\n")
        starts = []
        for _ in range(3):
            _make_older(folder)
            command = [sys.executable, "-c", ONE_RUN, "--config", RECIPES["pretrain"][1], *overrides]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            starts.append(json.loads(done.stdout.splitlines()[-1]))
            (folder / "run").rename(folder / f"run {len(starts)}")
        cache_mib = sum(path.stat().st_size for path in (folder / "cache").rglob("*.arrow")) >> 20
        sizes = {"rows": rows, "corpus_mib": corpus.stat().st_size >> 20, "cache_mib": cache_mib}
        print(json.dumps({**sizes, **dict(zip(("empty", "unchecked", "checked"), starts, strict=True))}))
    return 0


def _measure_tokenizing(rows: int, nodes: int) -> int:
    os.environ["RAYON_NUM_THREADS"] = "1"  # of tokenizers: a node has one core
    parts = 2 * nodes
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        overrides = [*_prepare(folder, "pretrain"), f"data.train=[{folder}/parts/*.jsonl]"]
        (folder / "parts").mkdir()
        for i in range(parts):
            lines = [{"text": f"{i} {text}"} for text in tiny.texts(rows // parts)]
            tiny.write_jsonl(folder / f"parts/{i}.jsonl", lines)
        seconds: dict[int, list[float]] = {nodes: [], 1: []}
        for turn in range(2):
            for size, measured in seconds.items():
                cache = f"data.cache_dir={folder}/cache-{size}-{turn}"
                measured.append(max(run_world(_tokenize, size, [*overrides, cache])))
    print(json.dumps({"rows": rows, "parts": parts, "nodes": nodes, "seconds": seconds[nodes], "alone": seconds[1]}))
    return 0


def _tokenize(rank: int, size: int, overrides: list[str]) -> float:
    cache_parts.PART_BYTES = 1  # each file is a part, however small
    recipe = loader.load(PretrainRecipe, RECIPES["pretrain"][1], overrides)
    barrier()
    start = time.perf_counter()
    build_task(recipe, Runtime(rank, size, 0, torch.device("cpu")))  # the first rank of its node
    return round(time.perf_counter() - start, 1)


def _make_older(folder: Path) -> None:
    """Files that changed in the last two seconds are hashed in any case."""
    for path in folder.rglob("*"):
        earlier = time.time() - 10
        if path.stat().st_mtime > earlier:
            os.utime(path, (earlier, earlier))


def _prepare(folder: Path, stage: str) -> list[str]:
    """A tiny encoder and enough texts for one step; the overrides that put them into the recipe."""
    tiny.encoder(folder / "encoder", "bert", layers=1, width=32, std=0.3)
    chance = random.Random(5)

    def text() -> str:
        return " ".join(chance.choice(tiny.WORDS) for _ in range(chance.randint(1, 3)))

    if stage == "pretrain":
        rows: list[dict[str, Any]] = [{"text": text()} for _ in range(720)]
    else:
        # numbered, so that no text is another's: every other passage is a negative
        rows = [{"query": f"{text()} q {i}", "pos": [f"{text()} p {i}"], "neg": [f"n {i}"]} for i in range(32_768)]
    tiny.write_jsonl(folder / "rows.jsonl", rows)
    return [
        f"model.encoder={folder}/encoder",
        "model.max_length=16",
        f"data.train=[{folder}/rows.jsonl]",
        f"data.cache_dir={folder}/cache",
        "data.processes=1",
        "data.workers=0",
        f"run.output_dir={folder}/run",
        "precision=fp32",  # the recipe's bf16 rounds in another order on another number of rows
        "optim.clip_norm=0",  # the gradient is read from the optimizer's state
        "track.to=[]",
    ] + (["data.query_max_length=16", "data.passage_max_length=16"] if stage == "finetune" else [])


def _run(ranks: int, stage: str, overrides: list[str]) -> tuple[list[dict[str, Any]], float, float]:
    start = time.perf_counter()
    outcomes = run_world(_step, ranks, stage, overrides)
    return outcomes, time.perf_counter() - start, max(outcome["mib"] for outcome in outcomes)


def _step(rank: int, size: int, stage: str, overrides: list[str]) -> dict[str, Any]:
    schema, path = RECIPES[stage]
    made = loader.load(schema, path, overrides)
    outcome, scalars = steps.one_step(rank, size, made)
    return {
        "outcome": outcome,
        "rows": len(made.batch.plan(size).examples(rank)),
        "negatives_per_query": scalars.get("negatives_per_query", 0.0),
        "masked_false_negatives": scalars.get("masked_false_negatives", 0.0),
        "mib": _own_mib(),
    }


def _own_mib() -> float:
    """Memory of this process, pages that it shares with others counted in part."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


if __name__ == "__main__":
    raise SystemExit(main())
