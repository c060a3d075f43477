"""Processes of tests, each with a limit. At it, all processes of the command print their stacks and are ended."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[1]


def environment() -> dict[str, str]:
    """Offline, on the CPU, without what an earlier test in this process may have set for a launcher."""
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    return {**kept, "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"}


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def start(command: Sequence[str], env: Mapping[str, str] | None = None, **more: Any) -> subprocess.Popen[str]:
    """In a session of its own, from the repository unless `cwd` says otherwise; its output is for `finish`."""
    options = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "start_new_session": True, **more}
    env = {**(environment() if env is None else env), "PYTHONFAULTHANDLER": "1"}
    return subprocess.Popen(command, env=env, text=True, **options)


def finish(process: subprocess.Popen[str], *, limit_s: float, stdin: str | None = None) -> tuple[str, str]:
    """(stdout, stderr) at its end; AssertionError with the stacks of all its processes where that takes too long."""
    try:
        return process.communicate(stdin, timeout=limit_s)
    except subprocess.TimeoutExpired:
        raise AssertionError(f"{process.args}: not done after {limit_s:g} s\n{stop(process)}") from None


def run(
    command: Sequence[str], env: Mapping[str, str] | None = None, *, limit_s: float, **more: Any
) -> subprocess.CompletedProcess[str]:
    process = start(command, env, **more)
    out, errors = finish(process, limit_s=limit_s)
    return subprocess.CompletedProcess(command, process.returncode, out, errors)


def wait_until(ready: Callable[[], object], *processes: subprocess.Popen[str], limit_s: float = 120) -> None:
    """AssertionError with stacks where that takes too long, or where one of the processes ends first."""
    deadline = time.monotonic() + limit_s
    while not ready():
        if time.monotonic() > deadline or any(process.poll() is not None for process in processes):
            said = "\n".join(stop(process) for process in processes)
            raise AssertionError(f"not within {limit_s:g} s, or not before a process ended\n{said}")
        time.sleep(0.05)


def stop(process: subprocess.Popen[str]) -> str:
    """End it and all that it started; returns what they said, stacks included."""
    family = _family(process.pid)
    deadline = time.monotonic() + 5
    for member in family:  # one by one: they may share a pipe, and would cut each other's lines
        _signal(member, signal.SIGABRT)  # faulthandler prints the stacks of all threads
        while _is_alive(member) and time.monotonic() < deadline:
            time.sleep(0.01)
    for member in family:
        _signal(member, signal.SIGKILL)
    try:
        return "".join(text or "" for text in process.communicate(timeout=5))
    except subprocess.TimeoutExpired:
        return "a process that left the session still holds the output"


def _family(process_id: int) -> list[psutil.Process]:
    """The process, its descendants, and what is left of its session where those between have ended; the oldest first,
    because a parent may end in its own way once its children have.
    """
    family = {other for other in psutil.process_iter() if _session(other.pid) == process_id}
    for member in list(family):
        with suppress(psutil.NoSuchProcess):
            family |= set(member.children(recursive=True))
    return sorted(family, key=lambda member: (_created(member), member.pid))


def _created(process: psutil.Process) -> float:
    with suppress(psutil.NoSuchProcess):
        return process.create_time()
    return 0.0


def _session(process_id: int) -> int | None:
    try:
        return os.getsid(process_id)
    except ProcessLookupError:
        return None


def _is_alive(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.status() != psutil.STATUS_ZOMBIE
    return False


def _signal(process: psutil.Process, number: signal.Signals) -> None:
    with suppress(psutil.NoSuchProcess):
        process.send_signal(number)
