"""A checkpoint is whole or absent, and nothing damaged is read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from chassis import checkpoint
from chassis.errors import CheckpointError

TENSORS = {"weights": {"a": torch.arange(6.0).view(2, 3)}, "optimizer": {"a:exp_avg": torch.ones(2, 3)}}


def write(directory: Path, step: int) -> Path:
    return checkpoint.write(directory, step, tensors=TENSORS, values={"skipped": 2, "seed": 7})


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    folder = write(tmp_path, 12)
    assert folder.name == "step-00000012" and (folder / "manifest.json").is_file()
    tensors, values = checkpoint.read(folder)
    assert tensors["weights"]["a"].equal(TENSORS["weights"]["a"]) and set(tensors) == {"weights", "optimizer"}
    assert values == {"step": 12, "skipped": 2, "seed": 7}


def test_the_newest_is_found_and_the_oldest_go(tmp_path: Path) -> None:
    for step in (5, 10, 15):
        write(tmp_path, step)
    assert checkpoint.find(tmp_path, "auto") == (tmp_path / "step-00000015", [])
    assert checkpoint.find(tmp_path, "none") == (None, [])
    checkpoint.prune(tmp_path, 2)
    assert checkpoint.steps(tmp_path) == [10, 15]


@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
def test_one_flipped_bit_is_found_and_the_one_before_serves(name: str, tmp_path: Path) -> None:
    write(tmp_path, 5)
    folder = write(tmp_path, 10)
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=name):
        checkpoint.read(folder)
    found, passed = checkpoint.find(tmp_path, "auto")
    assert found == tmp_path / "step-00000005" and len(passed) == 1 and name in passed[0]


@pytest.mark.parametrize("name", ["weights.safetensors", "state.json"])
def test_a_missing_file_is_named(name: str, tmp_path: Path) -> None:
    folder = write(tmp_path, 5)
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name}: missing"):
        checkpoint.read(folder)


def test_a_draft_is_no_checkpoint(tmp_path: Path) -> None:
    write(tmp_path, 5)
    write(tmp_path, 10).rename(tmp_path / ".step-00000010.draft")
    (tmp_path / "step-00000020").mkdir()  # no manifest: torn
    assert checkpoint.steps(tmp_path) == [5]
    assert write(tmp_path, 10).is_dir() and checkpoint.steps(tmp_path) == [5, 10]


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    write(tmp_path, 5)
    with pytest.raises(TypeError):
        checkpoint.write(tmp_path, 5, tensors=TENSORS, values={"bad": object()})
    assert checkpoint.read(tmp_path / "step-00000005")[1]["seed"] == 7
