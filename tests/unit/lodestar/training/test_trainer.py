"""The run folder: what a run writes, and how it resumes from it."""

from __future__ import annotations

import json
import re
import shutil
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lodestar.distributed.runtime import Runtime
from lodestar.errors import CheckpointError, ConfigError, DataError, TrainingError
from lodestar.files import locked
from lodestar.training import checkpoint
from lodestar.training.hooks import StopHook
from lodestar.training.task import TrainingTask
from lodestar.training.trainer import Trainer
from tests import processes, tiny
from tests.distributed import steps


def train(folder: Path, *overrides: str, stage: str = "finetune", backward: Any = None) -> Path:
    """A run in this process; its folder."""
    run_recipe = steps.recipe(stage, folder, "checkpoint.every_steps=2", "checkpoint.keep=2", *overrides)

    def build_task(recipe: Any, runtime: Runtime) -> TrainingTask:
        task = (steps.build_finetune_task if stage == "finetune" else steps.build_pretrain_task)(recipe, runtime)
        if backward is not None:
            stage_backward = task.stage.backward
            task.stage.backward = lambda batch, engine, step: backward(stage_backward, batch, engine, step)  # type: ignore[method-assign]
        return task

    with StopHook(1) as stop:
        assert Trainer(run_recipe, Runtime(0, 1, 0, torch.device("cpu"))).run(build_task, stop) == 0
    return Path(run_recipe.run.output_dir)


def test_a_fresh_start_archives_the_checkpoints_of_an_earlier_run(tmp_path: Path) -> None:
    folder = train(tmp_path, "schedule.steps=8")
    assert checkpoint.steps(folder / "checkpoints") == [6, 8]
    train(tmp_path, "schedule.steps=4", "checkpoint.resume=none")
    assert checkpoint.steps(folder / "checkpoints") == [2, 4]  # of this run: not pruned for higher steps
    assert (folder / "checkpoints/archived-step-00000008/manifest.json").is_file()
    assert json.loads((folder / "summary.json").read_text())["steps"] == 4


def test_a_damaged_checkpoint_does_not_outlive_the_run_that_skipped_it(
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


def test_a_run_that_cannot_start_leaves_the_recipe_of_the_run_before(tmp_path: Path) -> None:
    folder = train(tmp_path)
    before = (folder / "config.yaml").read_text()
    with pytest.raises(CheckpointError, match=r"run\.seed: the checkpoint has 42, this run 7"):
        train(tmp_path, "run.seed=7")
    with pytest.raises(DataError, match="do not fill one batch"):
        train(tmp_path, "schedule.steps=null", "schedule.epochs=0.01")
    assert (folder / "config.yaml").read_text() == before


def test_the_environment_names_the_data(tmp_path: Path) -> None:
    folder = train(tmp_path)
    state = json.loads((folder / "checkpoints/step-00000002/state.json").read_text())
    assert json.loads((folder / "environment.json").read_text())["data"] == state["data"] != []


def _nan_gradient_from(first: int) -> Any:
    def backward(stage_backward: Any, batch: Any, engine: Any, step: int) -> Any:
        scalars = stage_backward(batch, engine, step)
        if step >= first:
            next(engine.module.parameters()).grad.fill_(float("nan"))
        return scalars

    return backward


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_steps_without_a_finite_gradient_are_skipped_and_counted(stage: str, tmp_path: Path) -> None:
    clean = train(tmp_path, "schedule.steps=2", "schedule.shape=constant", f"run.output_dir={tmp_path}/a", stage=stage)
    skipping = train(
        tmp_path, "schedule.steps=4", "schedule.shape=constant", f"run.output_dir={tmp_path}/b", stage=stage,
        backward=_nan_gradient_from(2),
    )  # fmt: skip
    assert json.loads((skipping / "summary.json").read_text())["skipped"] == 2
    first, second = (
        checkpoint.read(folder / f"checkpoints/step-{step:08d}")[0] for folder, step in ((clean, 2), (skipping, 4))
    )
    assert all(first["weights"][name].equal(second["weights"][name]) for name in first["weights"])
    assert all(first["optimizer"][name].equal(second["optimizer"][name]) for name in first["optimizer"])


def test_a_gradient_that_stays_not_finite_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="step 6: the gradient was not finite 3 times in a row"):
        train(
            tmp_path, "schedule.steps=9", "track.log_every=2", "engine.give_up_after=3", backward=_nan_gradient_from(3)
        )


