"""A gradient that is not finite on one rank alone skips the step on all."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from lodestar.distributed.testing import run_world
from lodestar.training.build_engine import build
from tests.distributed import steps


def step(rank: int, size: int, folder: Path, damaged: bool, overrides: tuple[str, ...]) -> tuple[float, bool]:
    """Whether the step was skipped, and whether it changed the weights."""
    recipe = steps.recipe("finetune", folder, *overrides)
    task, runtime = steps.built_task(recipe, rank, size)
    engine: Any = build(task.module, runtime, recipe.engine, recipe.optim, recipe.precision)
    before, backward = steps.on_all(engine.weights()), engine.backward
    if damaged and rank == 1:
        engine.backward = lambda local_loss, **options: backward(local_loss * math.nan, **options)
    task.stage.backward(next(task.batches(0)), engine, 0)
    report, after = engine.step(1.0), steps.on_all(engine.weights())
    return float(report.skipped), any(not after[name].equal(before[name]) for name in before)


@pytest.mark.parametrize(
    "engine", ["zero1", *(pytest.param(name, marks=pytest.mark.slow) for name in ("ddp", "zero2"))]
)
def test_a_nan_on_one_rank_skips_the_step_on_all(engine: str, tmp_path: Path) -> None:
    steps.recipe("finetune", tmp_path)
    assert run_world(step, 2, tmp_path, True, steps.ENGINES[engine]) == [(1.0, False)] * 2
    assert run_world(step, 2, tmp_path, False, steps.ENGINES[engine]) == [(0.0, True)] * 2
