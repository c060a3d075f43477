"""Both engines on two GPUs over NCCL: the gradient of the global batch, in half precision, with dropout."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from lodestar.distributed.runtime import Placement, joined
from lodestar.distributed.testing import run_world
from tests.distributed import steps
from tests.gpu import on_gpus

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")]

ENGINES = ("ddp", "zero1", "zero2", "zero3")
LOADER = ["data.workers=2"]  # batches are pinned, as on every GPU


def results(folder: Path, jobs: list[tuple[str, ...]]) -> list[steps.Outcome]:
    """Of rank 0; both ranks have the loss and gradient of the global batch."""
    for stage in ("pretrain", "finetune"):
        steps.recipe(stage, folder)  # files are created by one process
    first, second = run_world(on_gpus.several_steps, 2, folder, jobs, limit_s=600)
    assert all(steps.distance(x, y) < 1e-6 for x, y in zip(first, second, strict=True))
    return first


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-3), ("bf16", 0.1), ("fp16", 0.03)])
def test_a_step_on_two_gpus_is_that_of_one_cpu(engine: str, precision: str, tolerance: float, tmp_path: Path) -> None:
    if engine != "ddp" and find_spec("deepspeed") is None:
        pytest.skip("needs deepspeed")
    stages = ("pretrain", "finetune")
    jobs = [(stage, f"precision={precision}", *steps.ENGINES[engine], *LOADER) for stage in stages]
    on_two_gpus = results(tmp_path, jobs)
    with joined(Placement(0, 1, 0)):
        for stage, outcome in zip(stages, on_two_gpus, strict=True):
            on_cpu = steps.step(0, 1, stage, tmp_path, "precision=fp32")
            assert steps.distance(outcome, on_cpu) < tolerance
            other = steps.step(0, 1, stage, tmp_path, "precision=fp32", "run.seed=7")
            assert steps.distance(outcome, other) > 2 * tolerance


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_dropout_is_the_same_under_all_engines_and_whichever_graphs_are_kept(precision: str, tmp_path: Path) -> None:
    """What is embedded again for the second pass of GradCache drops out the same."""
    engines = [engine for engine in ENGINES if engine == "ddp" or find_spec("deepspeed")]
    shared = ["model.dropout=0.1", f"precision={precision}", *LOADER]
    jobs: list[tuple[str, ...]] = [
        ("finetune", *shared, *steps.ENGINES[engine], f"batch.keep_graph={kept}")
        for engine in engines
        for kept in (0, 1000)
    ]
    jobs.append(("finetune", *shared, "run.seed=7"))
    jobs += [("pretrain", *shared, *steps.ENGINES[engine]) for engine in engines]
    outcomes = results(tmp_path, jobs)
    expected, others, other_seed = outcomes[0], outcomes[1 : 2 * len(engines)], outcomes[2 * len(engines)]
    assert all(steps.distance(outcome, expected) < 0.01 for outcome in others)
    assert steps.distance(other_seed, expected) > 0.1
    expected, *others = outcomes[2 * len(engines) + 1 :]
    assert all(steps.distance(outcome, expected) < 0.01 for outcome in others)