@pytest.mark.parametrize(
    ("stage", "change", "key", "before", "now"),
    [
        ("finetune", "optim.lr=0.01", "optim.lr", "0.001", "0.01"),
        ("finetune", "loss.temperature=0.2", "loss.temperature", "0.1", "0.2"),
        ("finetune", "schedule.shape=cosine", "schedule.shape", "'linear'", "'cosine'"),
        ("finetune", "schedule.steps=6", "schedule.steps", "4", "6"),
        ("finetune", "model.dropout=0.5", "model.dropout", "None", "0.5"),
        ("finetune", "data.negatives_per_query=2", "data.negatives_per_query", "1", "2"),
        ("finetune", "run.seed=7", "run.seed", "42", "7"),
        ("finetune", "data.train=[{path: FOLDER/finetune.jsonl, weight: 3}]", "data.train.weight", "[1.0]", "[3.0]"),
        ("finetune", "model.encoder=FOLDER/other", "model.encoder", "'FOLDER/bert'", "'FOLDER/other'"),
        ("pretrain", "mask.encoder=0.4", "mask.encoder", "0.3", "0.4"),
        ("pretrain", "precision=bf16", "precision", "'fp32'", "'bf16'"),
    ],
)
def test_a_changed_recipe_is_an_error_with_key_and_both_values_unless_allowed(
    stage: str, change: str, key: str, before: str, now: str, tmp_path: Path
) -> None:
    folder = train(tmp_path, "schedule.steps=4", stage=stage)
    tiny.encoder(tmp_path / "other", "bert", layers=1, width=16, std=0.3)
    for summary in folder.glob("summary.json"):
        summary.unlink()
    change, before, now = (text.replace("FOLDER", str(tmp_path)) for text in (change, before, now))
    message = re.escape(f"{key}: the checkpoint has {before}, this run {now}")
    with pytest.raises(CheckpointError, match=f"{message}.*checkpoint\\.allow_change='\\[{re.escape(key)}\\]'"):
        train(tmp_path, "schedule.steps=4", change, stage=stage)
    train(tmp_path, "schedule.steps=4", change, f"checkpoint.allow_change=[{key}]", stage=stage)
    (recorded,) = json.loads((folder / "environment.json").read_text())["changes"]
    assert recorded["key"] == key and recorded["step"] == 4 and repr(recorded["before"]) == before


def test_another_pooling_than_the_checkpoints_is_an_error(tmp_path: Path) -> None:
    """Also where the encoder's folder changed and the recipe did not; in checkpoints of earlier versions it is cls."""
    saved = train(tmp_path) / "checkpoints/step-00000002"
    train(tmp_path, "model.pooling=cls")  # what auto was
    tiny.with_pooling(tmp_path / "bert", pooling_mode="mean")
    message = r"model\.pooling: the checkpoint has 'cls', this run 'mean'"
    with pytest.raises(CheckpointError, match=message):
        train(tmp_path)
    tensors, values = checkpoint.read(saved)
    checkpoint.write(saved.parent, 2, tensors=tensors, values={k: v for k, v in values.items() if k != "pooling"})
    with pytest.raises(CheckpointError, match=message):
        train(tmp_path)


def test_keys_that_do_not_change_the_result_may_change(tmp_path: Path) -> None:
    train(tmp_path, "schedule.steps=4")
    train(tmp_path, "schedule.steps=4", "batch.micro_size=7", "run.name=other", "track.log_every=1", "data.workers=1")


