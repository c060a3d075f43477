"""Both commands as users start them, on one GPU: each engine, packed texts in bf16, compiled layers, a resume."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tests import processes, tiny
from tests.distributed import steps

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("commands")
    tiny.encoder(folder / "bert", "bert", dropout=0.1)
    tiny.pretrain_file(folder / "pretrain.jsonl")
    tiny.finetune_file(folder / "finetune.jsonl")
    return folder


def losses(folder: Path, stage: str, name: str, *overrides: str) -> list[float]:
    """Of each step of a run; a run that is there already goes on."""
    recipe, output = folder / f"{stage}.yaml", folder / "runs" / f"{stage}-{name}"
    recipe.write_text(
        f"run: {{output_dir: {output}}}\n"
        f"model: {{encoder: {folder}/bert, max_length: 32, attention: packed}}\n"
        f"data: {{train: [{folder}/{stage}.jsonl], cache_dir: {folder}/cache, processes: 1, workers: 1}}\n"
        "batch: {global_size: 16, micro_tokens: 128}\noptim: {lr: 2e-3}\nschedule: {steps: 8}\nprecision: bf16\n"
        "checkpoint: {every_steps: 4}\ntrack: {log_every: 1}\n"
    )
    command = [sys.executable, f"launch/{stage}.py", "--config", str(recipe), *overrides]
    done = processes.run(command, limit_s=150)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
@pytest.mark.parametrize("engine", steps.ENGINES)
def test_every_engine_takes_the_same_steps(stage: str, engine: str, folder: Path) -> None:
    if engine != "ddp" and find_spec("deepspeed") is None:
        pytest.skip("needs deepspeed")
    expected = losses(folder, stage, "ddp", *steps.ENGINES["ddp"])
    actual = losses(folder, stage, engine, *steps.ENGINES[engine])
    assert actual == pytest.approx(expected, rel=0.03) and len(actual) == 8  # bf16
    resumed = losses(
        folder, stage, engine, *steps.ENGINES[engine], "schedule.steps=10",
        "checkpoint.allow_change=[schedule.steps]",
    )  # fmt: skip
    assert resumed[:8] == actual and len(resumed) == 10


def test_compiled_layers_take_the_same_steps(folder: Path) -> None:
    expected = losses(folder, "finetune", "ddp", "engine.kind=ddp")
    actual = losses(folder, "finetune", "compiled", "engine.kind=ddp", "model.compile=layers")
    assert actual == pytest.approx(expected, rel=0.03)
