"""What a run leaves in its folder, and what it makes of what lies there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from chassis import checkpoint
from chassis.errors import CheckpointError, DataError, TrainingError
from chassis.hooks import StopHook
from chassis.prepared import Prepared
from chassis.runtime import Runtime
from chassis.session import _Session
from tests import tiny
from tests.distributed import steps


def train(folder: Path, *overrides: str, stage: str = "finetune", poison: Any = None) -> Path:
    """A run alone, in this process; its folder."""
    made = steps.recipe(stage, folder, "checkpoint.every_steps=2", "checkpoint.keep=2", *overrides)

    def prepare(recipe: Any, runtime: Runtime) -> Prepared:
        prepared = (steps.prepare_finetune if stage == "finetune" else steps.prepare_pretrain)(recipe, runtime)
        if poison is not None:
            inner = prepared.stage.backward
            prepared.stage.backward = lambda batch, engine, step: poison(inner, batch, engine, step)  # type: ignore[method-assign]
        return prepared

    with StopHook(1) as stop:
        assert _Session(made, Runtime(0, 1, 0, torch.device("cpu"))).run(prepare, stop) == 0
    return Path(made.run.output_dir)


def test_a_fresh_start_sets_aside_what_an_earlier_run_saved(tmp_path: Path) -> None:
    folder = train(tmp_path, "schedule.steps=8")
    assert checkpoint.steps(folder / "checkpoints") == [6, 8]
    train(tmp_path, "schedule.steps=4", "checkpoint.resume=none")
    assert checkpoint.steps(folder / "checkpoints") == [2, 4]  # its own: not pruned for higher ones
    assert (folder / "checkpoints/replaced-step-00000008/manifest.json").is_file()
    assert json.loads((folder / "summary.json").read_text())["steps"] == 4


def test_a_damaged_checkpoint_does_not_outlive_the_run_that_passed_it_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = train(tmp_path, "schedule.steps=4")
    (folder / "checkpoints/step-00000004/state.json").write_text("{}")
    train(tmp_path, "schedule.steps=4")
    assert "damaged" in capsys.readouterr().err
    assert checkpoint.find(folder / "checkpoints", "auto") == (folder / "checkpoints/step-00000004", [])


def test_the_best_of_an_earlier_run_is_not_the_best_of_a_fresh_one(tmp_path: Path) -> None:
    tiny.beir_folder(tmp_path / "beir")
    best = ("schedule.steps=2", f"evaluate.data={tmp_path}/beir", "evaluate.keep_best=ndcg_at_10")
    folder = train(tmp_path, *best)
    first = (folder / "model/model.safetensors").read_bytes()
    (folder / "best.json").write_text(json.dumps({"metric": "ndcg_at_10", "value": 9.0, "step": 999}))
    train(tmp_path, *best, "run.seed=7", "checkpoint.resume=none")
    assert json.loads((folder / "best.json").read_text())["step"] == 2
    assert (folder / "model/model.safetensors").read_bytes() != first


def test_a_run_that_is_refused_leaves_the_recipe_of_the_one_before(tmp_path: Path) -> None:
    folder = train(tmp_path)
    before = (folder / "config.yaml").read_text()
    with pytest.raises(CheckpointError, match="seed: the checkpoint has 42, this run 7"):
        train(tmp_path, "run.seed=7")
    with pytest.raises(DataError, match="do not fill one batch"):
        train(tmp_path, "schedule.steps=null", "schedule.epochs=0.01")
    assert (folder / "config.yaml").read_text() == before


def test_the_environment_names_the_data(tmp_path: Path) -> None:
    folder = train(tmp_path)
    state = json.loads((folder / "checkpoints/step-00000002/state.json").read_text())
    assert json.loads((folder / "environment.json").read_text())["data"] == state["data"] != []


def _nan_from(first: int) -> Any:
    def poisoned(inner: Any, batch: Any, engine: Any, step: int) -> Any:
        shares = inner(batch, engine, step)
        if step >= first:
            next(engine.module.parameters()).grad.fill_(float("nan"))
        return shares

    return poisoned


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_steps_without_a_finite_gradient_are_skipped_and_counted(stage: str, tmp_path: Path) -> None:
    clean = train(tmp_path, "schedule.steps=2", "schedule.shape=constant", f"run.output_dir={tmp_path}/a", stage=stage)
    skipping = train(
        tmp_path, "schedule.steps=4", "schedule.shape=constant", f"run.output_dir={tmp_path}/b", stage=stage,
        poison=_nan_from(2),
    )  # fmt: skip
    assert json.loads((skipping / "summary.json").read_text())["skipped"] == 2
    first, second = (
        checkpoint.read(folder / f"checkpoints/step-{step:08d}")[0] for folder, step in ((clean, 2), (skipping, 4))
    )
    assert all(first["weights"][name].equal(second["weights"][name]) for name in first["weights"])
    assert all(first["optimizer"][name].equal(second["optimizer"][name]) for name in first["optimizer"])


def test_a_gradient_that_stays_without_numbers_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="step 6: the gradient was not finite 3 times in a row"):
        train(tmp_path, "schedule.steps=9", "track.log_every=2", "engine.give_up_after=3", poison=_nan_from(3))
