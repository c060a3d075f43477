"""Automatic micro-batches: the most tokens that fit on all ranks."""

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
from lodestar.training.auto_batch_size import largest, with_measured_micro_tokens
from lodestar.training.synthetic import synthetic_task
from lodestar.training.task import TaskSpec
from retromae import task as pretrain
from tests.distributed import steps

GLOBAL_SIZE = 4000
OVERRIDES = (f"batch.global_size={GLOBAL_SIZE}", "batch.micro_tokens=auto", "model.max_length=32")
SPECS: dict[str, TaskSpec[Any]] = {"pretrain": pretrain.SPEC, "finetune": finetune.SPEC}


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 5, 16, 17, 100, 683, 10**6])
def test_the_largest_size_that_fits_is_found_to_within_an_eighth(limit: int):
    sizes: list[int] = []

    def fits(size: int) -> bool:
        sizes.append(size)
        return size <= limit

    size_found, max_size = largest(fits, 683), min(limit, 683)
    assert max_size - max(1, max_size // 8) <= size_found <= max_size and (size_found > 0) == (max_size > 0)
    assert len(sizes) == len(set(sizes)) <= 16


def _micro_tokens(rank: int, size: int, stage: str, folder: Path, room_mib: int | None) -> int:
    """The tokens with all memory, or with `room_mib` more on rank 0 than it uses already."""
    recipe = steps.recipe(stage, folder, *OVERRIDES)
    runtime = Runtime(rank, size, rank, torch.device("cpu"))
    if room_mib is not None:
        with synthetic_task(recipe, runtime, SPECS[stage], steps=1):
            pass  # from now on everything is loaded
    if room_mib is not None and rank == 0:  # rank 1 has more
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        room = pages * resource.getpagesize() + (room_mib << 20)
        resource.setrlimit(resource.RLIMIT_AS, (room, room))
    return with_measured_micro_tokens(recipe, runtime, SPECS[stage]).batch.micro_tokens


@pytest.mark.slow
@pytest.mark.parametrize("stage", SPECS)
def test_all_ranks_take_what_fits_on_the_one_with_the_least_memory(stage: str, tmp_path: Path):
    steps.recipe(stage, tmp_path)
    tokens_of_rank = GLOBAL_SIZE // 2 * 32 * (1 if stage == "pretrain" else 3)
    assert run_world(_micro_tokens, 2, stage, tmp_path, None) == [tokens_of_rank, tokens_of_rank]
    room_mib = {"pretrain": 100, "finetune": 150}[stage]  # stage 1 holds a quarter at a time, by length
    first, second = run_world(_micro_tokens, 2, stage, tmp_path, room_mib)
    assert first == second and 0 < first < tokens_of_rank
    assert not list(tmp_path.rglob("rehearsal*"))


def test_a_resumed_run_keeps_the_number(tmp_path: Path):
    recipe: Any = steps.recipe("finetune", tmp_path, *OVERRIDES)
    folder = Path(recipe.run.output_dir)
    folder.mkdir(parents=True)
    update = {"batch": recipe.batch.model_copy(update={"micro_tokens": 77})}
    (folder / "config.yaml").write_text(loader.dump(recipe.model_copy(update=update)))
    runtime = Runtime(0, 1, 0, torch.device("cpu"))
    assert with_measured_micro_tokens(recipe, runtime, SPECS["finetune"]).batch.micro_tokens == 77
