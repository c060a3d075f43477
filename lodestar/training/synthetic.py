"""Training on generated text of maximum length."""

from __future__ import annotations

import json
import random
import string
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from shutil import rmtree

import torch
from torch import Tensor

from lodestar.data.sampler import ShuffledSampler
from lodestar.distributed.collectives import agreed, once_per_node
from lodestar.distributed.runtime import Runtime
from lodestar.training.task import Recipe, TaskSpec, TrainingTask


def generated_text(tokens: int, index: int) -> str:
    """Single letters, each a word and with nearly all tokenizers a token; different for each index."""
    return " ".join(random.Random(index).choices(string.ascii_lowercase, k=max(1, tokens)))


class LongestFirst(ShuffledSampler):
    """Rows in the order in which they were generated: a batch of the longest first, then always the second batch."""

    def batch(self, index: int, positions: range) -> tuple[Tensor, Tensor]:
        rows = torch.arange(positions.start, positions.stop) + min(index, 1) * self.global_size
        return torch.zeros_like(rows), rows


@contextmanager
def synthetic_task(
    recipe: Recipe, runtime: Runtime, spec: TaskSpec[Recipe], *, steps: int
) -> Generator[tuple[Recipe, TrainingTask]]:
    """The recipe and its task on generated rows: a batch of the longest, then one of all lengths.

    Files are written to a temporary folder in run.output_dir, which is deleted at the end.
    """
    folder = Path(recipe.run.output_dir) / f"rehearsal-{runtime.rank - runtime.local_rank}"  # one for each node
    size, file = recipe.batch.global_size, folder / "rows.jsonl"

    def write() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        fractions = [1.0] * size + [1 - i % 8 / 8 for i in range(size)]
        with file.open("w", encoding="utf-8") as lines:
            for index, fraction in enumerate(fractions):
                lines.write(json.dumps(spec.synthetic_row(recipe, fraction, index)) + "\n")

    try:
        once_per_node(lambda: write() if runtime.local_rank == 0 else None, runtime.local_rank)
        synthetic = spec.with_training_file(recipe, file, folder / "cache").model_copy(
            update={
                "run": recipe.run.model_copy(update={"output_dir": str(folder / "run")}),
                "schedule": recipe.schedule.model_copy(update={"steps": steps, "epochs": None}),
                "evaluate": type(recipe.evaluate)(),
            }
        )
        with agreed():
            task = spec.build_task(synthetic, runtime, LongestFirst)
        yield synthetic, task
    finally:
        if runtime.local_rank == 0:
            rmtree(folder, ignore_errors=True)
            with suppress(OSError):  # the folder has a run, or another node's dry run
                folder.parent.rmdir()
