"""Automatic micro-batch size: the largest that fits into a device's memory, measured on the longest generated texts."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor

from lodestar.config import loader
from lodestar.config.schema import AUTO, BatchPlan, TrainingRecipe
from lodestar.distributed.collectives import gather_counts, on_main
from lodestar.distributed.runtime import Runtime
from lodestar.errors import ConfigError, TrainingError
from lodestar.training.engine import autocast
from lodestar.training.synthetic import synthetic_task
from lodestar.training.task import Recipe, TaskSpec, TrainingTask

_ONEDNN_OUT_OF_MEMORY = "could not create a primitive"
"""oneDNN's error on a CPU."""


def with_largest_micro_size(recipe: Recipe, runtime: Runtime, spec: TaskSpec[Recipe]) -> Recipe:
    """The recipe with `batch.micro_size` as a number: that of the run folder's recipe, or else a measured one.

    Raises ConfigError where not even one example fits.
    """
    max_size = max(BatchPlan(recipe.batch.global_size, runtime.world_size, 1).examples_per_rank)
    micro_size = on_main(lambda: _size_of_earlier_run(recipe))
    if micro_size is None:
        with synthetic_task(recipe, runtime, spec, micro_size=1, steps=1) as (synthetic, task):
            local_size = largest(
                lambda size: _fits(_with_size(synthetic, size), task, runtime, spec, max_size), max_size
            )
        micro_size = min(gather_counts(local_size))
        if runtime.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        if not micro_size:
            raise ConfigError(
                "batch.micro_size: not even one example fits (lower model.max_length, or use devices with more memory)"
            )
    if runtime.is_main:
        print(f"batch.micro_size: {micro_size} examples at a time on each device", file=sys.stderr)
    return _with_size(recipe, micro_size)


def _with_size(recipe: Recipe, micro_size: int | str) -> Recipe:
    return recipe.model_copy(update={"batch": recipe.batch.model_copy(update={"micro_size": micro_size})})


def _size_of_earlier_run(recipe: TrainingRecipe) -> int | None:
    """The size in the run folder's recipe, if everything that determines the memory is equal there."""
    path = Path(recipe.run.output_dir) / "config.yaml"
    if not path.is_file():
        return None
    earlier = loader.load(type(recipe), path)
    is_equal = (earlier.model, earlier.precision, earlier.engine) == (recipe.model, recipe.precision, recipe.engine)
    size = earlier.batch.micro_size
    return size if isinstance(size, int) and is_equal and _with_size(earlier, AUTO).batch == recipe.batch else None


def largest(fits: Callable[[int], bool], max_size: int) -> int:
    """The largest size up to `max_size` that fits, to within an eighth; 0: none. Doubles the size, then bisects."""
    low, high, size = 0, max_size + 1, 1  # low fits, high does not
    while low < size < high:
        if fits(size):
            low = size
        else:
            high = size
        size = min(max_size, 2 * low) if high > max_size else (low + high) // 2
        if high <= max_size and high - low <= max(1, low // 8):
            break
    return low


def _fits(recipe: Recipe, task: TrainingTask, runtime: Runtime, spec: TaskSpec[Recipe], max_size: int) -> bool:
    """Whether forward and backward of the longest micro-batches fit beside the planned memory of everything else.

    max_size   examples of a step on this rank
    """
    plan = spec.plan(recipe, runtime.world_size, None)
    if runtime.device.type == "cpu" and plan["peak_memory_bytes"] > runtime.memory_bytes():
        return False  # the kernel overcommits memory, and kills the process when it is used
    module = task.module.to(runtime.device).train()
    parts = {**plan["memory"], "weights": 0, "activations": 0}
    reserved_bytes = max(
        0, sum(parts.values()) - sum(p.nbytes for p in module.parameters())
    )  # gradients are allocated below
    micro_size = recipe.batch.plan(1).micro_size
    batch = BatchPlan(min(max_size, max(2, task.held_micro_batches) * micro_size), 1, micro_size)
    assert task.micro_batches is not None
    micro_batches = task.micro_batches(batch)
    if batch.num_micro_batches > 1:
        micro_batches = micro_batches[-task.held_micro_batches :]  # sorted by length: the last are the longest
    try:
        reserved = torch.empty(reserved_bytes, dtype=torch.uint8, device=runtime.device)
        with autocast(runtime.device, recipe.precision):
            outputs = [module(*micro_batch.tensors(runtime.device)) for micro_batch in micro_batches]
        _sum(outputs).backward()
        del reserved, outputs
        return True
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        return False
    finally:
        module.zero_grad(set_to_none=True)
        gc.collect()
        if runtime.device.type == "cuda":
            torch.cuda.empty_cache()


def _is_out_of_memory(error: Exception) -> bool:
    return should_reduce_batch_size(error) or isinstance(error, MemoryError) or _ONEDNN_OUT_OF_MEMORY in str(error)


@contextmanager
def out_of_memory_told(recipe: TrainingRecipe, runtime: Runtime) -> Iterator[None]:
    """TrainingError with a smaller micro-batch size where this rank's memory does not suffice inside."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        size = min(recipe.batch.plan(runtime.world_size).micro_size, recipe.batch.global_size)
        smaller = f"set batch.micro_size={size // 2}" if size > 1 else "set model.activation_checkpointing=true"
        raise TrainingError(
            f"batch.micro_size: rank {runtime.rank} is out of memory at {size} examples at a time ({smaller}, which "
            "changes no result; the same command resumes the run)"
        ) from None


def _sum(outputs: Any) -> Tensor:
    """The sum of all elements of nested tensors."""
    if isinstance(outputs, Tensor):
        return outputs.float().sum()
    return torch.stack([_sum(x) for x in outputs if not isinstance(x, float)]).sum()
