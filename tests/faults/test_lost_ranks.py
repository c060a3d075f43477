"""A rank that is killed, stopped, stuck or out of memory: all end, and one line says which and where."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import psutil
import pytest

from tests.faults import runs

LIMIT_SECONDS = 6.0


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return runs.prepare(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "deepspeed"])
def test_a_killed_rank_ends_all_within_ten_seconds(engine: str, folder: Path) -> None:
    launcher = runs.launch("torchrun", "finetune", folder, runs.FOREVER, f"engine.kind={engine}")
    runs.wait_for_steps(folder / "runs/finetune", launcher)
    family = psutil.Process(launcher.pid).children(recursive=True)
    runs.ranks_of(launcher)[1].kill()
    alive = runs.left(family, limit_s=10)
    (said,) = runs.finish_all([launcher], limit_s=30)
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert not alive and launcher.returncode != 0
    assert line.startswith("error: rank 0 (") and "lost rank 1 (" in line and "the same command resumes the run" in line


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "hung"), [("ddp", 0), ("deepspeed", 1)])
def test_a_stopped_rank_is_named_with_step_and_phase_and_ended(engine: str, hung: int, folder: Path) -> None:
    """Started by hand: no launcher ends it."""
    minutes = f"engine.timeout_minutes={LIMIT_SECONDS / 60}"
    started = runs.by_hand("finetune", folder, runs.FOREVER, minutes, f"engine.kind={engine}")
    runs.wait_for_steps(folder / "runs/finetune", *started)
    time.sleep(2)  # of steps: until the other has asked where it is
    started[hung].send_signal(signal.SIGSTOP)
    start = time.monotonic()
    said = runs.finish_all(started, limit_s=LIMIT_SECONDS + 20)
    assert time.monotonic() - start < LIMIT_SECONDS + 5, said
    assert (started[hung].returncode, started[1 - hung].returncode) == (-signal.SIGKILL, 4)
    (line,) = runs.errors(said[1 - hung])
    assert f"lost rank {hung} (" in line and "last seen at step " in line, line
    assert f"stacks of the ranks are in {folder}/runs/finetune/stacks" in line
    assert "in fit" in (folder / f"runs/finetune/stacks/rank-{1 - hung}.txt").read_text()


@pytest.mark.slow
def test_a_rank_that_waits_for_its_loader_is_named(folder: Path) -> None:
    """It answers heartbeats, but its step does not go on, and DeepSpeed's groups have no time-out."""
    options = (runs.FOREVER, f"engine.timeout_minutes={LIMIT_SECONDS / 60}", "engine.kind=deepspeed", "data.workers=1")
    started = runs.by_hand("finetune", folder, *options)
    runs.wait_for_steps(folder / "runs/finetune", *started)
    (worker,) = [each for each in psutil.Process(started[1].pid).children() if "spawn" not in " ".join(each.cmdline())]
    worker.send_signal(signal.SIGSTOP)
    said = runs.finish_all(started, limit_s=LIMIT_SECONDS + 30)
    (line,) = runs.errors(said[0])
    assert "rank 1 (" in line and "hangs at step " in line and "loading the batch" in line, said
    assert not runs.errors(said[1]) and not runs.left([worker], limit_s=5)
    assert "step_batches" in (folder / "runs/finetune/stacks/rank-1.txt").read_text()


@pytest.mark.slow
def test_a_rank_without_memory_is_told_once_with_a_smaller_micro_batch(folder: Path) -> None:
    """Its limit falls to what it has, while its micro-batches need large blocks that malloc gives back after use."""
    options = ("batch.global_size=9000", "batch.micro_size=4500", runs.FOREVER)
    started = runs.by_hand("pretrain", folder, *options)
    runs.wait_for_steps(folder / "runs/pretrain", *started, steps=1)
    rank = psutil.Process(started[1].pid)
    rank.rlimit(psutil.RLIMIT_AS, (rank.memory_info().rss, rank.memory_info().rss))
    said = runs.finish_all(started, limit_s=120)
    assert [process.returncode for process in started] == [2, 2], said
    (line,) = [line for text in said for line in runs.errors(text)]
    assert line.startswith("error: command line: batch.micro_size: rank 1 is out of memory at 4500 examples"), line
    assert "(set batch.micro_size=2250, which changes no result" in line and "error: " in said[0]


@pytest.mark.slow
def test_a_killed_loader_worker_is_told_once_by_rank_0(folder: Path) -> None:
    started = runs.by_hand("finetune", folder, runs.FOREVER, "data.workers=1")
    runs.wait_for_steps(folder / "runs/finetune", *started)
    psutil.Process(started[1].pid).children()[0].kill()
    said = runs.finish_all(started, limit_s=20)
    (line,) = [line for text in said for line in runs.errors(text)]
    assert line.startswith("error: command line: data.workers: rank 1: DataLoader worker "), said
    assert [process.returncode for process in started] == [2, 2]
