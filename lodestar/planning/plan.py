"""What a run would do, from the recipe and a few small files alone: no torch, no model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from lodestar.config.schema import AUTO, ModelConfig, TrainingRecipe
from lodestar.data.file_record import FileRecord
from lodestar.data.readers import count_rows, find_sources
from lodestar.errors import LodestarError
from lodestar.files import read_object
from lodestar.models.compile import check_compiler
from lodestar.models.folder_checks import check_model
from lodestar.models.pooling_config import PoolingChoice, pooling_on_disk
from lodestar.planning.cost_model import (
    DEVICES,
    RUNTIME_BYTES,
    Memory,
    Seconds,
    StepCost,
    memory,
    seconds,
)

Value = TypeVar("Value")
Plan = dict[str, Any]
"""What a run would do, by the names of `--plan --json`."""


@dataclass
class PlanWarnings:
    """What a plan could not find: a run would end with an error, a plan continues without it."""

    lines: list[str] = field(default_factory=list[str])

    def or_default(self, default: Value, find: Callable[[], Value], note: str) -> Value:
        """What `find` returns; where it raises, `default` and a line with the reason and the note."""
        try:
            return find()
        except LodestarError as error:
            self.lines.append(f"{error}; {note}")
            return default


def _pooling(model: ModelConfig, warnings: PlanWarnings) -> str:
    """The pooling that a run would train, with a line for each warning of it."""
    choice = warnings.or_default(None, lambda: _checked_pooling(model), "a run would end with this error")
    if choice is None:
        return model.pooling
    warnings.lines += [line.removeprefix("warning: ") for line in choice.warnings]
    return choice.pooling


def _checked_pooling(model: ModelConfig) -> PoolingChoice | None:
    check_model(model)
    return pooling_on_disk(model)


def state_of(output_dir: str) -> str:
    """new | unfinished | stopped (by a signal; the same command resumes) | finished, by the files of the run folder."""
    folder = Path(output_dir)
    summary = folder / "summary.json"
    try:
        values = read_object(summary) if summary.exists() else {}
    except ValueError:  # damaged: a run says so
        return "unfinished"
    if values.get("finished") or values.get("stopped_by"):
        return "finished" if values.get("finished") else "stopped"
    return "unfinished" if values or (folder / "checkpoints").is_dir() else "new"


def describe(
    recipe: TrainingRecipe,
    world_size: int,
    device: str | None,
    *,
    train: Sequence[str],
    cache_dir: str,
    cost: StepCost,
    tokens_per_example: int,
    negatives_per_query: int,
    warnings: PlanWarnings,
) -> Plan:
    """The plan of a training run; with a `device`, also whether the run fits and how long a step takes."""
    batch, schedule = recipe.batch, recipe.schedule
    plan = batch.plan(world_size)
    if batch.micro_tokens == AUTO:
        warnings.lines.append(f"batch.micro_tokens: auto: measured when a run starts; planned with {plan.micro_tokens}")
    if recipe.model.compile:
        warnings.or_default(None, check_compiler, "a GPU does not need it")
    tokens = [examples * tokens_per_example for examples in plan.examples_per_rank]
    record = FileRecord(Path(cache_dir))
    rows = warnings.or_default(None, lambda: count_rows(find_sources(train), record), "rows are not known")
    steps = schedule.steps or (schedule.total_steps(rows, batch.global_size) if rows is not None else None)
    device_memory = memory(cost, recipe, world_size)
    on_device: Plan = {}
    if device:
        step = seconds(cost, DEVICES[device], recipe.precision, world_size)
        on_device = _on_device(device, device_memory, step, steps)
    return {
        "output_dir": recipe.run.output_dir,
        "state": state_of(recipe.run.output_dir),
        "world_size": world_size,
        "global_size": batch.global_size,
        "micro_size": plan.micro_size,
        "micro_tokens": plan.micro_tokens,
        "rows_per_rank": plan.examples_per_rank,
        "chunks_per_rank": plan.num_micro_batches(tokens_per_example),
        "tokens_per_rank": {"largest": max(tokens), "mean": sum(tokens) / world_size},
        "imbalance": max(plan.examples_per_rank) * world_size / batch.global_size - 1,
        "rows": rows,
        "steps": steps,
        "warmup_steps": None if steps is None else schedule.warmup_steps(steps),
        "negatives_per_query": negatives_per_query,
        "pooling": _pooling(recipe.model, warnings),
        "tokens_at_most": None if steps is None else steps * batch.global_size * tokens_per_example,
        "checkpoint_bytes": 12 * cost.shape.parameters,  # weights and two states of AdamW, in fp32
        "peak_memory_bytes": device_memory.total,
        "memory": asdict(device_memory),
        **on_device,
        "missing": warnings.lines,
    }


def _on_device(name: str, needed: Memory, step: Seconds, steps: int | None) -> Plan:
    memory_bytes = DEVICES[name].memory_bytes
    return {
        "device": name,
        "device_memory_bytes": memory_bytes,
        "fits": needed.total + RUNTIME_BYTES <= memory_bytes,
        "seconds_per_step": step.total,
        "seconds": asdict(step),
        "hours": None if steps is None else steps * step.total / 3600,
    }


def batch_in_words(plan: Mapping[str, Any]) -> str:
    """The global batch in one line."""
    count, negatives = plan["chunks_per_rank"], plan["negatives_per_query"]
    return (
        f"global batch: {plan['global_size']:,} = {_sizes_in_words(plan['rows_per_rank'])} "
        f"{'queries' if negatives else 'texts'}; {count:,} micro-batch{'es' if count > 1 else ''} a step"
        + (f"; {negatives:,} negatives each" if negatives else "")
    )


def _sizes_in_words(sizes: Sequence[int]) -> str:
    """Batch sizes of all ranks, equal ones together: 32 x 683 + 16 x 682."""
    return " + ".join(f"{sizes.count(size)} x {size:,}" for size in sorted(set(sizes), reverse=True))


def in_words(plan: Mapping[str, Any]) -> str:
    """The plan as text: one line for each value."""
    lines: list[str] = []
    for key, value in plan.items():
        if key == "rows_per_rank":
            value = _sizes_in_words(value)
        elif key in ("micro_size", "micro_tokens") and value is None:
            continue
        elif key == "tokens_per_rank":
            value = f"at most {value['largest']:,}, {value['mean']:,.0f} on average"
        elif key == "missing":
            lines += [f"{'missing':<22} {line}" for line in value]
            continue
        elif key == "memory":
            value = ", ".join(f"{name} {part / 2**30:.2f}" for name, part in value.items() if part) + " GiB"
        elif key == "seconds":
            value = ", ".join(f"{name} {part:.3f}" for name, part in value.items() if part) + " s"
        elif key.endswith("_bytes"):
            note = "" if key == "device_memory_bytes" else " (estimated)"
            key, value = key.removesuffix("_bytes"), f"{value / 2**30:.2f} GiB{note}"
        elif isinstance(value, bool):
            value = "yes" if value else "no (lower batch.micro_tokens: it changes no result)"
        elif key in ("seconds_per_step", "hours"):
            value = "not known" if value is None else f"{value:,.2f} (estimated)"
        elif value is None:
            value = "not known without reading the data"
        elif isinstance(value, float):
            value = f"{value:.2%}"
        elif isinstance(value, int):
            value = f"{value:,}"
        lines.append(f"{key.replace('_', ' '):<22} {value}")
    return "\n".join(lines)
