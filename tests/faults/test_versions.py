"""Ranks with other code or another torch."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch

from lodestar.distributed.session import versions
from tests import processes
from tests.faults import runs
from tests.processes import ROOT, environment, free_port


@pytest.mark.slow
def test_ranks_with_other_code_are_told_in_one_line(tmp_path: Path) -> None:
    """A node with a checkout of its own."""
    folder, other = runs.prepare(tmp_path), tmp_path / "checkout"
    for name in ("launch", "lodestar", "retrieval", "retromae", "contrastive"):
        shutil.copytree(ROOT / name, other / name, ignore=shutil.ignore_patterns("__pycache__"))
    with (other / "lodestar/rng.py").open("a") as file:
        file.write("# changed\n")
    meeting = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    started = [
        processes.start(
            [sys.executable, *runs.command("finetune", folder)],
            {**environment(), **meeting, "RANK": str(rank), "PYTHONPATH": str(place)},
            cwd=place,
        )
        for rank, place in enumerate((ROOT, other))
    ]
    said = runs.finish_all(started, limit_s=runs.START_SECONDS)
    (line,) = [line for text in said for line in runs.errors(text)]
    assert line.startswith("error: code: not the same as on rank 0: rank 1 has sources of lodestar '"), line
    assert [process.returncode for process in started] == [2, 2]


def test_a_clone_that_was_not_installed_has_versions_too() -> None:
    found = versions(("torch", "no-such-package"))
    assert found == {"torch": torch.__version__, "no-such-package": "not installed"}
