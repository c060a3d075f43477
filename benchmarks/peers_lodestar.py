"""Lodestar's own stages, for `make bench-peers`: the loader, the step and the optimizer of a run, without its hooks.

python -m benchmarks.peers_lodestar pretrain|finetune|encode|loss|loss_whole|products PROBLEM.json

Each command imports what it needs alone, because the memory of the whole process is measured.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks.peers_worker import serve
from lodestar.commands import COMMANDS, load
from lodestar.config.loader import recipe_of
from lodestar.distributed.runtime import Placement, Runtime, joined

TASKS = {"pretrain": "retromae.task:build_task", "finetune": "contrastive.task:build_task"}


def train(stage: str, problem: dict[str, Any], folder: Path, runtime: Runtime) -> Callable[[int], object]:
    """Steps on one process. The problem's examples are one global batch, in another order in each step."""
    from lodestar.training.build_engine import build

    rows = [{"text": text} for text in problem.get("texts", ())] or [
        {"query": query, "pos": [positive], "neg": [negative]} for query, positive, negative in problem["triples"]
    ]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    values: dict[str, Any] = {
        "run": {"output_dir": str(folder / "run")},
        "model": {
            "encoder": problem["encoder"], "max_length": problem["max_tokens"], "attention": problem["attention"],
        },
        "data": {
            "train": [str(folder / "train.jsonl")], "cache_dir": str(folder / "cache"), "workers": 0, "processes": 1,
        },
        "batch": {"global_size": len(rows), **problem["batch"]},
        "optim": {"lr": 1e-5},
        "schedule": {"steps": 10**6},
        "precision": problem["precision"],
        "engine": {"kind": "ddp"},
    }  # fmt: skip
    if stage == "finetune":
        values["data"] |= {f"{role}_max_length": problem[f"{role}_tokens"] for role in ("query", "passage")}
        values["loss"] = {"temperature": problem["temperature"]}
    schema: Any = load(COMMANDS[stage].recipe)
    recipe: Any = recipe_of(schema, values)
    build_task: Any = load(TASKS[stage])
    task = build_task(recipe, runtime)
    engine = build(task.module, runtime, recipe.engine, recipe.optim, recipe.precision)
    engine.module.train()
    batches = task.batches(0)

    def step(i: int) -> None:
        task.stage.backward(next(batches), engine, i)
        engine.step(1.0)

    return step


def encode(problem: dict[str, Any]) -> Callable[[int], object]:
    from retrieval.embedding.encode_texts import encode_texts
    from retrieval.embedding.load_model import load_model

    model = load_model(problem["model"], "cpu")
    return lambda i: encode_texts(model, problem["texts"], "document", precision=problem["precision"])


def losses(name: str, problem: dict[str, Any]) -> Callable[[int], object]:
    """The contrastive loss and its gradient, as GradCache takes it: in tiles, of the whole matrix, products alone."""
    from contrastive.loss import contrastive_local_loss
    from tests.tiny import distinct_texts

    queries, passages, width = problem["queries"], problem["passages"], problem["width"]
    generator = torch.Generator().manual_seed(0)
    q = F.normalize(torch.randn(queries, width, generator=generator), dim=1).requires_grad_()
    d = F.normalize(torch.randn(passages, width, generator=generator), dim=1).requires_grad_()
    mask, target, temperature = distinct_texts(queries, passages), torch.arange(queries), problem["temperature"]

    def loss(i: int) -> None:
        arguments = {"temperature": temperature, "weight": 1 / queries}
        torch.autograd.grad(contrastive_local_loss(q, d, None, mask, **arguments).value, (q, d))

    def loss_whole(i: int) -> None:
        torch.autograd.grad(F.cross_entropy(q @ d.T / temperature, target), (q, d))

    rows = max(1, min(queries, problem["tile_scores"] // passages))
    scores, dq, dd = torch.empty(rows, passages), torch.empty(rows, width), torch.zeros(passages, width)

    @torch.no_grad()
    def products(i: int) -> None:
        for start in range(0, queries, rows):
            tile = q[start : start + rows]
            torch.mm(tile, d.T, out=scores[: len(tile)])
            torch.mm(scores[: len(tile)], d, out=dq[: len(tile)])
            dd.addmm_(scores[: len(tile)].T, tile, alpha=1e-9)

    return {"loss": loss, "loss_whole": loss_whole, "products": products}[name]


def main() -> None:
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    name, problem = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())
    with TemporaryDirectory() as folder:
        if name in TASKS:
            with joined(Placement(0, 1, 0), init_method=f"file://{folder}/store") as runtime:
                serve(train(name, problem, Path(folder), runtime))
        else:
            serve(encode(problem) if name == "encode" else losses(name, problem))


if __name__ == "__main__":
    main()