def test_a_checkpoint_without_a_recipe_is_compared_with_the_run_folders(tmp_path: Path) -> None:
    """As earlier versions wrote them."""
    folder = train(tmp_path, "schedule.steps=4")
    saved = folder / "checkpoints/step-00000004"
    tensors, values = checkpoint.read(saved)
    names = ("skipped", "engine", "stage", "seed", "global_size", "data")
    checkpoint.write(saved.parent, 4, tensors=tensors, values={name: values[name] for name in names})
    with pytest.raises(CheckpointError, match=r"optim\.lr: the checkpoint has 0\.001, this run 0\.01"):
        train(tmp_path, "schedule.steps=4", "optim.lr=0.01")
    train(tmp_path, "schedule.steps=4")


def test_fewer_steps_than_were_taken_are_an_error(tmp_path: Path) -> None:
    train(tmp_path, "schedule.steps=4")
    with pytest.raises(CheckpointError, match=r"schedule: 2 steps, but .*step-00000004 has taken 4"):
        train(tmp_path, "schedule.steps=2", "checkpoint.allow_change=[schedule.steps]")


def test_allow_change_must_name_keys(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"allow_change: optim\.rl: no key .*did you mean 'optim\.lr'"):
        train(tmp_path, "checkpoint.allow_change=[optim.rl]")


def test_a_run_folder_is_locked_and_free_again_after_a_crash(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from lodestar.files import locked\n"
        "with locked(Path(sys.argv[1]), 'run.output_dir'): print('held', flush=True); time.sleep(60)"
    )
    process = processes.start([sys.executable, "-c", code, str(tmp_path)])
    try:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        message = rf"run\.output_dir: .*in use by process {process.pid} on {re.escape(socket.gethostname())} since "
        with pytest.raises(ConfigError, match=message), locked(tmp_path, "run.output_dir"):
            pass
    finally:
        process.kill()
        processes.finish(process, limit_s=30)
    with locked(tmp_path, "run.output_dir"):
        pass


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_a_checkpoint_of_version_0_1_resumes_as_it_did_there(stage: str, tmp_path: Path) -> None:
    """The decoder's parameters had other names then, and the checkpoint held no recipe."""
    old = Path(__file__).parents[3] / "data/checkpoints_0.1" / stage
    shutil.copytree(old / "step-00000002", tmp_path / f"runs/{stage}/checkpoints/step-00000002")
    folder = train(tmp_path, "schedule.steps=4", "track.log_every=1", stage=stage)
    losses = {line["step"]: line["loss"] for line in map(json.loads, (folder / "metrics.jsonl").open())}
    assert losses == pytest.approx(
        {int(k): v for k, v in json.loads((old / "losses.json").read_text()).items()}, rel=1e-5
    )
    # Of stage 1, the cache of version 0.1 is not read.
    (cache,) = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    assert cache.name.partition("-")[2] == ("2" if stage == "pretrain" else "")


def test_the_rate_of_muon_is_logged_beside_adamws(tmp_path: Path) -> None:
    folder = train(tmp_path, "optim.name=muon", "optim.muon_lr=0.02", "schedule.shape=constant", "track.log_every=1")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [(line["lr"], line["muon_lr"]) for line in lines] == [(0.001, 0.02)] * 2


def test_counts_stand_in_the_summary_and_the_last_line_also_after_a_resume(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"query": text, "pos": ["the same"], "neg": []} for text in tiny.texts(40)]  # each masks all others
    same = tiny.write_jsonl(tmp_path / "same.jsonl", rows)
    options = (f"data.train=[{same}]", "loss.distillation=0", "checkpoint.allow_change=[schedule.steps]")
    folder = train(tmp_path, *options, "schedule.steps=2", "schedule.shape=constant")
    first = json.loads((folder / "summary.json").read_text())["masked"]
    train(tmp_path, *options, "schedule.steps=4", "schedule.shape=constant")
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["masked"] == 2 * first > 0
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"counts: 0 skipped steps, {2 * first:,} masked false negatives, 40 rows, {summary['tokens']:,} tokens, "
        f"{summary['truncated']} truncated, 0 dropped, 0 without a token"
    )


