"""The largest micro-batch that fits into a device's memory, by trial on generated text of the longest shapes."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor

from lodestar.config import loader
from lodestar.config.schema import AUTO, BatchPlan, TrainingRecipe
from lodestar.distributed.collectives import gather_counts, on_main
from lodestar.distributed.runtime import Runtime
from lodestar.errors import ConfigError
from lodestar.training.engine import autocast
from lodestar.training.synthetic import synthetic_task
from lodestar.training.task import Recipe, TaskSpec, TrainingTask

_ONEDNN = "could not create a primitive"
"""What oneDNN says on a CPU without memory left."""


def with_largest_micro_size(recipe: Recipe, runtime: Runtime, spec: TaskSpec[Recipe]) -> Recipe:
    """The recipe with `batch.micro_size` as a number: what the run folder's recipe says, or else found by trial."""
    most = max(BatchPlan(recipe.batch.global_size, runtime.world_size, 1).examples_per_rank)
    micro_size = on_main(lambda: _of_earlier_run(recipe))
    if micro_size is None:
        with synthetic_task(recipe, runtime, spec, micro_size=1, steps=1) as (synthetic, task):
            fitting = largest(lambda size: _fits(_sized(synthetic, size), task, runtime, spec, most), most)
        micro_size = min(gather_counts(fitting))
        if runtime.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        if not micro_size:
            raise ConfigError(
                "batch.micro_size: not even one example fits (lower model.max_length, or use devices with more memory)"
            )
    if runtime.is_main:
        print(f"batch.micro_size: {micro_size} examples at a time on each device", file=sys.stderr)
    return _sized(recipe, micro_size)


def _sized(recipe: Recipe, micro_size: int | str) -> Recipe:
    return recipe.model_copy(update={"batch": recipe.batch.model_copy(update={"micro_size": micro_size})})


def _of_earlier_run(recipe: TrainingRecipe) -> int | None:
    """The number in the run folder's recipe, if all that decides the memory is the same there."""
    path = Path(recipe.run.output_dir) / "config.yaml"
    if not path.is_file():
        return None
    earlier = loader.load(type(recipe), path)
    same = (earlier.model, earlier.precision, earlier.engine) == (recipe.model, recipe.precision, recipe.engine)
    size = earlier.batch.micro_size
    return size if isinstance(size, int) and same and _sized(earlier, AUTO).batch == recipe.batch else None


def largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest number up to `most` that fits, to within an eighth; 0: none. Doubles, then halves the gap."""
    good, bad, tried = 0, most + 1, 1
    while good < tried < bad:
        if fits(tried):
            good = tried
        else:
            bad = tried
        tried = min(most, 2 * good) if bad > most else (good + bad) // 2
        if bad <= most and bad - good <= max(1, good // 8):
            break
    return good


def _fits(recipe: Recipe, task: TrainingTask, runtime: Runtime, spec: TaskSpec[Recipe], most: int) -> bool:
    """Whether forward and backward of the longest micro-batches fit beside what else a run needs.

    most   examples of a step on this rank
    """
    plan = spec.plan(recipe, runtime.world_size, None)
    if runtime.device.type == "cpu" and plan["peak_memory_bytes"] > runtime.memory_bytes():
        return False  # the kernel would lend more than there is, and end the process when it is used
    module = task.module.to(runtime.device).train()
    parts = {**plan["memory"], "weights": 0, "activations": 0}
    others_bytes = max(0, sum(parts.values()) - sum(p.nbytes for p in module.parameters()))  # gradients come by trial
    micro_size = recipe.batch.plan(1).micro_size
    batch = BatchPlan(min(most, max(2, task.held_micro_batches) * micro_size), 1, micro_size)
    assert task.micro_batches is not None
    held = task.micro_batches(batch)
    if batch.num_micro_batches > 1:
        held = held[-task.held_micro_batches :]  # by length: the last are the longest
    try:
        reserved = torch.empty(others_bytes, dtype=torch.uint8, device=runtime.device)
        with autocast(runtime.device, recipe.precision):
            outputs = [module(*micro_batch.tensors(runtime.device)) for micro_batch in held]
        _sum(outputs).backward()
        del reserved, outputs
        return True
    except (RuntimeError, MemoryError) as error:
        if not (should_reduce_batch_size(error) or isinstance(error, MemoryError) or _ONEDNN in str(error)):
            raise
        return False
    finally:
        module.zero_grad(set_to_none=True)
        gc.collect()
        if runtime.device.type == "cuda":
            torch.cuda.empty_cache()


def _sum(outputs: Any) -> Tensor:
    """Of all tensors with a gradient in nested outputs."""
    if isinstance(outputs, Tensor):
        return outputs.float().sum()
    return torch.stack([_sum(x) for x in outputs if not isinstance(x, float)]).sum()
