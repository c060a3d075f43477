"""DDP's engine over real processes: its end."""

from __future__ import annotations

import threading
import weakref
from pathlib import Path

import torch
import torch.distributed as dist

from lodestar.distributed.testing import run_world
from lodestar.training.build_engine import build
from tests.distributed import steps


class SlowToEnd(torch.Tensor):
    """Its end waits for the GIL while it is dropped, as any tensor's may."""

    dropped, may_end = threading.Event(), threading.Event()

    def __del__(self) -> None:
        self.dropped.set()
        self.may_end.wait(0.5)


def outlive_the_group(rank: int, size: int, folder: Path) -> bool:
    """An engine that is dropped after the process group, while a thread of gloo still drops a tensor."""
    recipe = steps.recipe("finetune", folder)
    task, runtime = steps.built_task(recipe, rank, size)
    engine = build(task.module, runtime, recipe.engine, recipe.optim, recipe.precision)
    task.stage.backward(next(task.batches(0)), engine, 0)
    engine.step(1.0)
    dist.all_reduce(torch.zeros(1).as_subclass(SlowToEnd), async_op=True)  # from here on only gloo holds the tensor
    assert SlowToEnd.dropped.wait(60)
    dist.destroy_process_group()
    ddp = weakref.ref(engine._wrapped)  # type: ignore[attr-defined]
    del engine, task
    assert ddp() is None
    SlowToEnd.may_end.set()
    dist.init_process_group("gloo", f"file://{folder}/next", rank=rank, world_size=size)  # for run_world to end
    return True


def test_an_engine_that_outlives_its_process_group_ends(tmp_path: Path) -> None:
    steps.recipe("finetune", tmp_path)
    assert run_world(outlive_the_group, 2, tmp_path, limit_s=60) == [True, True]