def test_a_stream_whose_file_changed_is_refused(tmp_path: Path) -> None:
    texts = tiny.pretrain_file(tmp_path / "stream.jsonl")
    options = (f"data.train=[{texts}]", "data.streaming=true", "schedule.steps=2")
    folder = train(tmp_path, *options, stage="pretrain")
    counts = json.loads((folder / "summary.json").read_text())
    assert counts["rows"] >= 40 and counts["dropped"] == 0 == counts["without_tokens"]
    content = bytearray(texts.read_bytes())
    content[content.index(b"s")] = ord("z")  # of the same size
    texts.write_bytes(content)
    more = "checkpoint.allow_change=[schedule.steps]", "schedule.steps=4"
    with pytest.raises(CheckpointError, match=r"data\.train: the checkpoint has"):
        train(tmp_path, *options[:2], *more, stage="pretrain")


def _read_lines(capsys: pytest.CaptureFixture[str], start: str) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith(start)]


@pytest.mark.parametrize("text", ["", "[]", '{"finished": tr', '{"steps": "2"}', "[" * 100_000, "\xff"])
def test_a_damaged_summary_is_one_warning(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = train(tmp_path)
    whole = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_bytes(text.encode("latin-1"))
    capsys.readouterr()
    train(tmp_path)
    (line,) = _read_lines(capsys, "warning: ")
    assert re.fullmatch(r"warning: \S+summary\.json: damaged: .* \(.*\)", line)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["finished"] and summary["steps"] == whole["steps"]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"metric": 1, "value": 0.5, "step": 2}'])
def test_a_damaged_record_of_the_best_model_is_an_error(text: str, tmp_path: Path) -> None:
    tiny.beir_folder(tmp_path / "beir")
    best = (f"evaluate.data={tmp_path}/beir", "evaluate.keep_best=ndcg_at_10", "checkpoint.allow_change=[schedule]")
    folder = train(tmp_path, *best, "schedule.steps=2")
    (folder / "best.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"evaluate\.keep_best: .*best\.json: damaged: .*\(restore it, or delete"):
        train(tmp_path, *best, "schedule.steps=4")
    (folder / "best.json").unlink()
    train(tmp_path, *best, "schedule.steps=4")


def test_damaged_metrics_are_told_and_those_of_other_steps_stay(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("track.log_every=1", "checkpoint.allow_change=[schedule.steps]")
    metrics = train(tmp_path, "schedule.steps=4", *more) / "metrics.jsonl"
    first, second, third, fourth = metrics.read_bytes().splitlines(keepends=True)
    metrics.write_bytes(first + second[:20] + b"\xff\n" + third + b"[1]\n" + fourth + b'{"step": 5, "lo')
    capsys.readouterr()
    train(tmp_path, "schedule.steps=5", *more)
    (line,) = _read_lines(capsys, "warning: ")
    assert line.startswith(f"warning: {metrics}:2: line and 1 more lines: damaged: ")
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == [1, 3, 4, 5]
    metrics.write_bytes(first + b'{"step": 5, "lo')  # as a run that was killed leaves it: nothing to tell
    train(tmp_path, "schedule.steps=6", *more)
    assert not _read_lines(capsys, "warning: ")


def test_a_metrics_file_that_is_none_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "runs/finetune/metrics.jsonl").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"metrics\.jsonl: is a folder, not a file \(move it away\)"):
        train(tmp_path)


def test_a_model_folder_set_aside_when_its_replacement_was_killed_is_back(tmp_path: Path) -> None:
    tiny.beir_folder(tmp_path / "beir")
    best = (f"evaluate.data={tmp_path}/beir", "evaluate.keep_best=ndcg_at_10", "checkpoint.allow_change=[schedule]")
    folder = train(tmp_path, *best, "schedule.steps=2")
    record = json.loads((folder / "best.json").read_text())
    (folder / "best.json").write_text(json.dumps({**record, "value": 9.0}))  # no later evaluation is better
    (folder / "model").rename(folder / ".model.old")
    train(tmp_path, *best, "schedule.steps=4")
    assert (folder / "model/model.safetensors").is_file() and not (folder / ".model.old").exists()
