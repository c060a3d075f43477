"""Interrupted at a step and resumed is the same as not interrupted, tensor for tensor, with dropout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from lodestar.distributed.runtime import Placement
from lodestar.distributed.testing import run_world
from lodestar.training.trainer import Trainer
from tests import tiny
from tests.distributed import steps

TOTAL, CUT = 4, 2


def train(rank: int, size: int, stage: str, folder: Path, overrides: tuple[str, ...], stop_after: int | None) -> Any:
    """A run of TOTAL steps, ended after `stop_after` as a signal would end it."""
    from lodestar.distributed.runtime import Runtime, choose_device
    from lodestar.training import hooks

    recipe = steps.recipe(stage, folder, *overrides)
    placement = Placement(rank, size, rank)
    trainer = Trainer(recipe, Runtime(placement.rank, placement.world_size, placement.local_rank, choose_device(rank)))
    build_task = steps.build_pretrain_task if stage == "pretrain" else steps.build_finetune_task
    if stop_after is not None:

        def stop(self: hooks.StopHook, progress: Any, done: Any) -> None:
            progress.stop = "SIGTERM" if progress.step == stop_after else None

        hooks.StopHook.after_step = stop  # type: ignore[method-assign]
    with hooks.StopHook(size) as stop_hook:
        return trainer.run(build_task, stop_hook)


OPTIONS = {
    "adamw": (),
    "muon": ("optim.name=muon",),  # the recipe does not clip
    "two sets": ("data.train=[{folder}/finetune.jsonl, {folder}/second.jsonl]", "batch.keep_graph=2e-5"),
}
FAST = [("pretrain", "zero1", "adamw"), ("finetune", "ddp", "adamw"), ("finetune", "ddp", "two sets")]
CASES = [
    (stage, engine, "adamw") for stage in ("pretrain", "finetune") for engine in ("ddp", "zero1", "zero2", "zero3")
]
CASES += [("pretrain", engine, "muon") for engine in ("ddp", "zero1", "zero2")]
CASES += [("finetune", "ddp", "muon"), ("finetune", "zero0", "two sets"), ("finetune", "ddp", "two sets")]


@pytest.mark.parametrize(
    ("stage", "engine", "option"),
    [pytest.param(*case, marks=() if case in FAST else pytest.mark.slow) for case in CASES],
    ids=str,
)
def test_resumed_is_uninterrupted_tensor_for_tensor(stage: str, engine: str, option: str, tmp_path: Path) -> None:
    kind = ("engine.kind=ddp",) if engine == "ddp" else ("engine.kind=deepspeed", f"engine.zero_stage={engine[-1]}")
    kind += tuple(override.format(folder=tmp_path) for override in OPTIONS[option])
    tiny.finetune_file(tmp_path / "second.jsonl", count=21)
    tiny.encoder(tmp_path / "bert", "bert", dropout=0.1)
    steps.recipe(stage, tmp_path)
    common = (*kind, f"schedule.steps={TOTAL}", "track.log_every=1")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_world(train, 2, stage, tmp_path, (*common, f"run.output_dir={whole}"), None)
    assert set(run_world(train, 2, stage, tmp_path, (*common, f"run.output_dir={parts}"), CUT)) == {3}
    assert not (parts / "model").exists()
    run_world(train, 2, stage, tmp_path, (*common, f"run.output_dir={parts}"), None)
    last = f"checkpoints/step-{TOTAL:08d}"
    for name in ("weights", "optimizer"):
        first, second = (load_file(folder / last / f"{name}.safetensors") for folder in (whole, parts))
        assert first.keys() == second.keys()
        assert all(first[key].equal(second[key]) for key in first)
    losses = [
        [json.loads(line)["loss"] for line in (f / "metrics.jsonl").read_text().splitlines()] for f in (whole, parts)
    ]
    assert losses[0] == losses[1] and len(losses[0]) == TOTAL
