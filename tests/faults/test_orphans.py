"""Launchers that are gone, signals at the start, readers that are gone: nothing is lost, and no process is left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests import processes
from tests.faults import runs


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return runs.prepare(tmp_path)


def to_outer(launcher: subprocess.Popen[str], number: signal.Signals) -> None:
    launcher.send_signal(number)


def to_inner(launcher: subprocess.Popen[str], number: signal.Signals) -> None:
    """deepspeed starts a launcher of its own on each node."""
    (inner,) = psutil.Process(launcher.pid).children()
    inner.send_signal(number)


CASES = [
    ("torchrun", signal.SIGUSR1, to_outer),
    ("torchrun", signal.SIGKILL, to_outer),
    ("deepspeed", signal.SIGTERM, to_outer),
    ("deepspeed", signal.SIGINT, to_outer),
    ("deepspeed", signal.SIGUSR1, to_outer),
    ("deepspeed", signal.SIGKILL, to_outer),
    ("deepspeed", signal.SIGKILL, to_inner),
]


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "number", "send"), CASES)
def test_ranks_save_and_stop_once_their_launcher_is_gone(
    launcher: str, number: signal.Signals, send: Callable[..., None], folder: Path
) -> None:
    started = runs.launch(launcher, "pretrain", folder, runs.FOREVER, "data.workers=1")
    run_folder = folder / "runs/pretrain"
    runs.wait_for_steps(run_folder, started)
    family = psutil.Process(started.pid).children(recursive=True)
    send(started, number)
    alive = runs.left(family, limit_s=20)
    assert not alive
    processes.finish(started, limit_s=10)
    summary = json.loads((run_folder / "summary.json").read_text())
    assert summary["stopped_by"] and summary["steps"] >= 3
    assert [path.name for path in (run_folder / "checkpoints").iterdir()] == [f"step-{summary['steps']:08d}"]


@pytest.mark.slow
def test_a_run_that_no_launcher_started_outlives_its_parent(folder: Path) -> None:
    """As under nohup, when the shell ends."""
    command = " ".join([sys.executable, *runs.command("pretrain", folder, runs.FOREVER)])
    shell = processes.start(["bash", "-c", f"{command} > {folder}/log 2>&1 & echo $!"])
    out, _ = processes.finish(shell, limit_s=30)
    process = psutil.Process(int(out))
    try:
        processes.wait_until((folder / "runs/pretrain/metrics.jsonl").is_file, limit_s=runs.START_SECONDS)
        time.sleep(3)
        assert process.is_running()
        process.terminate()
        process.wait(30)
    finally:
        if process.is_running():
            process.kill()
    assert json.loads((folder / "runs/pretrain/summary.json").read_text())["stopped_by"] == "SIGTERM"


@pytest.mark.slow
def test_ctrl_c_saves_though_it_ends_what_reads_the_output(folder: Path) -> None:
    """`launcher | tee log`: tee ends first."""
    started = runs.launch("torchrun", "pretrain", folder, runs.FOREVER)
    run_folder = folder / "runs/pretrain"
    runs.wait_for_steps(run_folder, started)
    family = psutil.Process(started.pid).children(recursive=True)
    assert started.stdout is not None and started.stderr is not None
    started.stdout.close()
    started.stderr.close()
    runs.to_group(started, signal.SIGINT)
    started.wait(60)
    alive = runs.left(family, limit_s=20)
    summary = json.loads((run_folder / "summary.json").read_text())
    assert not alive and summary["stopped_by"] and summary["steps"] >= 3
    assert list((run_folder / "checkpoints").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "wait_s"), [("torchrun", 0.0), ("deepspeed", 0.5)])
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT])
def test_a_signal_at_the_start_ends_all_ranks(
    launcher: str, wait_s: float, number: signal.Signals, folder: Path
) -> None:
    """To launcher and ranks alike, as a batch system sends it, in the first moments of the ranks."""
    started = runs.launch(launcher, "pretrain", folder, runs.FOREVER)
    processes.wait_until(lambda: runs.ranks_of(started), started, limit_s=runs.START_SECONDS)
    time.sleep(wait_s)
    family = psutil.Process(started.pid).children(recursive=True)
    os.killpg(started.pid, number)
    alive = runs.left(family, limit_s=40)
    processes.finish(started, limit_s=10)
    assert not alive and started.returncode != 0


@pytest.mark.slow
def test_one_rank_that_a_signal_ends_at_the_start_is_missed_by_the_other(folder: Path) -> None:
    """Started by hand, as on two nodes: no launcher ends the other."""
    started = runs.by_hand("pretrain", folder, runs.FOREVER, "engine.timeout_minutes=0.1", LOCAL_RANK="0")
    time.sleep(0.5)
    started[0].send_signal(signal.SIGUSR1)
    said = runs.finish_all(started, limit_s=120)
    (line,) = runs.errors(said[1])
    assert started[0].returncode == -signal.SIGUSR1 and started[1].returncode == 2
    assert "MASTER_ADDR: no rank 0 at" in line or "ranks came" in line
