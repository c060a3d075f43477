"""Stage 1, stage 2 and sentence-transformers through the real launchers, offline, on a tiny fixture."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer

from contrastive.model import BiEncoder
from retrieval.evaluation.beir import read_beir
from tests import processes, tiny

BIN = Path(sys.executable).parent
STEPS = 12
INSTRUCTION = "search: "


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return processes.run(command, limit_s=240)


def recipe(folder: Path, stage: str) -> Path:
    encoder = folder / ("bert" if stage == "pretrain" else "runs/pretrain/model")
    instruction = f"  query_instruction: '{INSTRUCTION}'\n  negatives_per_query: 1\n" if stage == "finetune" else ""
    best = "  keep_best: ndcg_at_10\n" if stage == "finetune" else ""
    path = folder / f"{stage}.yaml"
    path.write_text(
        f"run: {{name: {stage}, output_dir: {folder}/runs/{stage}}}\n"
        f"model: {{encoder: {encoder}, max_length: 32}}\n"
        f"data:\n  train: [{folder}/{stage}.jsonl]\n  cache_dir: {folder}/cache\n  processes: 1\n  workers: 1\n"
        f"{instruction}"
        f"batch: {{global_size: 7, micro_size: 3}}\noptim: {{lr: 2e-3}}\n"
        f"schedule: {{steps: {STEPS}}}\nprecision: fp32\n"
        f"checkpoint: {{every_steps: 5}}\nevaluate:\n  data: {folder}/beir\n  every_steps: 6\n  at_start: true\n{best}"
        "track: {log_every: 1, to: [wandb, tensorboard]}\n"
    )
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("launchers")
    tiny.encoder(folder / "bert", "bert", dropout=0.1)
    tiny.pretrain_file(folder / "pretrain.jsonl")
    tiny.finetune_file(folder / "finetune.jsonl")
    tiny.beir_folder(folder / "beir")
    return folder


@pytest.fixture(scope="module")
def pretrained(folder: Path) -> Path:
    """Stage 1 under the deepspeed launcher, two ranks, ZeRO-1."""
    launcher = [str(BIN / "deepspeed"), "--num_accelerators", "2", "--master_port", processes.free_port()]
    found = run([*launcher, "launch/pretrain.py", "--config", str(recipe(folder, "pretrain"))])
    assert found.returncode == 0, found.stdout + found.stderr
    return folder / "runs/pretrain"


@pytest.fixture(scope="module")
def finetuned(folder: Path, pretrained: Path) -> Path:
    """Stage 2 under torchrun, two ranks, DDP."""
    launcher = [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", "2"]
    found = run([*launcher, "launch/finetune.py", "--config", str(recipe(folder, "finetune"))])
    assert found.returncode == 0, found.stdout + found.stderr
    assert "37 of 37 tensors" in found.stderr
    return folder / "runs/finetune"


def lines(run_folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_folder_holds_what_the_contract_says(pretrained: Path, finetuned: Path) -> None:
    for folder, own in ((pretrained, {"encoder_loss", "decoder_loss"}), (finetuned, {"negatives_per_query"})):
        found = {path.name for path in folder.iterdir()}
        expected = {"config.yaml", "environment.json", "metrics.jsonl", "checkpoints", "model", "summary.json"}
        assert expected | {"report.html", "tensorboard", "wandb"} <= found
        steps = [line for line in lines(folder) if "loss" in line]
        assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
        common = {"epoch", "lr", "grad_norm", "samples_per_second", "tokens_per_second", "padding_share"}
        assert common | {"peak_memory_bytes"} | own <= steps[0].keys()
        evaluations = [line for line in lines(folder) if "evaluation" in line]
        assert [line["step"] for line in evaluations] == [0, 6, 12]
        assert {"ndcg_at_10", "mrr_at_10", "recall_at_100"} <= evaluations[0].keys()
        summary = json.loads((folder / "summary.json").read_text())
        assert summary["finished"] and summary["steps"] == STEPS and summary["skipped"] == 0
        assert json.loads((folder / "environment.json").read_text())["world_size"] == 2
        assert {p.name for p in (folder / "checkpoints").iterdir()} == {"step-00000010", "step-00000012"}
        assert "<svg" in (folder / "report.html").read_text()


def test_the_loss_falls(pretrained: Path, finetuned: Path) -> None:
    for folder in (pretrained, finetuned):
        losses = [line["loss"] for line in lines(folder) if "loss" in line]
        assert sum(losses[-3:]) < sum(losses[:3])


def test_stage_1_leaves_a_plain_masked_language_model(pretrained: Path) -> None:
    model, report = AutoModelForMaskedLM.from_pretrained(pretrained / "model", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    saved = load_file(pretrained / f"checkpoints/step-{STEPS:08d}/weights.safetensors")
    for name, tensor in model.named_parameters():
        assert tensor.equal(saved[f"encoder.{name}"]), name
    assert any(name.startswith("decoder.") for name in saved)
    AutoModel.from_pretrained(pretrained / "model")


def test_what_training_asked_of_the_tokenizer_is_no_part_of_the_model(pretrained: Path, finetuned: Path) -> None:
    for folder in (pretrained, finetuned):
        saved = json.loads((folder / "model/tokenizer.json").read_text())
        assert saved["truncation"] is None and saved["padding"] is None


def test_the_model_gives_the_trainers_embeddings_to_the_last_bit(finetuned: Path) -> None:
    """By sentence-transformers, by transformers and [CLS], and by the bi-encoder that was trained."""
    texts = tiny.texts(9, seed=5)
    model = SentenceTransformer(str(finetuned / "model"), device="cpu")
    assert model.max_seq_length == 32 and model.prompts["query"] == INSTRUCTION
    tokenizer = AutoTokenizer.from_pretrained(finetuned / "model")
    plain = AutoModel.from_pretrained(finetuned / "model").eval()
    tower = BiEncoder(plain, 1.0)
    for prompt, encode in ((INSTRUCTION, model.encode_query), ("", model.encode_document)):
        # one batch in sentence-transformers' order, so that all three multiply matrices of the same shape
        by_length = sorted(texts, key=lambda text: -len(prompt + text))
        batch = tokenizer([prompt + text for text in by_length], padding=True, truncation=True, return_tensors="pt")
        with torch.no_grad():
            by_hand = F.normalize(plain(**batch).last_hidden_state[:, 0], dim=1)
            by_tower, _ = tower(batch["input_ids"], batch["attention_mask"].sum(1))
        embedded = encode(by_length, convert_to_tensor=True)
        assert embedded.equal(by_hand)
        assert embedded.equal(by_tower)
    assert not model.encode_query(texts[:1], convert_to_tensor=True).equal(
        model.encode_document(texts[:1], convert_to_tensor=True)
    )


def test_the_best_evaluated_model_is_kept(finetuned: Path) -> None:
    best = json.loads((finetuned / "best.json").read_text())
    evaluations = {line["step"]: line["ndcg_at_10"] for line in lines(finetuned) if "evaluation" in line}
    assert best["value"] == max(evaluations.values()) == evaluations[best["step"]]


def test_a_finished_run_says_so_and_does_nothing(folder: Path, finetuned: Path) -> None:
    before = (finetuned / "model/model.safetensors").stat().st_mtime_ns
    found = run([sys.executable, "launch/finetune.py", "--config", str(recipe(folder, "finetune"))])
    assert found.returncode == 0 and "all 12 steps are done" in found.stderr
    assert (finetuned / "model/model.safetensors").stat().st_mtime_ns == before


@pytest.mark.slow
def test_a_rehearsal_reports_and_leaves_nothing_behind(folder: Path, finetuned: Path) -> None:
    before = sorted(folder.rglob("*"))
    overrides = ["batch.micro_tokens=auto", f"run.output_dir={folder}/rehearsed"]
    launcher = [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", "2", "launch/finetune.py"]
    done = run([*launcher, "--config", str(folder / "finetune.yaml"), "--rehearse", "4", *overrides])
    assert done.returncode == 0, done.stderr
    for told in (
        "4 steps of 7 examples on 2 ranks",
        "tokens/s",
        "collectives",
        "peak memory",
        "checkpoint",
        "12 steps",
    ):
        assert told in done.stdout, done.stdout
    assert "batch.micro_tokens: 384 tokens at a time" in done.stderr
    assert sorted(folder.rglob("*")) == before


@pytest.mark.slow
def test_evaluation_is_the_same_by_two_ranks_as_by_one(folder: Path, finetuned: Path) -> None:
    path = folder / "evaluate.yaml"
    path.write_text(f"models: {{tiny: {finetuned}/model}}\nevaluate: {{data: {folder}/beir}}\n")
    rows = []
    for launcher in ([sys.executable], [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", "2"]):
        found = run([*launcher, "launch/evaluate.py", "--config", str(path), f"output_dir={folder}/evaluated"])
        assert found.returncode == 0, found.stderr
        rows.append(json.loads((folder / "evaluated/evaluation.json").read_text())["rows"])
    assert rows[0] == rows[1] and [row["model"] for row in rows[0]] == ["BM25", "tiny", "tiny + BM25"]
    assert read_beir(folder / "beir").name == "beir"


@pytest.mark.slow
def test_rounds_train_on_what_the_round_before_found(folder: Path, pretrained: Path) -> None:
    mining = folder / "mine.yaml"
    window = {"negatives": 2, "first_rank": 0, "last_rank": 9}
    mining.write_text(json.dumps({"model": "", "data": [""], "output": "", "mine": window}))
    tuning = folder / "rounds.yaml"
    tuning.write_text(recipe(folder, "finetune").read_text().replace("runs/finetune", "runs/mined"))
    command = [sys.executable, "examples/rounds.py", "--finetune", str(tuning), "--mine", str(mining), "--rounds", "1"]
    for _ in range(2):  # the second time all is there
        found = run(command)
        assert found.returncode == 0, found.stderr
        assert "round 0: nDCG@10" in found.stdout and "round 1: nDCG@10" in found.stdout
    first, second = (folder / f"runs/mined-round-{number}" for number in range(2))
    rows = [json.loads(line) for line in (second / "mined.jsonl").read_text().splitlines()]
    assert len(rows) == 40 and all(len(row["neg"]) == 2 for row in rows)
    weights = [load_file(each / "model/model.safetensors") for each in (first, second)]
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.slow
def test_a_run_that_is_told_to_stop_saves_and_goes_on_to_the_same_weights(folder: Path) -> None:
    """SIGTERM to a process and its loader's workers in the midst of training, then the same command again."""
    command = [sys.executable, "launch/pretrain.py", "--config", str(recipe(folder, "pretrain"))]
    more = ["track.to=[]", "evaluate.data=null", "engine.kind=ddp", "schedule.steps=60", "checkpoint.every_steps=0"]
    whole, parts = folder / "runs/whole", folder / "runs/parts"
    assert run([*command, *more, f"run.output_dir={whole}"]).returncode == 0
    process = processes.start([*command, *more, f"run.output_dir={parts}"])
    processes.wait_until((parts / "metrics.jsonl").is_file, process)
    os.killpg(process.pid, signal.SIGTERM)  # as launchers do
    _, errors = processes.finish(process, limit_s=120)
    assert process.returncode == 3 and "stopped by SIGTERM" in errors
    (saved,) = (parts / "checkpoints").iterdir()
    assert 0 < int(saved.name[-8:]) < 60
    found = run([*command, *more, f"run.output_dir={parts}"])
    assert found.returncode == 0 and "resumes from step" in found.stderr
    first, second = (load_file(each / "checkpoints/step-00000060/weights.safetensors") for each in (whole, parts))
    assert all(first[name].equal(second[name]) for name in first)


