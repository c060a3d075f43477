"""What is found by trial: the largest micro-batch that fits, and what a step costs."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import pytest
import torch

from contrastive import task as finetune
from lodestar.config import loader
from lodestar.distributed.runtime import Runtime
from lodestar.distributed.testing import run_world
from lodestar.training.auto_batch_size import largest, with_largest_micro_size
from lodestar.training.synthetic import synthetic_task
from lodestar.training.task import TaskSpec
from retromae import task as pretrain
from tests.distributed import steps

ROWS = 4000
OVERRIDES = (f"batch.global_size={ROWS}", "batch.micro_size=auto", "model.max_length=32")
SPECS: dict[str, TaskSpec[Any]] = {"pretrain": pretrain.SPEC, "finetune": finetune.SPEC}


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 5, 16, 17, 100, 683, 10**6])
def test_the_largest_that_fits_is_found_to_within_an_eighth(limit: int):
    tried: list[int] = []

    def fits(rows: int) -> bool:
        tried.append(rows)
        return rows <= limit

    found, most = largest(fits, 683), min(limit, 683)
    assert most - max(1, most // 8) <= found <= most and (found > 0) == (most > 0)
    assert len(tried) == len(set(tried)) <= 16


def _found(rank: int, size: int, stage: str, folder: Path, room_mib: int | None) -> int:
    """What is found with all memory, or with so much more on rank 0 than is in use."""
    made = steps.recipe(stage, folder, *OVERRIDES)
    runtime = Runtime(rank, size, rank, torch.device("cpu"))
    if room_mib is not None:
        with synthetic_task(made, runtime, SPECS[stage], micro_size=1, steps=1):
            pass  # everything that is loaded once is there now
    if room_mib is not None and rank == 0:  # the other one has more
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        room = pages * resource.getpagesize() + (room_mib << 20)
        resource.setrlimit(resource.RLIMIT_AS, (room, room))
    return with_largest_micro_size(made, runtime, SPECS[stage]).batch.micro_size


@pytest.mark.parametrize("stage", SPECS)
def test_all_ranks_take_what_fits_on_the_one_with_the_least_memory(stage: str, tmp_path: Path):
    assert run_world(_found, 2, stage, tmp_path, None) == [ROWS // 2, ROWS // 2]
    first, second = run_world(_found, 2, stage, tmp_path, 250)
    assert first == second and 0 < first < ROWS // 2
    assert not list(tmp_path.rglob("rehearsal*"))


def test_a_run_that_goes_on_keeps_what_was_found(tmp_path: Path):
    made: Any = steps.recipe("finetune", tmp_path, *OVERRIDES)
    folder = Path(made.run.output_dir)
    folder.mkdir(parents=True)
    update = {"batch": made.batch.model_copy(update={"micro_size": 7})}
    (folder / "config.yaml").write_text(loader.dump(made.model_copy(update=update)))
    runtime = Runtime(0, 1, 0, torch.device("cpu"))
    assert with_largest_micro_size(made, runtime, SPECS["finetune"]).batch.micro_size == 7
