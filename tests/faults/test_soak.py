"""The short form of `make soak`."""

from __future__ import annotations

import sys

import pytest

from tests import processes


@pytest.mark.slow
def test_a_run_that_is_killed_and_stopped_at_random_moments_ends_as_an_undisturbed_one() -> None:
    options = ["--kills", "2", "--stops", "1", "--only", "finetune-ddp"]
    env = {**processes.environment(), "PYTHONPATH": str(processes.ROOT)}
    done = processes.run([sys.executable, "benchmarks/soak.py", *options], env, limit_s=900)
    assert done.returncode == 0, done.stdout + done.stderr