@pytest.mark.skipif(sys.platform != "linux", reason="finds ranks by /proc")
def test_a_killed_rank_is_named_by_the_others(folder: Path) -> None:
    run_folder = folder / "runs/killed"
    command = [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", "2", "launch/pretrain.py", "--config"]
    more = ["track.to=[]", "evaluate.data=null", f"schedule.steps={10**6}", "checkpoint.every_steps=3"]
    launcher = processes.start([*command, str(recipe(folder, "pretrain")), *more, f"run.output_dir={run_folder}"])
    processes.wait_until(lambda: list(run_folder.glob("checkpoints/step-*")), launcher)
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    (second,) = (pid for pid in children if b"\0RANK=1\0" in b"\0" + Path(f"/proc/{pid}/environ").read_bytes())
    os.kill(int(second), signal.SIGKILL)
    _, said = processes.finish(launcher, limit_s=120)
    assert launcher.returncode != 0, said
    print(said[-6000:])
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: rank 0 (") and "lost rank 1 (" in line


def test_a_mistake_is_one_line_before_torch_is_imported(folder: Path) -> None:
    command = [sys.executable, "-X", "importtime", "launch/pretrain.py", "--config", str(recipe(folder, "pretrain"))]
    found = run([*command, "optim.lr=-1"])
    assert found.returncode == 2
    said = [line for line in found.stderr.splitlines() if not line.startswith("import time:")]
    assert said == ["error: command line: optim.lr: must be greater than 0, got -1 (raise it)"]
    assert not any(line.endswith(" torch") for line in found.stderr.splitlines())


@pytest.mark.slow
def test_torchrun_with_a_single_process_meets_itself(folder: Path) -> None:
    launcher = [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", "1", "launch/finetune.py"]
    config, encoder = str(recipe(folder, "finetune")), f"model.encoder={folder}/bert"
    overrides = ["schedule.steps=1", f"run.output_dir={folder}/runs/single", encoder, "track.to=[]", "evaluate={}"]
    done = run([*launcher, "--config", config, *overrides])
    assert done.returncode == 0, done.stderr
