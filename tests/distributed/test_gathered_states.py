"""Under ZeRO rank 0 gathers the shards for a checkpoint: bit by bit what one collective for each tensor gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lodestar.distributed.collectives import sum_over_ranks
from lodestar.distributed.testing import run_world
from lodestar.training import zero
from lodestar.training.build_engine import build
from lodestar.training.host_memory import HostMemory
from tests.distributed import steps

STAGES = {"finetune": (), "pretrain": ("optim.name=muon",)}
OTHERS = (("finetune", 2), ("finetune", 3), ("pretrain", 1), ("pretrain", 2))


def one_by_one(engine: Any, parameter: Any, key: str) -> Tensor:
    """A state of one parameter, as the sum over ranks of zeros with this rank's fragment in them."""
    shape = zero._full_shape(parameter)
    full, fragment = torch.zeros(shape.numel()), engine._fragment(parameter, key)
    if fragment is not None and fragment.contributes:
        full[fragment.start : fragment.start + len(fragment.state)] = fragment.state
    return sum_over_ranks(full).view(shape)


def states(rank: int, size: int, folder: Path, stage: str, zero_stage: int) -> tuple[dict[str, Tensor], Any, list[str]]:
    """The weights and states of a real engine after a step, the same one by one, and our collectives."""
    from deepspeed.utils import safe_get_full_fp32_param

    overrides = ("engine.kind=deepspeed", f"engine.zero_stage={zero_stage}", *STAGES[stage])
    recipe = steps.recipe(stage, folder, *overrides)
    task, runtime = steps.built_task(recipe, rank, size)
    engine: Any = build(task.module, runtime, recipe.engine, recipe.optim, recipe.precision)
    engine.module.train()
    task.stage.backward(next(task.batches(0)), engine, 0)
    engine.step(1.0)
    calls: list[str] = []
    memory = HostMemory()
    engine.weights(memory), engine.optimizer_state(memory)  # the first exchanges the layout
    names = ("all_reduce", "gather", "all_gather_object", "all_gather", "broadcast", "all_gather_into_tensor")
    originals = {name: getattr(dist, name) for name in names}
    for name, function in originals.items():
        setattr(dist, name, lambda *a, _f=function, _n=name, **kw: (calls.append(_n), _f(*a, **kw))[1])
    ours = {**engine.weights(memory), **engine.optimizer_state(memory)}
    ours, counted = {name: tensor.clone() for name, tensor in ours.items()}, list(calls)
    theirs: dict[str, Any] = {}
    for parameter, name in engine._names.items():
        theirs[name] = safe_get_full_fp32_param(parameter).clone()
        for key in engine._keys(parameter):
            theirs[f"{name}:{key}"] = one_by_one(engine, parameter, key)
    return ours, theirs, counted


def embeddings(rank: int, size: int, folder: Path, *overrides: str) -> list[Tensor]:
    """What evaluations before and after the first step read: of the module itself, not through its engine."""
    recipe = steps.recipe("finetune", folder, *overrides)
    task, runtime = steps.built_task(recipe, rank, size)
    engine = build(task.module, runtime, recipe.engine, recipe.optim, recipe.precision)
    results: list[Tensor] = []
    for is_first in (True, False):
        with torch.no_grad():
            results.append(engine.module.eval()(torch.arange(5, 25).view(2, 10), torch.tensor([7, 10]))[0])
        if is_first:
            engine.module.train()
            task.stage.backward(next(task.batches(0)), engine, 0)
            engine.step(1.0)
    return results


def test_evaluations_before_and_after_a_step_read_what_is_sharded(tmp_path: Path) -> None:
    steps.recipe("finetune", tmp_path)
    whole, sharded = (run_world(embeddings, 2, tmp_path, *steps.ENGINES[name]) for name in ("ddp", "zero3"))
    for expected, actual in zip(whole, sharded, strict=True):
        torch.testing.assert_close(actual, expected)
        assert not torch.allclose(*expected)


@pytest.mark.parametrize(
    ("stage", "zero_stage"),
    [("finetune", 1), *(pytest.param(*case, marks=pytest.mark.slow) for case in OTHERS)],
)
def test_rank_0_gathers_all_shards_by_one_collective_for_each_kind_of_state(
    stage: str, zero_stage: int, tmp_path: Path
) -> None:
    steps.recipe(stage, tmp_path)
    (ours, theirs, calls), *others = run_world(states, 3, tmp_path, stage, zero_stage)
    assert all(not of_other and of_calls == calls for of_other, _, of_calls in others)
    assert set(calls) == {"gather"} and len(calls) == 3 + (stage == "pretrain")
    assert ours.keys() == theirs.keys() and len(theirs) > 60
    assert all(ours[name].equal(theirs[name]) for name in theirs)
    assert any(ours[name].count_nonzero() for name in ours if name.endswith(("exp_avg", "momentum_buffer")))
