"""What a run would do, from the recipe and a few small files alone: no torch, no model.

Memory is counted for one device. Activations of a transformer layer: Korthikanti et al. 2022, "Reducing activation
recomputation in large transformer models", section 4.1 (34 bytes per token and unit of width in half precision, without
the attention matrix, which fused attention does not keep).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from chassis.errors import ConfigError, LodestarError
from chassis.schema import Batch, BatchPlan, Engine, Model, Run, Schedule
from chassis.sources import count_rows, find_sources

Found = TypeVar("Found")


@dataclass(frozen=True)
class EncoderShape:
    """The sizes in an encoder's config.json that decide its memory."""

    layers: int
    width: int
    feed_forward: int
    vocabulary: int
    positions: int

    @property
    def layer_parameters(self) -> int:
        return 4 * self.width**2 + 2 * self.width * self.feed_forward + 9 * self.width + self.feed_forward

    @property
    def parameters(self) -> int:
        return (self.vocabulary + self.positions + 4) * self.width + self.layers * self.layer_parameters


BERT_BASE = EncoderShape(layers=12, width=768, feed_forward=3072, vocabulary=30522, positions=512)


@dataclass
class Missing:
    """What a plan did not find; a run would refuse to start, a plan goes on without it."""

    lines: list[str]

    def instead(self, value: Found, look: Callable[[], Found], note: str) -> Found:
        """What `look` finds, or `value` and a line that says so."""
        try:
            return look()
        except LodestarError as error:
            self.lines.append(f"{error}; {note}")
            return value


def encoder_shape(model: Model, missing: Missing) -> EncoderShape:
    """The shape in the encoder's folder, or in the hub's cache on this machine, or else BERT-base's."""
    return missing.instead(BERT_BASE, lambda: _shape_in(model), "memory is estimated for BERT-base")


def _shape_in(model: Model) -> EncoderShape:
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


@dataclass(frozen=True)
class Memory:
    """Bytes on one device at the peak, by what they are for."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    embeddings: int = 0
    tile: int = 0

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


def memory(
    shape: EncoderShape,
    *,
    engine: Engine,
    world_size: int,
    precision: str,
    tokens_at_once: int,
    extra_layers: int = 0,
    checkpointing: bool = False,
    embeddings: int = 0,
    tile: int = 0,
) -> Memory:
    """tokens_at_once: of one micro-batch, padding included; extra_layers: a decoder's; embeddings, tile: bytes."""
    parameters = shape.parameters + extra_layers * shape.layer_parameters
    stage = engine.zero_stage if engine.kind == "deepspeed" else 0
    share = [1 if stage < least else world_size for least in (3, 2, 1)]
    halved = 2 if precision == "fp32" else 1
    per_token = 34 * halved * shape.width
    layers = shape.layers + extra_layers
    kept = (2 * halved * shape.width * layers + per_token) if checkpointing else per_token * layers
    casts = 0 if precision == "fp32" else 2 * parameters
    return Memory(
        weights=4 * parameters // share[0] + casts,
        gradients=4 * parameters // share[1],
        optimizer=8 * parameters // share[2],
        activations=tokens_at_once * kept,
        embeddings=embeddings,
        tile=tile,
    )


def rows_and_steps(
    train: Sequence[str], schedule: Schedule, global_size: int, missing: Missing
) -> tuple[int | None, int | None]:
    """(rows, steps), as far as they can be known without reading more than lines."""
    rows = missing.instead(None, lambda: count_rows(find_sources(train)), "rows are not known")
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
    run: Run,
    batch: Batch,
    schedule: Schedule,
    world_size: int,
    rows: int | None,
    steps: int | None,
    memory: Memory,
    missing: Missing,
    **more: Any,
) -> dict[str, Any]:
    """The plan as one object, ready for JSON."""
    plan = BatchPlan(batch.global_size, world_size, batch.micro_size)
    shares = plan.rows_per_rank
    return {
        "output_dir": run.output_dir,
        "state": state_of(run.output_dir),
        "world_size": world_size,
        "global_size": batch.global_size,
        "micro_size": batch.micro_size,
        "rows_per_rank": shares,
        "chunks_per_rank": plan.passes,
        "imbalance": max(shares) * world_size / batch.global_size - 1,
        "rows": rows,
        "steps": steps,
        "warmup_steps": None if steps is None else schedule.warmup_steps(steps),
        **more,
        "peak_memory_bytes": memory.total,
        "memory": asdict(memory),
        "missing": missing.lines,
    }


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
        elif key.endswith("_bytes"):
            key, value = key.removesuffix("_bytes"), f"{value / 2**30:.2f} GiB (estimated)"
        elif value is None:
            value = "not known without reading the data"
        elif isinstance(value, float):
            value = f"{value:.2%}"
        elif isinstance(value, int):
            value = f"{value:,}"
        lines.append(f"{key.replace('_', ' '):<22} {value}")
    return "\n".join(lines)
