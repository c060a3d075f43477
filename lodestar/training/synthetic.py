"""A run on generated text of the longest shapes."""

from __future__ import annotations

import json
import random
import string
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from shutil import rmtree
from typing import Any

import torch
from torch import Tensor

from lodestar.distributed.collectives import agreed, once_per_node
from lodestar.distributed.runtime import Runtime
from lodestar.training.task import TaskSpec, TrainingTask


def generated_text(tokens: int, number: int) -> str:
    """Letters, each a word and so a token to nearly every tokenizer; `number` makes it like no other."""
    return " ".join(random.Random(number).choices(string.ascii_lowercase, k=max(1, tokens)))


@dataclass(frozen=True)
class LongestFirst:
    """Rows in the order in which they were generated: a batch of the longest first, then always the second batch."""

    global_size: int

    def batch(self, number: int, part: range) -> tuple[Tensor, Tensor]:
        """As `lodestar.data.sampler.ShuffledSampler`."""
        rows = torch.arange(part.start, part.stop) + min(number, 1) * self.global_size
        return torch.zeros_like(rows), rows


Trial = tuple[Any, TrainingTask]
"""A recipe, and what its stage has task."""


@contextmanager
def generated(recipe: Any, runtime: Runtime, spec: TaskSpec, *, micro_size: int, steps: int) -> Iterator[Trial]:
    """A run like the recipe's on generated rows: a batch of the longest, then one of all lengths.

    Nothing else is touched: it lives in a folder of its own in run.output_dir, which is gone afterwards.
    """
    folder = Path(recipe.run.output_dir) / f"rehearsal-{runtime.rank - runtime.local_rank}"  # each node its own
    size, file = recipe.batch.global_size, folder / "rows.jsonl"

    def write() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        lengths = [1.0] * size + [1 - i % 8 / 8 for i in range(size)]
        with file.open("w", encoding="utf-8") as lines:
            lines.writelines(json.dumps(spec.generate(recipe, each, i)) + "\n" for i, each in enumerate(lengths))

    try:
        once_per_node(lambda: write() if runtime.local_rank == 0 else None, runtime.local_rank)
        on_disk = {"train": [str(file)], "cache_dir": str(folder / "cache"), "streaming": False, "field": "text"}
        on_disk |= {"long_texts": "cut"}
        known = type(recipe.data).model_fields
        made = recipe.model_copy(
            update={
                "run": recipe.run.model_copy(update={"output_dir": str(folder / "run")}),
                "data": recipe.data.model_copy(update={k: v for k, v in on_disk.items() if k in known}),
                "batch": recipe.batch.model_copy(update={"micro_size": micro_size}),
                "schedule": recipe.schedule.model_copy(update={"steps": steps, "epochs": None}),
                "evaluate": type(recipe.evaluate)(),
            }
        )
        with agreed():
            task = spec.build_task(made, runtime)
        yield made, replace(task, collate=_in_generated_order(task.collate, size))
    finally:
        if runtime.local_rank == 0:
            rmtree(folder, ignore_errors=True)
            with suppress(OSError):  # it holds a run, or another node's rehearsal
                folder.parent.rmdir()


def _in_generated_order(collate: Any, size: int) -> Any:
    """`collate` over rows as they were generated; fine-tuning holds them as one data set of a mixture."""
    order = LongestFirst(size)
    if hasattr(collate, "sets"):
        return replace(collate, sets=[replace(collate.sets[0], order=order)])
    return replace(collate, order=order)
