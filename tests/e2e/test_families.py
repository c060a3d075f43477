"""A few steps of each family of encoders in both stages, and the options that no other run turns on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoModelForMaskedLM

from contrastive.config import FinetuneRecipe
from contrastive.task import build_task as build_finetune_task
from lodestar.config import loader
from lodestar.distributed.runtime import Runtime
from lodestar.distributed.testing import run_world
from lodestar.training.hooks import StopHook
from lodestar.training.trainer import Trainer
from retromae.config import PretrainRecipe
from retromae.task import build_task as build_pretrain_task
from tests import tiny

STAGES: dict[str, Any] = {
    "pretrain": (PretrainRecipe, build_pretrain_task),
    "finetune": (FinetuneRecipe, build_finetune_task),
}


def train(rank: int, size: int, stage: str, path: Path, overrides: tuple[str, ...]) -> int:
    schema, build_task = STAGES[stage]
    runtime = Runtime(rank, size, rank, torch.device("cpu"))
    with StopHook(size) as stop:
        return Trainer(loader.load(schema, path, overrides), runtime).run(build_task, stop)


def recipe(folder: Path, stage: str, encoder: Path) -> Path:
    path = folder / f"{stage}.yaml"
    path.write_text(
        f"run: {{output_dir: {folder}/runs/{stage}}}\nmodel: {{encoder: {encoder}, max_length: 32}}\n"
        f"data: {{train: [{folder}/{stage}.jsonl], cache_dir: {folder}/cache, workers: 0, processes: 1}}\n"
        "batch: {global_size: 9, micro_size: 4}\noptim: {lr: 2e-3}\nschedule: {steps: 8}\nprecision: fp32\n"
        "engine: {kind: ddp}\ntrack: {log_every: 1}\n"
    )
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny.pretrain_file(tmp_path / "pretrain.jsonl")
    tiny.finetune_file(tmp_path / "finetune.jsonl", scores=True)
    tiny.beir_folder(tmp_path / "beir")
    return tmp_path


def losses(folder: Path, stage: str) -> list[float]:
    lines = (folder / f"runs/{stage}/metrics.jsonl").read_text().splitlines()
    return [line["loss"] for line in map(json.loads, lines) if "loss" in line]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_both_stages_train_the_family_and_others_open_it(family: str, folder: Path) -> None:
    tiny.encoder(folder / "encoder", family, dropout=0.1)
    assert run_world(train, 1, "pretrain", recipe(folder, "pretrain", folder / "encoder"), ()) == [0]
    first = folder / "runs/pretrain/model"
    _, report = AutoModelForMaskedLM.from_pretrained(first, output_loading_info=True)
    assert not report["missing_keys"]
    assert run_world(train, 1, "finetune", recipe(folder, "finetune", first), ()) == [0]
    for stage in STAGES:
        falling = losses(folder, stage)
        assert sum(falling[-2:]) < sum(falling[:2])
    embedded = SentenceTransformer(str(folder / "runs/finetune/model"), device="cpu").encode(["shuffle rows"])
    assert embedded.shape == (1, 32) and abs(float((embedded**2).sum()) - 1) < 1e-5


OPTIONS = [
    ("pretrain", ("data.streaming=true",)),
    ("pretrain", ("optim.name=muon", "optim.clip_norm=0")),
    ("finetune", ("loss.matryoshka=[8,16]", "loss.distillation=0.3")),
    ("finetune", ("model.encoder=DECODER", "model.pooling=last_token")),
    ("finetune", ("precision=bf16", "engine.kind=deepspeed", "engine.zero_stage=2")),
    ("finetune", ("evaluate.data=BEIR", "evaluate.every_steps=3", "evaluate.keep_best=mrr_at_10")),
]
OTHERS = [
    ("pretrain", ("data.long_texts=split", "model.max_length=12")),
    ("pretrain", ("loss.bag_of_words=0.1",)),
    ("pretrain", ("decoder.query=embedding",)),
    ("pretrain", ("precision=bf16",)),
    ("pretrain", ("model.activation_checkpointing=true", "engine.kind=deepspeed", "engine.zero_stage=3")),
    ("finetune", ("loss.share_negatives=false",)),
    ("finetune", ("data.train=[FILE, {path: FILE, weight: 2, in_batch_negatives: false}]",)),
]


@pytest.mark.parametrize(
    ("stage", "overrides"),
    [*OPTIONS, *(pytest.param(*option, marks=pytest.mark.slow) for option in OTHERS)],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else value,
)
def test_options_train_on_two_ranks(stage: str, overrides: tuple[str, ...], folder: Path) -> None:
    tiny.encoder(folder / "encoder", "bert", dropout=0.1)
    names = {"BEIR": f"{folder}/beir", "FILE": f"{folder}/finetune.jsonl", "DECODER": f"{folder}/decoder"}
    if "model.encoder=DECODER" in overrides:
        tiny.decoder(folder / "decoder")
    for short, path in names.items():
        overrides = tuple(override.replace(short, path) for override in overrides)
    assert run_world(train, 2, stage, recipe(folder, stage, folder / "encoder"), overrides) == [0, 0]
    falling = losses(folder, stage)
    assert len(falling) == 8 and sum(falling[-2:]) < sum(falling[:2])
