"""A run that is killed in the same step again and again is stopped, and its examples are named."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

import pytest

from lodestar.data.sampler import ShuffledSampler
from tests import processes
from tests.distributed import steps

CODE = """
import json, os, sys
from pathlib import Path
import torch
from lodestar.errors import LodestarError
from lodestar.distributed.runtime import Runtime
from lodestar.training.hooks import StopHook
from lodestar.training.trainer import Trainer
from tests.distributed import steps

stage, folder = sys.argv[1], Path(sys.argv[2])

def run(last, number, *overrides):
    recipe = steps.recipe(stage, folder, "schedule.steps=6", "checkpoint.every_steps=2", *overrides)
    def build_task(recipe, runtime):
        task = (steps.build_finetune_task if stage == "finetune" else steps.build_pretrain_task)(recipe, runtime)
        backward = task.stage.backward
        def dies(batch, engine, step):
            if step == last:
                os.kill(os.getpid(), number)
            return backward(batch, engine, step)
        task.stage.backward = dies
        return task
    with StopHook(1) as stop:
        try:
            return Trainer(recipe, Runtime(0, 1, 0, torch.device("cpu"))).run(build_task, stop)
        except LodestarError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            return error.exit_code

ends = []
for arguments in json.loads(sys.argv[3]):
    if not (child := os.fork()):  # a process for each run, which imports nothing again
        os._exit(run(*arguments))
    ends.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(json.dumps(ends))
"""
KILL, TERM = int(signal.SIGKILL), int(signal.SIGTERM)
Run = tuple[int | str, ...]
"""(step in which it gets a signal, that signal, *overrides)."""


def ends(stage: str, folder: Path, *runs: Run) -> tuple[list[int], str]:
    """(exit code of each run, what all wrote to stderr)."""
    process = processes.run([sys.executable, "-c", CODE, stage, str(folder), json.dumps(runs)], limit_s=240)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1]), process.stderr


@pytest.mark.parametrize("stage", ["pretrain", pytest.param("finetune", marks=pytest.mark.slow)])
def test_the_third_crash_in_the_same_step_is_the_last_and_its_examples_are_named(stage: str, tmp_path: Path) -> None:
    record = tmp_path / f"runs/{stage}/attempt.json"
    smaller = (-1, KILL, "batch.micro_size=3")
    codes, said = ends(stage, tmp_path, *[(3, KILL)] * 5, smaller)
    assert codes == [-KILL, -KILL, -KILL, 2, 2, 0]
    line, again = [line for line in said.splitlines() if line.startswith("error: ")]
    assert line == again  # until something changes, as the size of micro-batches here
    rows = ShuffledSampler(40, steps.GLOBAL_SIZE, 42, "0" if stage == "finetune" else "").batch(3, range(19))[1]
    batch = [f"{tmp_path}/{stage}.jsonl:{row + 1}" for row in rows.tolist()]
    assert f"crashed 3 times in a row in step 4 with the examples {batch[0]}, {batch[1]}, " in line
    assert f"delete {record}; " in line and not record.exists()
    assert (tmp_path / f"runs/{stage}/crashed-batch.txt").read_text().splitlines() == batch


@pytest.mark.slow
def test_neither_a_stop_signal_nor_crashes_in_different_steps_stop_a_run(tmp_path: Path) -> None:
    (tmp_path / "runs/pretrain").mkdir(parents=True)
    record = tmp_path / "runs/pretrain/attempt.json"
    record.write_text('{"step": [')  # damaged: counts as none
    runs = [(2, KILL), (2, KILL), (3, KILL), (3, KILL), (3, TERM), (4, KILL), (4, KILL), (-1, KILL)]
    codes, said = ends("pretrain", tmp_path, *runs)
    assert codes == [-KILL, -KILL, -KILL, -KILL, 3, -KILL, -KILL, 0], said
    assert "resumes from step 4 of 6" in said and not record.exists()


@pytest.mark.slow
def test_of_a_stream_the_place_is_named_from_which_the_examples_were_read(tmp_path: Path) -> None:
    codes, said = ends("pretrain", tmp_path, *[(3, KILL, "data.streaming=true")] * 4)
    assert codes == [-KILL, -KILL, -KILL, 2]
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert f"in step 4 with the examples those of 64 batches from {tmp_path}/pretrain.jsonl:1 on (" in line
