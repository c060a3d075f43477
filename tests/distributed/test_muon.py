"""Muon: the logged norm is that of the gradient under any engine, and without bf16 units it iterates in fp32."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import _muon

from lodestar.distributed.runtime import Runtime
from lodestar.distributed.testing import run_world
from lodestar.training import optim
from lodestar.training.build_engine import build
from tests.distributed import steps

ENGINES = ("ddp", "zero0", "zero1", "zero2")
ROUNDING = 1e-5  # relative: fp32 sums in another order
FP32, BF16 = 1e-4, 2e-2  # of an update: the iteration multiplies what is small, rounding too, up to 3.4 ** 5 times


def two_steps(
    rank: int, size: int, folder: Path, engine_name: str, units: bool
) -> tuple[list[float], dict[str, Tensor]]:
    """Norms of two steps, and the weights after the first."""
    Runtime.multiplies_bf16 = lambda self: units  # type: ignore[method-assign]
    recipe = steps.recipe("pretrain", folder, "optim.name=muon", "optim.muon_lr=0.05", *steps.ENGINES[engine_name])
    task, runtime = steps.built_task(recipe, rank, size)
    engine = build(task.module, runtime, recipe.engine, recipe.optim, recipe.precision)
    engine.module.train()
    norms, weights = [], {}
    for step in range(2):
        task.stage.backward(next(task.batches(step)), engine, step)
        norms.append(float(engine.step(1.0).grad_norm))
        weights = weights or steps.on_all(engine.weights())
    return norms, weights


def jobs(rank: int, size: int, folder: Path) -> dict[tuple[str, bool], Any]:
    return {(engine, units): two_steps(rank, size, folder, engine, units) for engine in ENGINES for units in (0, 1)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("muon")
    steps.recipe("pretrain", folder)
    return folder


@pytest.fixture(scope="module")
def single(folder: Path) -> dict[tuple[str, bool], Any]:
    (results,) = run_world(jobs, 1, folder)
    return results


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)])
def results(request: pytest.FixtureRequest, folder: Path) -> dict[tuple[str, bool], Any]:
    return run_world(jobs, request.param, folder)[-1]


@pytest.fixture(scope="module")
def start(folder: Path) -> dict[str, Tensor]:
    """The matrices that Muon trains, before the first step."""
    task, _ = steps.built_task(steps.recipe("pretrain", folder, "optim.name=muon"), 0, 1)
    matrices = optim.by_muon(task.module)
    return {name: p.detach() for name, p in task.module.named_parameters() if name in matrices}


def distance(first: dict[str, Tensor], second: dict[str, Tensor], start: dict[str, Tensor]) -> float:
    """Relative, of two updates as one vector each."""
    a, b = (torch.cat([(weights[n] - start[n]).flatten() for n in start]) for weights in (first, second))
    return float((a - b).norm() / b.norm())


def test_the_norm_is_the_gradients_under_any_engine_and_world_size(results: Any, single: Any) -> None:
    """Not of the orthogonal updates, whose norms depend on shapes alone."""
    expected = single["ddp", 0][0]
    assert abs(expected[0] - expected[1]) > 1e-3 * expected[0]
    for key, (norms, _) in results.items():
        assert norms[0] == pytest.approx(expected[0], rel=ROUNDING), key
        assert norms[1] == pytest.approx(expected[1], rel=1e-2), key  # after an update in the engine's own precision


def test_in_fp32_all_engines_take_the_same_step(results: Any, single: Any, start: dict[str, Tensor]) -> None:
    for engine in ENGINES:
        assert distance(results[engine, 0][1], single["ddp", 0][1], start) < FP32, engine


def test_fp32_and_bf16_differ_by_the_rounding_of_bf16(results: Any, start: dict[str, Tensor]) -> None:
    """By no more than torch's and DeepSpeed's iterations in bf16 differ from each other."""
    floor = distance(results["zero1", 1][1], results["ddp", 1][1], start)
    for engine in ENGINES:
        error = distance(results[engine, 1][1], results[engine, 0][1], start)
        assert FP32 < error < 1.5 * floor, f"{engine}: {error:.1e}, floor {floor:.1e}"


@pytest.mark.parametrize("shape", [(12, 7), (7, 12), (64, 64)])
def test_the_iteration_is_torchs_and_nearer_to_the_exact_one(shape: tuple[int, int]) -> None:
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    exact, fp32 = optim.newton_schulz(gradient.double()), optim.newton_schulz(gradient)
    torchs = partial(_muon._zeropower_via_newtonschulz, gradient, optim.NEWTON_SCHULZ, 5, 1e-7)
    before, bf16 = _muon._zeropower_via_newtonschulz, torchs()
    errors = [float((actual - exact).norm() / exact.norm()) for actual in (fp32, bf16)]
    assert fp32.dtype == torch.float32 and errors[0] < FP32 < errors[1] < BF16, errors
    with optim.muon_in_fp32(True):
        assert _muon._zeropower_via_newtonschulz(gradient, optim.NEWTON_SCHULZ, 5, 1e-7).equal(fp32)
    assert _muon._zeropower_via_newtonschulz is before
