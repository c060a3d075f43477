"""Generated text of the longest shapes, and by it the largest micro-batch that fits into a device's memory."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor

from lodestar.config import loader
from lodestar.config.schema import AUTO, BatchPlan
from lodestar.distributed.collectives import gather_counts, on_main
from lodestar.distributed.runtime import Runtime
from lodestar.errors import ConfigError
from lodestar.training.engine import autocast
from lodestar.training.synthetic import generated
from lodestar.training.task import TaskSpec, TrainingTask

_ONEDNN = "could not create a primitive"
"""What oneDNN says on a CPU without memory left."""


def with_largest_micro_size(recipe: Any, runtime: Runtime, spec: TaskSpec) -> Any:
    """The recipe with `batch.micro_size` as a number: what the run folder's recipe says, or else found by trial."""
    most = max(BatchPlan(recipe.batch.global_size, runtime.world_size, 1).rows_per_rank)
    found = on_main(lambda: _found_before(recipe))
    if found == AUTO:
        with generated(recipe, runtime, spec, micro_size=1, steps=1) as (made, task):
            found = largest(lambda rows: _fits(made, task, runtime, spec, rows, most), most)
        found = min(gather_counts(found))
        if runtime.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        if not found:
            raise ConfigError("batch.micro_size: not even one row fits (lower model.max_length, or take more memory)")
    if runtime.is_main:
        print(f"batch.micro_size: {found} rows at a time on each device", file=sys.stderr)
    return recipe.model_copy(update={"batch": recipe.batch.model_copy(update={"micro_size": found})})


def _found_before(recipe: Any) -> int | str:
    """By the run that lies in the recipe's folder, if what decides the memory is the same."""
    path = Path(recipe.run.output_dir) / "config.yaml"
    if not path.is_file():
        return AUTO
    before = loader.load(type(recipe), path)
    found = before.batch.micro_size
    same = all(getattr(before, name) == getattr(recipe, name) for name in ("model", "precision", "engine"))
    return found if same and before.batch.model_copy(update={"micro_size": AUTO}) == recipe.batch else AUTO


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


def _fits(recipe: Any, task: TrainingTask, runtime: Runtime, spec: TaskSpec, rows: int, most: int) -> bool:
    """Whether forward and backward of the longest micro-batches of `rows` rows fit beside what else a run needs."""
    sized = recipe.model_copy(update={"batch": recipe.batch.model_copy(update={"micro_size": rows})})
    planned = spec.plan(sized, runtime.world_size, None)
    if runtime.device.type == "cpu" and planned["peak_memory_bytes"] > runtime.memory_bytes():
        return False  # the kernel would lend more than there is, and end the process when it is used
    module = task.module.to(runtime.device).train()
    parts = {**planned["memory"], "weights": 0, "activations": 0}
    others_bytes = max(0, sum(parts.values()) - sum(p.nbytes for p in module.parameters()))  # gradients come by trial
    kept = max(1, int(getattr(recipe.batch, "keep_graph", 0)))
    plan = BatchPlan(min(most, max(2, kept) * rows), 1, rows)
    collate: Any = task.collate
    micro_batches = replace(collate, plan=plan, rank=0)(0).micro_batches
    held = (
        micro_batches if plan.num_micro_batches == 1 else micro_batches[-kept:]
    )  # by length: the last are the longest
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
