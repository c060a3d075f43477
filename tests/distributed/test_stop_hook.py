"""A signal to one rank stops all after the same step; ranks with short steps do not wait for each other's answers."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from lodestar.distributed.testing import run_world
from lodestar.training import hooks
from lodestar.training.loop import Progress

SHORT, LONG = 1e9, 0.0
"""LONG_STEP_SECONDS by which every step, or none, is short."""


def train(rank: int, size: int, long_from: float, signalled: int, at: int, total: int) -> tuple[int, str | None]:
    """(last step, what stopped it) of a loop in which one rank gets a signal in a step."""
    hooks.LONG_STEP_SECONDS = long_from
    progress = Progress(total)
    done: Any = None
    with hooks.StopHook(size) as stop:
        stop.before(progress)
        while not progress.done and progress.stop is None:
            if rank == signalled and progress.step + 1 == at:
                stop.request("SIGTERM")
            progress.step += 1
            stop.after_step(progress, done)
    return progress.step, progress.stop


@pytest.mark.parametrize(("long_from", "at", "last"), [(LONG, 3, 3), (SHORT, 3, 4), (SHORT, 1, 1), (SHORT, 6, 6)])
def test_all_ranks_stop_after_the_same_step_and_at_most_one_later(long_from: float, at: int, last: int) -> None:
    """The first step, of unknown length, and the last one of the run are waited for."""
    for signalled in (0, 2):
        assert run_world(train, 3, long_from, signalled, at, 6) == [(last, "SIGTERM")] * 3
    assert run_world(train, 3, long_from, -1, at, 6) == [(6, None)] * 3


def overtake(rank: int, size: int, folder: Path, long_from: float) -> bool:
    """Whether rank 0 comes through the end of a step that rank 1 has not ended."""
    hooks.LONG_STEP_SECONDS = long_from
    progress, mark, done = Progress(9), folder / "through", None
    with hooks.StopHook(size) as stop:
        stop.before(progress)
        for step in (1, 2, 3):
            if rank == 1 and step == 3:
                deadline = time.monotonic() + (10 if long_from == SHORT else 0.5)
                while not mark.exists() and time.monotonic() < deadline:
                    time.sleep(0.01)
                is_through = mark.exists()
            progress.step = step
            stop.after_step(progress, done)
        mark.touch()
    return rank == 0 or is_through


def test_a_rank_waits_for_no_answer_to_the_step_that_it_ends(tmp_path: Path) -> None:
    for long_from in (SHORT, LONG):  # the second: a control, in which it waits
        folder = tmp_path / str(long_from)
        folder.mkdir()
        assert run_world(overtake, 2, folder, long_from) == [True, long_from == SHORT]
