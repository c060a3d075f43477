"""Automatic micro-batches: the most tokens that fit into a device's memory, measured on the longest generated texts."""

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
from lodestar.config.values import LARGEST
from lodestar.data.micro_batches import padded_width
from lodestar.distributed.collectives import gather_counts, on_main
from lodestar.distributed.runtime import Runtime
from lodestar.errors import ConfigError, TrainingError
from lodestar.training.engine import autocast
from lodestar.training.synthetic import synthetic_task
from lodestar.training.task import Recipe, TaskSpec, TrainingTask

UNSEEN = 0.05
"""Fraction of the memory that is left for what is not measured: buffers of collectives, fragmentation."""
_ONEDNN_OUT_OF_MEMORY = "could not create a primitive"
"""oneDNN's error on a CPU."""


def with_measured_micro_tokens(recipe: Recipe, runtime: Runtime, spec: TaskSpec[Recipe]) -> Recipe:
    """The recipe with `batch.micro_tokens` as a number: that of the run folder's recipe, or else a measured one.

    Raises ConfigError where not even one text of maximum length fits.
    """
    micro_tokens = on_main(lambda: _tokens_of_earlier_run(recipe))
    if micro_tokens is None:
        width = padded_width(recipe.model.max_length)
        max_examples = max(BatchPlan(recipe.batch.global_size, runtime.world_size).examples_per_rank)
        with synthetic_task(recipe, runtime, spec, steps=1) as (synthetic, task):
            most_texts = -(-_padded_tokens(task, max_examples) // width)
            local_texts = largest(
                lambda texts: _fits(_with_tokens(synthetic, texts * width), task, runtime, spec, max_examples),
                most_texts,
            )
        micro_tokens = min(gather_counts(local_texts)) * width
        if runtime.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        if not micro_tokens:
            raise ConfigError(
                "batch.micro_tokens: not even one text fits (lower model.max_length, or use devices with more memory)"
            )
    if runtime.is_main:
        print(f"batch.micro_tokens: {micro_tokens:,} tokens at a time on each device", file=sys.stderr)
    return _with_tokens(recipe, micro_tokens)


def _with_tokens(recipe: Recipe, micro_tokens: int | str) -> Recipe:
    return recipe.model_copy(update={"batch": recipe.batch.model_copy(update={"micro_tokens": micro_tokens})})


def _padded_tokens(task: TrainingTask, examples: int) -> int:
    """Of a batch of the longest examples."""
    assert task.first_batch is not None
    return task.first_batch(BatchPlan(examples, 1, micro_tokens=LARGEST)).padded_tokens


def _tokens_of_earlier_run(recipe: TrainingRecipe) -> int | None:
    """The number in the run folder's recipe, if everything that determines the memory is equal there."""
    path = Path(recipe.run.output_dir) / "config.yaml"
    if not path.is_file():
        return None
    earlier = loader.load(type(recipe), path)
    is_equal = (earlier.model, earlier.precision, earlier.engine) == (recipe.model, recipe.precision, recipe.engine)
    tokens = earlier.batch.micro_tokens
    return (
        tokens if isinstance(tokens, int) and is_equal and _with_tokens(earlier, AUTO).batch == recipe.batch else None
    )


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


def _fits(recipe: Recipe, task: TrainingTask, runtime: Runtime, spec: TaskSpec[Recipe], max_examples: int) -> bool:
    """Whether forward and backward of the longest micro-batches fit beside the planned memory of everything else.

    max_examples   of a step on this rank
    """
    plan, unseen_bytes = spec.plan(recipe, runtime.world_size, None), int(UNSEEN * runtime.memory_bytes())
    if runtime.device.type == "cpu" and plan["peak_memory_bytes"] + unseen_bytes > runtime.memory_bytes():
        return False  # the kernel overcommits memory, and kills the process when it is used
    module = task.module.to(runtime.device).train()
    parts = {**plan["memory"], "weights": 0, "activations": 0}
    # Gradients are allocated below. On a CPU the part that is not seen is counted above: a process may be limited.
    reserved_bytes = max(0, sum(parts.values()) - sum(p.nbytes for p in module.parameters()))
    if runtime.device.type == "cuda":
        reserved_bytes += unseen_bytes
    held, micro_tokens = task.held_micro_batches, recipe.batch.plan(1).micro_tokens
    texts = (held + 1) * -(-(micro_tokens or 1) // recipe.model.max_length)
    assert task.first_batch is not None
    batch = task.first_batch(BatchPlan(min(max_examples, texts), 1, micro_tokens=micro_tokens)).to(runtime.device)
    held = batch.num_micro_batches if batch.keeps_all_graphs else min(held, batch.num_micro_batches)
    try:
        reserved = torch.empty(reserved_bytes, dtype=torch.uint8, device=runtime.device)
        with autocast(runtime.device, recipe.precision):
            outputs = [module(*batch.inputs(i)) for i in range(held)]  # the longest come first
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
        raise TrainingError(_smaller(recipe, runtime)) from None


def _smaller(recipe: TrainingRecipe, runtime: Runtime) -> str:
    """The limit of a micro-batch that was too large, and what to do."""
    batch = recipe.batch.plan(runtime.world_size)
    key, limit = "micro_tokens", batch.micro_tokens or 0
    if batch.micro_size is not None:
        key, limit = "micro_size", min(batch.micro_size, recipe.batch.global_size)
    shortest = 1 if batch.micro_size is not None else recipe.model.max_length
    remedy = f"batch.{key}={limit // 2}" if limit > shortest else "model.activation_checkpointing=true"
    unit = "examples" if batch.micro_size is not None else "tokens"
    return (
        f"batch.{key}: rank {runtime.rank} is out of memory at {limit} {unit} at a time (set {remedy}, which changes "
        "no result; the same command resumes the run)"
    )


def _sum(outputs: Any) -> Tensor:
    """The sum of all elements of nested tensors."""
    if isinstance(outputs, Tensor):
        return outputs.float().sum()
    return torch.stack([_sum(x) for x in outputs if not isinstance(x, float)]).sum()
