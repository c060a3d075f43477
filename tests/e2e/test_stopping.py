"""Signals to launchers, ranks that disagree, two jobs in one folder: real launchers and loader workers."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests import processes, tiny
from tests.distributed import steps
from tests.e2e.test_launchers import BIN
from tests.processes import ROOT, environment, free_port

LAUNCHERS: dict[str, Callable[[], list[str]]] = {
    "python": lambda: [sys.executable],
    "torchrun": lambda: [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", "2"],
    "deepspeed": lambda: [str(BIN / "deepspeed"), "--num_accelerators", "2", "--master_port", free_port()],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny.encoder(tmp_path / "bert", "bert", layers=1, width=16, dropout=0.1, std=0.3)
    steps.recipe("pretrain", tmp_path)
    steps.recipe("finetune", tmp_path)
    return tmp_path


def start(
    command: list[str], stage: str, folder: Path, *overrides: str, env: dict[str, str] | None = None
) -> subprocess.Popen[str]:
    given = {override.partition("=")[0] for override in overrides}
    common = {"data.workers": 1, "checkpoint.every_steps": 0, "track.log_every": 1}
    others = [f"{key}={value}" for key, value in common.items() if key not in given]
    command = [*command, f"launch/{stage}.py", "--config", str(folder / f"{stage}.yaml"), *others, *overrides]
    return processes.start(command, {**environment(), **(env or {})})


def wait_for_steps(process: subprocess.Popen[str], run_folder: Path) -> None:
    metrics = run_folder / "metrics.jsonl"
    processes.wait_until(lambda: metrics.exists() and len(metrics.read_text().splitlines()) >= 3, process)


def to_group(process: subprocess.Popen[str], number: signal.Signals) -> None:
    os.killpg(process.pid, number)


def to_inner_launcher(process: subprocess.Popen[str], number: signal.Signals) -> None:
    """deepspeed starts a launcher of its own on each node."""
    (inner,) = psutil.Process(process.pid).children()
    inner.send_signal(number)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "number", "send"),
    [
        ("deepspeed", signal.SIGINT, to_group),  # Ctrl-C at a terminal
        ("deepspeed", signal.SIGTERM, to_group),
        ("deepspeed", signal.SIGTERM, to_inner_launcher),
        ("torchrun", signal.SIGINT, to_group),
        ("python", signal.SIGINT, to_group),
    ],
)
def test_a_run_that_is_stopped_through_its_launcher_saves_and_leaves_no_process(
    launcher: str, number: signal.Signals, send: Callable[..., None], folder: Path
) -> None:
    run_folder = folder / "runs/pretrain"
    process = start(LAUNCHERS[launcher](), "pretrain", folder, f"schedule.steps={10**6}")
    wait_for_steps(process, run_folder)
    family = psutil.Process(process.pid).children(recursive=True)
    ranks = 1 if launcher == "python" else 2
    assert len([child for child in family if os.getsid(child.pid) == child.pid]) >= ranks  # the workers
    send(process, number)
    _, said = processes.finish(process, limit_s=90)
    _, alive = psutil.wait_procs(family, timeout=20)
    assert not alive
    if launcher == "python":
        assert process.returncode == 3
    summary = json.loads((run_folder / "summary.json").read_text())
    assert summary["stopped_by"] in ("SIGINT", "SIGTERM") and summary["steps"] >= 3, said
    (saved,) = (run_folder / "checkpoints").iterdir()
    assert saved.name == f"step-{summary['steps']:08d}" and 'Traceback (most recent call last)\n  File "/' not in said

    more = (f"schedule.steps={summary['steps'] + 1}", "checkpoint.allow_change=[schedule.steps]")
    resumed_by = launcher if number == signal.SIGINT else "python"  # each once; a checkpoint fits any number of ranks
    again = start(LAUNCHERS[resumed_by](), "pretrain", folder, *more)
    _, said = processes.finish(again, limit_s=90)
    assert again.returncode == 0 and f"resumes from step {summary['steps']}" in said, said


def pair(folder: Path, *overrides: tuple[str, ...], stage: str = "finetune") -> list[str]:
    """The errors that two ranks told, each with overrides of its own."""
    port, launched = free_port(), []
    for i, mine in enumerate(overrides):
        ours = {"RANK": str(i), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        launched.append(start([sys.executable], stage, folder, *mine, env=ours))
    return errors(launched)


def errors(launched: list[subprocess.Popen[str]]) -> list[str]:
    """What they told, all within half a minute and before a model was loaded."""
    try:
        said = [processes.finish(process, limit_s=30)[1] for process in launched]
    finally:
        for process in launched:
            process.kill()
    assert [process.returncode for process in launched] == [2, 2], said
    assert "tensors from" not in "".join(said)
    return [line for text in said for line in text.splitlines() if line.startswith("error: ")]


def test_ranks_with_different_recipes_are_told_in_one_line(folder: Path) -> None:
    """Those that trained on silently, and those that failed in a collective."""
    changed = ("run.seed=7", "loss.temperature=0.2", "optim.lr=0.01", "batch.global_size=20", "schedule.steps=3")
    (line,) = pair(folder, (), (*changed, "track.log_every=3"))
    told = "run.seed 7, not 42, batch.global_size 20, not 19, optim.lr 0.01, not 0.001, schedule.steps 3, not 2, "
    told += "track.log_every 3, not 1, loss.temperature 0.2, not 0.1"
    assert line == f"error: recipe: not the same as on rank 0: rank 1 has {told} (start all ranks with the same)"


@pytest.mark.slow
def test_ranks_with_different_data_are_told_in_one_line(folder: Path) -> None:
    """The same path with another content, as on two nodes: one rank reads through another mount of it."""
    other = folder / "other"
    other.mkdir()
    for stage, file in (("finetune", tiny.finetune_file), ("pretrain", tiny.pretrain_file)):
        file(other / f"{stage}.jsonl", 41)
        recipe = (folder / f"{stage}.yaml").read_text()
        (folder / f"{stage}.yaml").write_text(recipe.replace(f"[{folder}/{stage}.jsonl]", f"[{stage}.jsonl]"))
        (line,) = told_from(folder, (folder, other), stage)
        assert re.match(r"error: \S+\.yaml:\d+: data: not the same as on rank 0: rank 1 has data\.train ", line)


def told_from(folder: Path, places: tuple[Path, Path], stage: str) -> list[str]:
    """As `pair`, each rank started in a folder of its own."""
    port, launched = free_port(), []
    for i, place in enumerate(places):
        ours = {"RANK": str(i), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [sys.executable, str(ROOT / f"launch/{stage}.py"), "--config", str(folder / f"{stage}.yaml")]
        launched.append(processes.start(command, {**environment(), **ours, "PYTHONPATH": str(ROOT)}, cwd=place))
    return errors(launched)


@pytest.mark.slow
def test_the_second_job_in_a_run_folder_is_refused(folder: Path) -> None:
    run_folder = folder / "runs/finetune"
    first = start([sys.executable], "finetune", folder, f"schedule.steps={10**6}")
    try:
        wait_for_steps(first, run_folder)
        second = start(LAUNCHERS["torchrun"](), "finetune", folder, f"schedule.steps={10**6}")
        _, said = processes.finish(second, limit_s=60)
        (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
        assert f"in use by process {first.pid} on {os.uname().nodename} since" in line and second.returncode != 0
    finally:
        first.kill()  # a crash
        processes.finish(first, limit_s=30)
