"""No test can hang: a process at its limit is ended, with its stacks."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import psutil
import pytest

from lodestar.distributed.testing import run_world
from tests import processes

HANGING = """
import subprocess, sys, time
def ready(who): open(f"{sys.argv[1]}.{who}", "w").close()
def parent_waits(): ready("parent"); child.wait()
def child_waits(): ready("child"); time.sleep(600)
if len(sys.argv) > 2:
    child_waits()
child = subprocess.Popen([sys.executable, __file__, sys.argv[1], "child"], start_new_session=True)
print(child.pid, flush=True)
parent_waits()
"""


def wait(rank: int, size: int) -> None:
    if rank == 1:
        wait_on_rank_1()


def wait_on_rank_1() -> None:
    time.sleep(600)


def test_a_process_that_hangs_is_ended_with_its_children_and_tells_their_stacks(tmp_path) -> None:
    script, ready = tmp_path / "hanging.py", tmp_path / "ready"
    script.write_text(HANGING)
    process = processes.start([sys.executable, str(script), str(ready)])
    processes.wait_until(lambda: all(Path(f"{ready}.{who}").exists() for who in ("parent", "child")), process)
    with pytest.raises(AssertionError, match=r"not done after 0\.5 s") as raised:
        processes.finish(process, limit_s=0.5)
    said = str(raised.value)
    assert "in parent_waits" in said and "in child_waits" in said
    (child,) = [int(line) for line in said.splitlines() if line.isdigit()]
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE


def test_a_command_that_hangs_is_ended() -> None:
    with pytest.raises(AssertionError, match=r"'sleep', '600'.*not done after 0\.5 s"):
        processes.run(["sleep", "600"], limit_s=0.5)


def test_what_a_process_said_is_told_where_it_ends_before_it_is_ready() -> None:
    process = processes.start([sys.executable, "-c", "raise SystemExit('no GPU')"])
    with pytest.raises(AssertionError, match="no GPU"):
        processes.wait_until(lambda: False, process)


def test_a_rank_that_hangs_is_ended_and_tells_its_stack() -> None:
    started = time.monotonic()
    with pytest.raises(AssertionError, match="wait on 2 ranks: not done after 4 s") as raised:
        run_world(wait, 2, limit_s=4)
    assert "in wait_on_rank_1" in str(raised.value) and time.monotonic() - started < 60
