"""GradCache gives what going back through all graphs at once gives, whatever else the recipe asks for."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

from lodestar.distributed.testing import run_world
from lodestar.training.build_engine import build
from lodestar.training.ddp import DdpEngine
from tests.distributed import steps

CHUNKS = {1: 19, 2: 10, 3: 7, 4: 5, 5: 4, 7: 3}  # chunks of 19 rows by micro_size, for one process
DIRECT = "batch.keep_graph=100"  # every graph is kept: one pass over the same chunks, with the same dropout
KEPT = ("batch.keep_graph=0", "batch.keep_graph=2", "batch.keep_graph=0.5")
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
ENGINES = {
    "ddp": ("engine.kind=ddp",),
    **{f"zero{stage}": ("engine.kind=deepspeed", f"engine.zero_stage={stage}") for stage in (1, 2, 3)},
}
ROUNDING = {"precision=bf16": 1e-3}
"""Relative: gradients of chunks add up in another order; under bf16 autocast each is rounded to 8 bits first."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cached")
    steps.recipe("finetune", folder)
    return folder


def allowed(options: tuple[str, ...]) -> float:
    return max(ROUNDING.get(option, 1e-6) for option in options) if options else 1e-6


@pytest.mark.parametrize("chunks", CHUNKS)
def test_any_number_of_chunks_gives_the_direct_step(chunks: int, folder: Path):
    jobs = [
        ("finetune", f"batch.micro_size={CHUNKS[chunks]}", keep, *options)
        for options in OPTIONS.values()
        for keep in (DIRECT, *KEPT)
    ]
    (outcomes,) = run_world(steps.steps, 1, folder, jobs)
    made = len(KEPT) + 1
    for i, (name, options) in enumerate(OPTIONS.items()):
        direct, *cached = outcomes[i * made : (i + 1) * made]
        for keep, outcome in zip(KEPT, cached, strict=True):
            error = steps.distance(outcome, direct)
            assert error < allowed(options), f"{name}, {chunks} chunks, {keep}: relative error {error:.1e}"


def test_every_engine_gives_the_direct_step_of_ddp(folder: Path):
    options = ("plain", "own negatives", "all at once")
    names = [(name, engine, keep) for name in options for engine in ENGINES for keep in (DIRECT, *KEPT[:2])]
    jobs = [("finetune", "batch.micro_size=3", keep, *OPTIONS[name], *ENGINES[engine]) for name, engine, keep in names]
    for outcomes in run_world(steps.steps, 3, folder, jobs):
        found = dict(zip(names, outcomes, strict=True))
        for (name, engine, keep), outcome in found.items():
            error = steps.distance(outcome, found[name, "ddp", DIRECT])
            assert error < allowed(OPTIONS[name]), f"{name}, {engine}, {keep}: relative error {error:.1e}"


def test_other_dropout_in_the_second_pass_would_be_seen(folder: Path):
    jobs = [("finetune", "batch.micro_size=4", *OPTIONS["dropout"], more) for more in (DIRECT, "run.seed=43")]
    ((direct, other),) = run_world(steps.steps, 1, folder, jobs)
    assert steps.distance(other, direct) > 0.01


def _reductions(rank: int, size: int, folder: Path, keep: str) -> tuple[int, int]:
    """How often the gradient is reduced in one step of DDP, and over how many micro-batches."""
    made = steps.recipe("finetune", folder, "batch.micro_size=3", keep)
    task, runtime = steps.built(made, rank, size)
    engine = build(task.module, runtime, made.engine, made.optim, made.precision)
    assert isinstance(engine, DdpEngine)
    reduced: list[int] = []

    def hook(state, bucket):  # DDP wants no annotations, or its own
        reduced.append(bucket.index())
        return default_hooks.allreduce_hook(None, bucket)

    engine._wrapped.register_comm_hook(None, hook)  # type: ignore[operator]
    batch = next(task.batches(0))
    task.stage.backward(batch, engine, 0)
    return len(reduced) - len(set(reduced)), len(batch.micro_batches)


@pytest.mark.parametrize("keep", KEPT[:2])
def test_the_gradient_is_reduced_once_in_a_step(keep: str, folder: Path):
    for again, micro_batches in run_world(_reductions, 2, folder, keep):
        assert micro_batches > 2 and again == 0
