"""Interrupted at a step and resumed is the same as not interrupted, tensor for tensor, with dropout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from lodestar.distributed.testing import run_world
from lodestar.training.build_engine import build
from lodestar.training.hooks import StopHook
from lodestar.training.loop import Progress, StepDone
from lodestar.training.trainer import Trainer
from tests import tiny
from tests.distributed import steps

TOTAL, CUT = 4, 2


def train(rank: int, size: int, stage: str, folder: Path, *jobs: tuple[tuple[str, ...], int | None]) -> list[int]:
    """The exit codes of runs one after the other; a job is (overrides, the step after which a signal ends the run).

    A run that resumes another one is in other processes, as in reality: nothing but the checkpoint connects them.
    """
    from lodestar.distributed.runtime import Runtime, choose_device

    codes: list[int] = []
    for overrides, stop_after in jobs:
        trainer = Trainer(steps.recipe(stage, folder, *overrides), Runtime(rank, size, rank, choose_device(rank)))
        build_task = steps.build_pretrain_task if stage == "pretrain" else steps.build_finetune_task
        with StopAfter(size, stop_after) as stop:
            codes.append(trainer.run(build_task, stop))
    return codes


class StopAfter(StopHook):
    """A signal that comes on time."""

    def __init__(self, size: int, step: int | None) -> None:
        super().__init__(size)
        self._step = step

    def after_step(self, progress: Progress, done: StepDone[Any]) -> None:
        progress.stop = "SIGTERM" if progress.step == self._step else None


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
    jobs = [((*common, f"run.output_dir={whole}"), None), ((*common, f"run.output_dir={parts}"), CUT)]
    assert run_world(train, 2, stage, tmp_path, *jobs) == [[0, 3]] * 2
    assert not (parts / "model").exists()
    run_world(train, 2, stage, tmp_path, ((*common, f"run.output_dir={parts}"), None))
    last = f"checkpoints/step-{TOTAL:08d}"
    for name in ("weights", "optimizer"):
        first, second = (load_file(folder / last / f"{name}.safetensors") for folder in (whole, parts))
        assert first.keys() == second.keys()
        assert all(first[key].equal(second[key]) for key in first)
    losses = [
        [json.loads(line)["loss"] for line in (f / "metrics.jsonl").read_text().splitlines()] for f in (whole, parts)
    ]
    assert losses[0] == losses[1] and len(losses[0]) == TOTAL


ELASTIC = 20
"""Steps after the resume; the run has two before."""


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("stage", "before", "size", "after"),
    [
        ("finetune", "ddp", 3, "ddp"),
        pytest.param("finetune", "zero1", 1, "zero3", marks=pytest.mark.slow),
        pytest.param("finetune", "zero3", 3, "zero2", marks=pytest.mark.slow),
        pytest.param("pretrain", "ddp", 3, "zero1", marks=pytest.mark.slow),
        pytest.param("pretrain", "zero2", 1, "ddp", marks=pytest.mark.slow),
        pytest.param("pretrain", "zero0", 3, "zero3", marks=pytest.mark.slow),
    ],
)
def test_resumed_on_other_ranks_and_engine_goes_on_with_the_same_examples_and_losses(
    stage: str, before: str, size: int, after: str, tmp_path: Path
) -> None:
    """Saved by two ranks. Without dropout, which depends on how the batch is cut into micro-batches."""
    steps.recipe(stage, tmp_path)
    common = (f"schedule.steps={CUT + ELASTIC}", "track.log_every=1")
    whole, parts, other = (tmp_path / name for name in ("whole", "parts", "other"))
    jobs = [
        ((*common, *steps.ENGINES[before], f"run.output_dir={whole}"), None),
        ((*common, *steps.ENGINES[before], f"run.output_dir={parts}"), CUT),
        ((*common, *steps.ENGINES[before], "run.seed=7", f"run.output_dir={other}"), CUT),  # a control: another order
    ]
    run_world(train, 2, stage, tmp_path, *jobs)
    run_world(train, size, stage, tmp_path, ((*common, *steps.ENGINES[after], f"run.output_dir={parts}"), None))
    expected, actual = metrics(whole), metrics(parts)
    assert [line["examples"] for line in actual] == [line["examples"] for line in expected]
    assert len({line["examples"] for line in actual}) == CUT + ELASTIC  # each batch is another
    assert [line["loss"] for line in actual] == pytest.approx([line["loss"] for line in expected], rel=1e-6)
    assert not {line["examples"] for line in metrics(other)} & {line["examples"] for line in expected}


def saved_again(rank: int, size: int, stage: str, folder: Path, saved: Path, engines: list[str]) -> list[bool]:
    """Whether weights and optimizer state of a checkpoint are equal once loaded into each engine."""
    equal: list[bool] = []
    for name in engines:
        recipe = steps.recipe(stage, folder, *steps.ENGINES[name], f"checkpoint.resume={saved}", "schedule.steps=4")
        task, runtime = steps.built_task(recipe, rank, size)
        state = Trainer(recipe, runtime)._find_checkpoint(task, Progress(task.total_steps))
        assert state is not None
        engine = build(task.module, runtime, recipe.engine, recipe.optim, recipe.precision)
        engine.resume(state)
        for own, then in ((engine.weights(), state.weights), (engine.optimizer_state(), state.optimizer)):
            now = steps.on_all(own)
            equal.append(now.keys() == then.keys() and all(now[key].equal(then[key]) for key in now))
    return equal


@pytest.mark.parametrize("size", [1, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("before", ["ddp", pytest.param("zero3", marks=pytest.mark.slow)])
def test_a_checkpoint_is_the_same_to_the_last_bit_after_any_engine_loaded_it(
    before: str, size: int, tmp_path: Path
) -> None:
    steps.recipe("finetune", tmp_path)
    run_world(train, 2, "finetune", tmp_path, ((*steps.ENGINES[before], "schedule.steps=4"), CUT))
    saved = tmp_path / f"runs/finetune/checkpoints/step-{CUT:08d}"
    for equal in run_world(saved_again, size, "finetune", tmp_path, saved, list(steps.ENGINES)):
        assert equal == [True] * 2 * len(steps.ENGINES)
