"""Runs of two ranks on a tiny encoder, under each launcher or started by hand."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

from tests import processes, tiny
from tests.distributed import steps
from tests.processes import environment, free_port

BIN = Path(sys.executable).parent
LAUNCHERS: dict[str, Callable[[], list[str]]] = {
    "torchrun": lambda: [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", "2"],
    "deepspeed": lambda: [str(BIN / "deepspeed"), "--num_accelerators", "2", "--master_port", free_port()],
}
FOREVER = f"schedule.steps={10**6}"
START_SECONDS = 180
"""Until a run has begun to train, on a machine that is busy."""


def prepare(folder: Path) -> Path:
    """An encoder and recipes of both stages."""
    tiny.encoder(folder / "bert", "bert", layers=1, width=16, dropout=0.1, std=0.3)
    steps.recipe("pretrain", folder)
    steps.recipe("finetune", folder)
    return folder


def command(stage: str, folder: Path, *overrides: str) -> list[str]:
    common = ("checkpoint.every_steps=0", "track.log_every=1")
    return [f"launch/{stage}.py", "--config", str(folder / f"{stage}.yaml"), *common, *overrides]


def launch(launcher: str, stage: str, folder: Path, *overrides: str) -> subprocess.Popen[str]:
    return processes.start([*LAUNCHERS[launcher](), *command(stage, folder, *overrides)])


def by_hand(
    stage: str, folder: Path, *overrides: str, ranks: Sequence[int] = (0, 1), size: int = 2, **env: str
) -> list[subprocess.Popen[str]]:
    """Ranks that no launcher ends."""
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": str(size)}
    return [
        processes.start(
            [sys.executable, *command(stage, folder, *overrides)],
            {**environment(), **meeting, "RANK": str(rank), "LOCAL_RANK": str(rank), **env},
        )
        for rank in ranks
    ]


def wait_for_steps(run_folder: Path, *started: subprocess.Popen[str], steps: int = 3) -> None:
    metrics = run_folder / "metrics.jsonl"
    processes.wait_until(
        lambda: metrics.exists() and len(metrics.read_text().splitlines()) >= steps, *started, limit_s=START_SECONDS
    )


def ranks_of(launcher: subprocess.Popen[str]) -> dict[int, psutil.Process]:
    """Its ranks that run, by number; without loader workers."""
    found: dict[int, psutil.Process] = {}
    for process in psutil.Process(launcher.pid).children(recursive=True):
        try:
            rank = process.environ().get("RANK")
            parent = process.parent()
            if rank is not None and parent is not None and "RANK" not in parent.environ():
                found[int(rank)] = process
        except psutil.Error:
            continue
    return found


def errors(said: str) -> list[str]:
    assert 'Traceback (most recent call last):\n  File "/' not in said, said
    return [line for line in said.splitlines() if "error: " in line]


def finish_all(started: Sequence[subprocess.Popen[str]], *, limit_s: float) -> list[str]:
    """The stderr of each; all end within the limit."""
    try:
        return [processes.finish(process, limit_s=limit_s)[1] for process in started]
    finally:
        for process in started:
            process.kill()


def left(family: Sequence[psutil.Process], *, limit_s: float) -> list[psutil.Process]:
    """Those that still run at the limit; zombies, which nobody has waited for, do not."""
    deadline = time.monotonic() + limit_s
    while (alive := [process for process in family if _runs(process)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    return alive


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def to_group(process: subprocess.Popen[str], number: int) -> None:
    os.killpg(process.pid, number)
