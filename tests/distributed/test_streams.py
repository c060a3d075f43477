"""A streamed run has the same batches at any world size and number of loader workers, and wherever it resumes."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path
from typing import Any

import pytest

from lodestar.distributed.collectives import barrier
from lodestar.distributed.testing import run_world
from tests import tiny
from tests.distributed import steps

Text = tuple[int, ...]


def streamed(rank: int, size: int, stage: str, folder: Path, start: int, total: int, *overrides: str) -> list[Any]:
    """For each step from `start` on, this rank's texts as token ids, and the hash of its examples."""
    multiprocessing.set_start_method("fork", force=True)  # of loader workers; a forkserver's children have another one
    run_recipe = steps.recipe(stage, folder, "data.streaming=true", f"schedule.steps={total}", *overrides)
    task, _ = steps.built_task(run_recipe, rank, size)
    done = []
    for batch in task.batches(start):
        done.append((texts(batch), batch.examples_hash))
        barrier()  # as a training step is
    if rank == 0 and start == 0:
        assert task.data_counts["rows"] == 40 and task.data_counts["dropped"] == 0
    return done


def texts(batch: Any) -> list[Text]:
    """Without padding and fillers."""
    name = "input_ids" if "input_ids.0" in batch.tensors.places else "ids"
    found: list[Text] = []
    for i in range(batch.num_micro_batches):
        is_filler = not batch.is_real[i] if name == "ids" else not len(batch.tensors[f"decoder_index.{i}"])
        rows = zip(batch.tensors[f"{name}.{i}"].tolist(), batch.tensors[f"lengths.{i}"].tolist(), strict=True)
        found += [] if is_filler else [tuple(ids[:length]) for ids, length in rows]
    return found


def of_all_ranks(outcomes: list[list[Any]]) -> list[tuple[list[Text], int]]:
    """The texts of each step, sorted, and the hash of its examples."""
    return [
        (sorted(text for rank in ranks for text in rank[0]), sum(rank[1] for rank in ranks) % 2**64)
        for ranks in zip(*outcomes, strict=True)
    ]


LAST = 67
"""In the second window of 64 batches."""


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_batches_of_a_stream_are_the_same_at_any_world_size_and_wherever_it_resumes(stage: str, tmp_path: Path) -> None:
    def batches(size: int, start: int, *overrides: str) -> list[tuple[list[Text], int]]:
        return of_all_ranks(run_world(streamed, size, stage, tmp_path, start, LAST, *overrides))

    whole = batches(1, 0)
    assert len(whole) == LAST and len({examples_hash for _, examples_hash in whole}) == LAST
    assert whole[0][0] != whole[1][0]
    starts = json.loads((tmp_path / "runs" / stage / "stream.json").read_text())["values"]["starts"]
    assert {"1", "2"} <= starts.keys()
    assert batches(2, 62, "data.workers=2") == whole[62:]
    assert batches(2, 65) == whole[65:]  # from the start of the second window
    (tmp_path / "runs" / stage / "stream.json").unlink()
    assert batches(1, 65, "data.workers=2") == whole[65:]  # which is not known any more
    assert batches(1, 65, "run.seed=8") != whole[65:]
    assert not [*(tmp_path / "cache").glob(".stream*")]


def test_split_texts_and_two_data_sets_are_streamed(tmp_path: Path) -> None:
    tiny.finetune_file(tmp_path / "second.jsonl", 30)
    mixed = f"data.train=[{tmp_path}/finetune.jsonl, {{path: {tmp_path}/second.jsonl, weight: 2}}]"
    for stage, *overrides in (
        ("pretrain", "data.long_texts=split", "model.max_length=12"),
        ("finetune", mixed),
    ):
        steps.recipe(stage, tmp_path)
        whole, resumed = (
            of_all_ranks(run_world(streamed, size, stage, tmp_path, start, 6, "data.workers=2", *overrides))
            for size, start in ((2, 1), (1, 3))
        )
        assert whole[2:] == resumed and whole[:1] != resumed[:1]
