"""Steps of several recipes on several GPUs, in one process group."""

from __future__ import annotations

from pathlib import Path

from tests.distributed import steps


def several_steps(rank: int, size: int, folder: Path, jobs: list[tuple[str, ...]]) -> list[steps.Outcome]:
    """A job is (stage, *overrides)."""
    return [
        steps.one_step(rank, size, steps.recipe(stage, folder, *overrides), f"cuda:{rank}")[0]
        for stage, *overrides in jobs
    ]
