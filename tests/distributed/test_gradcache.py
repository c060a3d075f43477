"""GradCache gives the gradient of a backward through all graphs at once, with any loss of the recipe."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

from lodestar.distributed.testing import run_world
from lodestar.training.build_engine import build
from lodestar.training.ddp import DdpEngine
from tests.distributed import steps

MICRO_SIZES = {1: 19, 2: 10, 3: 7, 4: 5, 5: 4, 7: 3}  # by number of micro-batches of 19 examples on one rank
DIRECT = "batch.keep_graph=100"  # all graphs are kept: the same micro-batches and dropout, embedded once
KEEP_GRAPH = ("batch.keep_graph=0", "batch.keep_graph=2", "batch.keep_graph=0.5")
OPTIONS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "dropout": ("model.dropout=0.2",),
    "bf16": ("precision=bf16",),
    "distillation": ("loss.distillation=0.5", "data.negatives_per_query=2"),
    "matryoshka": ("loss.matryoshka=[4,8]",),
    "own negatives": ("loss.share_negatives=false",),
    "all at once": (
        "model.dropout=0.2", "precision=bf16", "loss.distillation=0.5", "loss.matryoshka=[8]",
        "loss.passage_to_query=1", "loss.query_to_query=1", "loss.passage_to_passage=1", "loss.learn_temperature=true",
    ),
}  # fmt: skip
ENGINES = ("ddp", "zero1", "zero2", "zero3")
ROUNDING = {"precision=bf16": 1e-3}
"""Relative: gradients of micro-batches add up in another order; under bf16 autocast each is rounded to 8 bits first."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cached")
    steps.recipe("finetune", folder)
    return folder


def tolerance(options: tuple[str, ...]) -> float:
    return max(ROUNDING.get(option, 1e-6) for option in options) if options else 1e-6


@pytest.mark.parametrize("num_micro_batches", MICRO_SIZES)
def test_any_number_of_micro_batches_gives_the_direct_step(num_micro_batches: int, folder: Path):
    jobs = [
        ("finetune", f"batch.micro_size={MICRO_SIZES[num_micro_batches]}", keep, *options)
        for options in OPTIONS.values()
        for keep in (DIRECT, *KEEP_GRAPH)
    ]
    (outcomes,) = run_world(steps.steps, 1, folder, jobs)
    count = len(KEEP_GRAPH) + 1
    for i, (name, options) in enumerate(OPTIONS.items()):
        direct, *cached = outcomes[i * count : (i + 1) * count]
        for keep, outcome in zip(KEEP_GRAPH, cached, strict=True):
            error = steps.distance(outcome, direct)
            assert error < tolerance(options), (
                f"{name}, {num_micro_batches} micro-batches, {keep}: relative error {error:.1e}"
            )


@pytest.mark.slow
def test_every_engine_gives_the_direct_step_of_ddp(folder: Path):
    options = ("plain", "own negatives", "all at once")
    names = [(name, engine, keep) for name in options for engine in ENGINES for keep in (DIRECT, *KEEP_GRAPH[:2])]
    jobs = [
        ("finetune", "batch.micro_size=3", keep, *OPTIONS[name], *steps.ENGINES[engine]) for name, engine, keep in names
    ]
    for outcomes in run_world(steps.steps, 3, folder, jobs):
        by_name = dict(zip(names, outcomes, strict=True))
        for (name, engine, keep), outcome in by_name.items():
            error = steps.distance(outcome, by_name[name, "ddp", DIRECT])
            assert error < tolerance(OPTIONS[name]), f"{name}, {engine}, {keep}: relative error {error:.1e}"


def test_another_seed_gives_another_gradient_with_dropout(folder: Path):
    jobs = [("finetune", "batch.micro_size=4", *OPTIONS["dropout"], option) for option in (DIRECT, "run.seed=43")]
    ((direct, other),) = run_world(steps.steps, 1, folder, jobs)
    assert steps.distance(other, direct) > 0.01


def _counts(rank: int, size: int, folder: Path, options: tuple[str, ...]) -> tuple[int, int, int]:
    """Of a step of DDP: buckets that are reduced more than once, forward passes, micro-batches."""
    recipe = steps.recipe("finetune", folder, "batch.micro_size=3", *options)
    task, runtime = steps.built_task(recipe, rank, size)
    engine = build(task.module, runtime, recipe.engine, recipe.optim, recipe.precision)
    assert isinstance(engine, DdpEngine)
    reduced_buckets: list[int] = []
    forwards: list[nn.Module] = []
    task.module.register_forward_hook(lambda module, *_: forwards.append(module))

    def hook(state, bucket):  # DDP wants no annotations, or its own
        reduced_buckets.append(bucket.index())
        return default_hooks.allreduce_hook(None, bucket)

    engine._wrapped.register_comm_hook(None, hook)  # type: ignore[operator]
    batch = next(task.batches(0))
    task.stage.backward(batch, engine, 0)
    return len(reduced_buckets) - len(set(reduced_buckets)), len(forwards), batch.num_micro_batches


@pytest.mark.parametrize(("options", "kept"), [((), 1), (KEEP_GRAPH[:1], 0), (KEEP_GRAPH[1:2], 2)])
def test_a_step_reduces_the_gradient_once_and_embeds_kept_graphs_once(
    options: tuple[str, ...], kept: int, folder: Path
):
    for repeated, forwards, micro_batches in run_world(_counts, 2, folder, options):
        assert micro_batches > 2 and repeated == 0
        assert forwards == 2 * micro_batches - kept
