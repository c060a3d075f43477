"""What a run would do, from the recipe and a few small files alone: no torch, no model."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from lodestar.config.schema import AUTO, BatchConfig, ModelConfig, RunConfig, ScheduleConfig
from lodestar.data.readers import count_rows, find_sources
from lodestar.errors import ConfigError, LodestarError
from lodestar.planning.cost_model import BERT_BASE, DEVICES, RUNTIME_BYTES, Device, EncoderShape, Memory, Seconds

Found = TypeVar("Found")


@dataclass
class PlanWarnings:
    """What a plan did not find; a run would refuse to start, a plan goes on without it."""

    lines: list[str]

    def or_default(self, value: Found, look: Callable[[], Found], note: str) -> Found:
        """What `look` finds, or `value` and a line that says so."""
        try:
            return look()
        except LodestarError as error:
            self.lines.append(f"{error}; {note}")
            return value


def encoder_shape(model: ModelConfig, missing: PlanWarnings) -> EncoderShape:
    """The shape in the encoder's folder, or in the hub's cache on this machine, or else BERT-base's."""
    return missing.or_default(BERT_BASE, lambda: _shape_in(model), "memory is estimated for BERT-base")


def _shape_in(model: ModelConfig) -> EncoderShape:
    path = Path(model.encoder) / "config.json"
    if not path.is_file():
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        cached = None
        if not Path(model.encoder).exists():
            with suppress(HFValidationError):  # a path, not a name
                cached = try_to_load_from_cache(model.encoder, "config.json")
        if not isinstance(cached, str):
            raise ConfigError(
                f"model.encoder: {model.encoder}: no config.json there or in the hub's cache (check the name)"
            )
        path = Path(cached)
    config = json.loads(path.read_text(encoding="utf-8"))
    try:
        width = config["hidden_size"]
        return EncoderShape(
            layers=config["num_hidden_layers"],
            width=width,
            feed_forward=config.get("intermediate_size", 4 * width),
            vocabulary=config["vocab_size"],
            positions=config.get("max_position_embeddings", 0),
        )
    except KeyError as missing:
        raise ConfigError(f"{path}: {missing}: not set (an encoder in transformers' format has it)") from None


def rows_and_steps(
    train: Sequence[str], schedule: ScheduleConfig, global_size: int, missing: PlanWarnings
) -> tuple[int | None, int | None]:
    """(rows, steps), as far as they can be known without reading more than lines."""
    rows = missing.or_default(None, lambda: count_rows(find_sources(train)), "rows are not known")
    steps = schedule.steps or (schedule.total_steps(rows, global_size) if rows is not None else None)
    return rows, steps


def state_of(output_dir: str) -> str:
    """new | unfinished | stopped (when asked; the same command goes on) | finished, by what lies in the run folder."""
    folder = Path(output_dir)
    summary = folder / "summary.json"
    found = json.loads(summary.read_text(encoding="utf-8")) if summary.is_file() else {}
    if found.get("finished") or found.get("stopped_by"):
        return "finished" if found.get("finished") else "stopped"
    return "unfinished" if found or (folder / "checkpoints").is_dir() else "new"


def describe(
    *,
    run: RunConfig,
    batch: BatchConfig,
    schedule: ScheduleConfig,
    world_size: int,
    rows: int | None,
    steps: int | None,
    memory: Memory,
    seconds: Callable[[Device], Seconds],
    device: str | None,
    checkpoint_bytes: int,
    missing: PlanWarnings,
    **more: Any,
) -> dict[str, Any]:
    """The plan as one object, ready for JSON; with a `device`, also whether it fits there and what a step takes."""
    plan = batch.plan(world_size)
    if batch.micro_size == AUTO:
        missing.lines.append(f"batch.micro_size: auto: found when a run starts; planned with {plan.micro_size}")
    shares = plan.rows_per_rank
    return {
        "output_dir": run.output_dir,
        "state": state_of(run.output_dir),
        "world_size": world_size,
        "global_size": batch.global_size,
        "micro_size": plan.micro_size,
        "rows_per_rank": shares,
        "chunks_per_rank": plan.num_micro_batches,
        "imbalance": max(shares) * world_size / batch.global_size - 1,
        "rows": rows,
        "steps": steps,
        "warmup_steps": None if steps is None else schedule.warmup_steps(steps),
        **more,
        "checkpoint_bytes": checkpoint_bytes,
        "peak_memory_bytes": memory.total,
        "memory": asdict(memory),
        **(_on_device(device, memory, seconds, steps) if device else {}),
        "missing": missing.lines,
    }


def _on_device(name: str, memory: Memory, seconds: Callable[[Device], Seconds], steps: int | None) -> dict[str, Any]:
    step = seconds(DEVICES[name])
    return {
        "device": name,
        "device_memory_bytes": DEVICES[name].memory_bytes,
        "fits": memory.total + RUNTIME_BYTES <= DEVICES[name].memory_bytes,
        "seconds_per_step": step.total,
        "seconds": asdict(step),
        "hours": None if steps is None else steps * step.total / 3600,
    }


def batch_in_words(plan: Mapping[str, Any]) -> str:
    """The arithmetic of the global batch in one line."""
    sizes, of = plan["rows_per_rank"], "texts"
    parts = [f"{sizes.count(size)} x {size:,}" for size in sorted(set(sizes), reverse=True)]
    several = "es" if plan["chunks_per_rank"] > 1 else ""
    negatives = ""
    if plan["negatives_per_query"]:
        of, negatives = "queries", f"; {plan['negatives_per_query']:,} negatives each"
    return (
        f"global batch: {plan['global_size']:,} = {' + '.join(parts)} {of}; {plan['chunks_per_rank']:,} "
        f"micro-batch{several} a step{negatives}"
    )


def in_words(plan: Mapping[str, Any]) -> str:
    """The plan for a reader: one line for each fact, runs of equal ranks together."""
    lines = []
    for key, value in plan.items():
        if key == "rows_per_rank":
            sizes = sorted(set(value), reverse=True)
            value = " + ".join(f"{value.count(size)} x {size:,}" for size in sizes)
        elif key == "missing":
            lines += [f"{'missing':<22} {line}" for line in value]
            continue
        elif key == "memory":
            value = ", ".join(f"{name} {part / 2**30:.2f}" for name, part in value.items() if part) + " GiB"
        elif key == "seconds":
            value = ", ".join(f"{name} {part:.3f}" for name, part in value.items() if part) + " s"
        elif key.endswith("_bytes"):
            guess = "" if key == "device_memory_bytes" else " (estimated)"
            key, value = key.removesuffix("_bytes"), f"{value / 2**30:.2f} GiB{guess}"
        elif isinstance(value, bool):
            value = "yes" if value else "no (lower batch.micro_size: it changes no result)"
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
