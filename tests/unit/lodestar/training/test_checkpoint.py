"""A checkpoint is whole or absent, and nothing damaged is read."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import torch

from lodestar import files
from lodestar.errors import CheckpointError
from lodestar.files import write_manifest
from lodestar.training import checkpoint

TENSORS = {"weights": {"a": torch.arange(6.0).view(2, 3)}, "optimizer": {"a:exp_avg": torch.ones(2, 3)}}


def write(directory: Path, step: int) -> Path:
    return checkpoint.write(directory, step, tensors=TENSORS, values={"skipped": 2, "seed": 7})


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    folder = write(tmp_path, 12)
    assert folder.name == "step-00000012" and (folder / "manifest.json").is_file()
    tensors, values = checkpoint.read(folder)
    assert tensors["weights"]["a"].equal(TENSORS["weights"]["a"]) and set(tensors) == {"weights", "optimizer"}
    assert values == {"step": 12, "skipped": 2, "seed": 7}


def test_the_newest_is_found_and_the_oldest_are_deleted(tmp_path: Path) -> None:
    for step in (5, 10, 15):
        write(tmp_path, step)
    assert checkpoint.find(tmp_path, "auto") == (tmp_path / "step-00000015", [])
    assert checkpoint.find(tmp_path, "none") == (None, [])
    checkpoint.prune(tmp_path, 2)
    assert checkpoint.steps(tmp_path) == [10, 15]


@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
def test_one_flipped_bit_is_detected_and_the_checkpoint_before_is_used(name: str, tmp_path: Path) -> None:
    write(tmp_path, 5)
    folder = write(tmp_path, 10)
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=name):
        checkpoint.read(folder)
    resumed_from, warnings = checkpoint.find(tmp_path, "auto")
    assert resumed_from == tmp_path / "step-00000005" and len(warnings) == 1 and name in warnings[0]


@pytest.mark.parametrize("name", ["weights.safetensors", "state.json"])
def test_a_missing_file_is_named(name: str, tmp_path: Path) -> None:
    folder = write(tmp_path, 5)
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name}: missing"):
        checkpoint.read(folder)


def test_an_unfinished_checkpoint_is_none(tmp_path: Path) -> None:
    write(tmp_path, 5)
    write(tmp_path, 10).rename(tmp_path / ".step-00000010.tmp")
    (tmp_path / "step-00000020").mkdir()  # no manifest: incomplete
    assert checkpoint.steps(tmp_path) == [5]
    assert write(tmp_path, 10).is_dir() and checkpoint.steps(tmp_path) == [5, 10]


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    write(tmp_path, 5)
    with pytest.raises(TypeError):
        checkpoint.write(tmp_path, 5, tensors=TENSORS, values={"bad": object()})
    assert checkpoint.read(tmp_path / "step-00000005")[1]["seed"] == 7


def damage(folder: Path, kind: str) -> None:
    manifest = folder / "manifest.json"
    content = json.loads(manifest.read_text())
    if kind == "missing":
        manifest.unlink()
    elif kind == "emptied":
        manifest.write_text("")
    elif kind == "an empty object":
        manifest.write_text("{}")
    elif kind == "no files":
        manifest.write_text(json.dumps({**content, "files": {}}))
    elif kind == "of another step":
        manifest.write_text(json.dumps({**content, "step": 3}))
    elif kind == "renamed":
        folder.rename(folder.with_name(f"old-{folder.name}"))
    else:
        (folder / "weights.safetensors").unlink()


DAMAGES = ("missing", "emptied", "an empty object", "no files", "of another step", "renamed", "no weights")


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_afresh(kind: str, tmp_path: Path) -> None:
    for step in (5, 10):
        damage(write(tmp_path, step), kind)
    with pytest.raises(CheckpointError, match=r"no valid checkpoint.*checkpoint\.resume=none") as caught:
        checkpoint.find(tmp_path, "auto")
    assert "step-00000005" in str(caught.value) and "step-00000010" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert checkpoint.find(tmp_path, "none") == (None, [])


@pytest.mark.parametrize("kind", [kind for kind in DAMAGES if kind != "renamed"])
def test_a_damaged_checkpoint_is_skipped_for_the_one_before(kind: str, tmp_path: Path) -> None:
    write(tmp_path, 5)
    damage(write(tmp_path, 10), kind)
    resumed_from, warnings = checkpoint.find(tmp_path, "auto")
    assert resumed_from == tmp_path / "step-00000005" and len(warnings) == 1 and "step-00000010" in warnings[0]


def test_neither_unfinished_nor_archived_checkpoints_keep_a_run_from_starting(tmp_path: Path) -> None:
    write(tmp_path, 5).rename(tmp_path / ".step-00000005.tmp")
    write(tmp_path, 10)
    checkpoint.archive(tmp_path, 0)
    assert checkpoint.find(tmp_path, "auto") == (None, [])


@pytest.mark.parametrize("state", ["[]", "3", "{}", '{"step": "5"}', '{"step": 5, "skipped": null}', "[" * 200_000])
def test_a_state_of_another_shape_is_damage_though_its_hash_is_right(state: str, tmp_path: Path) -> None:
    write(tmp_path, 4)
    folder = write(tmp_path, 5)
    (folder / "manifest.json").unlink()
    (folder / "state.json").write_text(state)
    write_manifest(folder, step=5)
    with pytest.raises(CheckpointError, match=r"step-00000005: (state|manifest)\.json: .* \(name a whole"):
        checkpoint.read(folder)
    resumed_from, warnings = checkpoint.find(tmp_path, "auto")
    assert resumed_from == tmp_path / "step-00000004" and len(warnings) == 1


def test_tensors_that_are_none_are_an_error(tmp_path: Path) -> None:
    folder = write(tmp_path, 5)
    (folder / "manifest.json").unlink()
    (folder / "weights.safetensors").write_bytes(b"not tensors")
    write_manifest(folder, step=5)
    with pytest.raises(CheckpointError, match="tensors cannot be read"):
        checkpoint.read(folder)


def test_a_renamed_checkpoint_is_an_error_also_where_it_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path, 5).rename(tmp_path / "step-00000007")
    with pytest.raises(CheckpointError, match="step is 5, not 7"):
        checkpoint.read(folder)


def test_only_valid_checkpoints_count_as_kept(tmp_path: Path) -> None:
    for step in (5, 10, 15, 20):
        write(tmp_path, step)
    (tmp_path / ".step-00000007.tmp").mkdir()  # of a save that was killed
    for step in (10, 20):
        damage(tmp_path / f"step-{step:08d}", "no weights")
    checkpoint.prune(tmp_path, 3)
    assert checkpoint.steps(tmp_path) == [5, 10, 15, 20] and not (tmp_path / ".step-00000007.tmp").exists()
    checkpoint.prune(tmp_path, 2)
    assert checkpoint.steps(tmp_path) == [5, 10, 15, 20]  # two are valid
    checkpoint.prune(tmp_path, 1)
    assert checkpoint.steps(tmp_path) == [15, 20]  # the damaged one neither counts nor goes: nothing older is needed
    damage(tmp_path / "step-00000015", "no weights")
    checkpoint.prune(tmp_path, 1)
    assert checkpoint.steps(tmp_path) == [15, 20]


@pytest.fixture
def hashing(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the checkpoints whose files were hashed, as often as they were."""
    names: list[str] = []
    damage_of = checkpoint.damage
    monkeypatch.setattr(
        checkpoint, "damage", lambda folder, *args, **kw: names.append(folder.name) or damage_of(folder, *args, **kw)
    )
    return names


