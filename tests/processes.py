"""Processes that tests start. Each has a limit; at it, every process of the command prints its stacks and is ended."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[1]


def start(command: Sequence[str], env: Mapping[str, str], **more: Any) -> subprocess.Popen[str]:
    """In a session of its own, from the repository unless `cwd` says otherwise; its output is for `finish`."""
    options = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "start_new_session": True, **more}
    return subprocess.Popen(command, env={**env, "PYTHONFAULTHANDLER": "1"}, text=True, **options)


def finish(process: subprocess.Popen[str], *, limit_s: float, stdin: str | None = None) -> tuple[str, str]:
    """(stdout, stderr) at its end; AssertionError with the stacks of all its processes where that takes too long."""
    try:
        return process.communicate(stdin, timeout=limit_s)
    except subprocess.TimeoutExpired:
        family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
        said = _end(process, family)
        raise AssertionError(f"{process.args}: not done after {limit_s:g} s\n{said}") from None


def run(command: Sequence[str], env: Mapping[str, str], *, limit_s: float, **more: Any) -> subprocess.CompletedProcess[str]:
    process = start(command, env, **more)
    out, errors = finish(process, limit_s=limit_s)
    return subprocess.CompletedProcess(command, process.returncode, out, errors)


def _end(process: subprocess.Popen[str], family: list[psutil.Process]) -> str:
    """End all of them; returns what they said, stacks included."""
    _signal(family, signal.SIGABRT)  # faulthandler prints the stacks of all threads
    psutil.wait_procs(family, timeout=5)
    _signal(family, signal.SIGKILL)
    return "".join(text or "" for text in process.communicate())


def _signal(family: list[psutil.Process], number: signal.Signals) -> None:
    for member in family:
        if member.is_running():
            try:
                member.send_signal(number)
            except psutil.NoSuchProcess:
                pass
