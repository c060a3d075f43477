"""Between the last backward and the next forward nothing asks a device for a number, in a step that does not log."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lodestar.config.schema import CheckpointConfig
from lodestar.reporting.throughput import Console, Throughput
from lodestar.reporting.trackers import Tracker
from lodestar.training.build_engine import build
from lodestar.training.checkpoint_hook import CheckpointHook
from lodestar.training.hooks import LogHook, StopHook
from lodestar.training.loop import Progress, fit
from tests.distributed import steps

READS = ("aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::is_nonzero", "aten::equal")
"""Operations that wait for the device, were it a GPU."""


class Reads(TorchDispatchMode):
    """Counts them."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name().split(".")[0] in READS:
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


class Counted:
    """An engine and hooks whose operations are counted, each step apart."""

    def __init__(self, engine: Any, hooks: list[Any]) -> None:
        self.engine, self.hooks, self.reads = engine, hooks, list[list[str]]()
        self.module, self.run, self.backward = engine.module, engine.run, engine.backward

    def step(self, lr_factor: float) -> Any:
        with Reads() as reads:
            report = self.engine.step(lr_factor)
        self.reads.append(reads.names)
        return report

    def before(self, progress: Progress) -> None: ...

    def after_step(self, progress: Progress, done: Any) -> None:
        with Reads() as reads:
            for hook in self.hooks:
                hook.after_step(progress, done)
        self.reads[-1] += reads.names

    def after(self, progress: Progress) -> None: ...


def reads_of(folder: Path, *overrides: str) -> list[list[str]]:
    """Of three steps, of which the last one logs."""
    recipe = steps.recipe("finetune", folder, "optim.clip_norm=1", "schedule.steps=9", *overrides)
    task, runtime = steps.built_task(recipe, 0, 1)
    engine = build(task.module, runtime, recipe.engine, recipe.optim, recipe.precision)
    log = LogHook(
        Tracker.silent(), Console(total=9, initial=0, enabled=False), Throughput(), every=3, peak_lrs={},
        rows_per_epoch=9, rows_per_step=3, max_consecutive_nonfinite_steps=5,
    )  # fmt: skip
    options: Any = {"writer": None, "hashed": {}, "is_main": True, "request_stop": None, "timeout_minutes": 1.0}
    saving = CheckpointHook(engine, folder, CheckpointConfig(every_steps=0), {}, **options)
    with StopHook(1) as stop:
        counted: Any = Counted(engine, [log, stop, saving])
        fit(
            task.stage, counted, task.batches(0), progress=Progress(3), lr_factor_at=lambda step: 1.0,
            hooks=[counted], counters=task.counters,
        )  # fmt: skip
    return counted.reads


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_that_does_not_log_reads_nothing_from_the_device(precision: str, tmp_path: Path) -> None:
    first, second, logged = reads_of(tmp_path, f"precision={precision}")
    assert first == second == [] and logged


def test_muon_reads_once_whether_the_gradient_is_finite(tmp_path: Path) -> None:
    """torch's Muon, other than its AdamW, cannot be told on the device to skip a step."""
    first, second, _ = reads_of(tmp_path, "optim.name=muon", "optim.clip_norm=0")
    assert first == second == ["aten::_local_scalar_dense"]


def test_the_count_sees_a_read() -> None:
    with Reads() as reads:
        bool(torch.ones(()) > 0), torch.ones(3).nonzero()
    assert reads.names == ["aten::_local_scalar_dense", "aten::nonzero"]