def test_a_save_hashes_no_older_checkpoint_again_unless_it_changed(tmp_path: Path, hashing: list[str]) -> None:
    hashed: checkpoint.Hashed = {}
    for step in (5, 10, 15):
        checkpoint.write(tmp_path, step, tensors=TENSORS, values={}, hashed=hashed)
        checkpoint.prune(tmp_path, 2, hashed)
    assert checkpoint.steps(tmp_path) == [10, 15] and not hashing
    assert set(hashed) == {tmp_path / f"step-{step:08d}" for step in (10, 15)}
    (tmp_path / "step-00000010/state.json").write_text("{}")
    checkpoint.prune(tmp_path, 2, hashed)
    assert hashing == ["step-00000010"]


def test_a_resume_hashes_its_checkpoint_once(tmp_path: Path, hashing: list[str]) -> None:
    newest = write(tmp_path, 5)
    hashed: checkpoint.Hashed = {}
    assert checkpoint.find(tmp_path, "auto", hashed) == (newest, [])
    checkpoint.read(newest, hashed)
    checkpoint.prune(tmp_path, 2, hashed)
    assert hashing == ["step-00000005"]
    (newest / "weights.safetensors").write_bytes(b"changed since")
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoint.read(newest, hashed)


def test_a_process_that_is_killed_in_a_save_leaves_a_whole_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is on the disk at each moment at which a file of it is synced, or an older one deleted."""
    moments: list[Path] = []

    def photograph(*_: object, **__: object) -> None:
        moments.append(shutil.copytree(run, tmp_path / f"moment-{len(moments)}"))

    run = tmp_path / "run"
    write(run, 5)
    write(run, 10)
    monkeypatch.setattr(files, "sync", photograph)
    rmtree = shutil.rmtree
    monkeypatch.setattr(checkpoint.shutil, "rmtree", lambda *args, **kw: (photograph(), rmtree(*args, **kw)))
    checkpoint.write(run, 15, tensors=TENSORS, values={})
    checkpoint.prune(run, 1)
    monkeypatch.undo()
    found = [checkpoint.find(moment, "auto")[0] for moment in moments]
    newest = [int(checkpoint.read(folder)[1]["step"]) for folder in found if folder is not None]
    assert len(newest) == len(moments) > 8 and newest == sorted(newest) and set(newest) == {10, 15}


def test_no_random_mutation_of_a_checkpoint_is_read(tmp_path: Path) -> None:
    """Bits, cuts and swaps anywhere, the manifest included; a quarter of a second for a hundred."""
    whole, other = write(tmp_path, 5), write(tmp_path / "other", 5)
    (other / "state.json").write_text(json.dumps({"step": 5, "skipped": 3, "seed": 7}))
    draw = random.Random(0)
    names = sorted(path.name for path in whole.iterdir())
    num_damaged = 0
    for _ in range(100):
        name = draw.choice(names)
        content = (whole / name).read_bytes()
        changed = bytearray(content)
        kind = draw.choice(["bit", "cut", "empty", "swap"])
        if kind == "bit":
            changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
        elif kind == "cut":
            del changed[draw.randrange(len(changed)) :]
        elif kind == "empty":
            changed.clear()
        else:
            changed = bytearray((other / name).read_bytes())
        (whole / name).write_bytes(changed)
        if bytes(changed) != content:
            num_damaged += 1
            with pytest.raises(CheckpointError):
                checkpoint.find(tmp_path, "auto")
            with pytest.raises(CheckpointError):
                checkpoint.read(whole)
        (whole / name).write_bytes(content)
    assert num_damaged > 70 and checkpoint.find(tmp_path, "auto") == (whole, [])
