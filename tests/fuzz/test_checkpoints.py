"""Random damage to a run's checkpoints: all of it is found, and the newest whole checkpoint is taken."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from lodestar.errors import CheckpointError
from lodestar.training import checkpoint
from tests.fuzz.mutate import mutate_bytes, mutate_value

STEPS = (5, 10, 15)
NAMES = ("manifest.json", "state.json", "weights.safetensors", "optimizer.safetensors")

KINDS = (
    "bit", "bytes", "cut", "longer", "empty", "missing", "swapped", "swapped folder", "json", "link", "fifo", "nested",
    "folder instead of a file", "renamed", "no files", "outside", "forged",
)  # fmt: skip


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """The checkpoints of a run, three that differ in every file."""
    for step in STEPS:
        tensors = {
            group: {f"layer.{i}{suffix}": torch.full((3, 4), step + i / 7) for i in range(3)}
            for group, suffix in (("weights", ""), ("optimizer", ":exp_avg"))
        }
        values = {"skipped": step, "masked": 0, "engine": {"loss_scale": 1.0 * step}, "recipe": {"optim.lr": 1e-3}}
        checkpoint.write(tmp_path / "whole", step, tensors=tensors, values=values)
    return tmp_path / "whole"


def damaged(folder: Path, others: list[Path], rng: random.Random) -> str:
    """Damage one file of a checkpoint, or the folder itself; returns what was done."""
    file, other = folder / rng.choice(NAMES), rng.choice(others)
    content = file.read_bytes()
    kind = rng.choice(KINDS)
    manifest: dict[str, Any] = json.loads((folder / NAMES[0]).read_bytes())
    if kind == "bit":
        at = rng.randrange(len(content))
        file.write_bytes(content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :])
    elif kind == "bytes":
        while (changed := mutate_bytes(content, rng)) == content:
            pass
        file.write_bytes(changed)
    elif kind == "cut":
        file.write_bytes(content[: rng.randrange(len(content))])
    elif kind == "longer":
        file.write_bytes(content + rng.choice([b"\n", b" ", b"\0", b"{}"]))
    elif kind == "empty":
        file.write_bytes(b"")
    elif kind == "swapped":
        shutil.copyfile(other / file.name, file)
    elif kind == "swapped folder":
        shutil.rmtree(folder)
        shutil.copytree(other, folder)
    elif kind == "json":
        file = folder / rng.choice(NAMES[:2])
        other_values = mutate_value(json.loads(file.read_bytes()), rng, list(manifest))
        file.write_text(rng.choice([json.dumps(other_values), "[]", "null", "{}", '{"step": 5}', "3", '"x"']))
    elif kind == "nested":
        (folder / rng.choice(NAMES[:2])).write_text("[" * 200_000)
    elif kind == "no files":
        (folder / NAMES[0]).write_text(json.dumps({**manifest, "files": {}}, indent=2))
    elif kind == "outside":
        elsewhere = f"../{other.name}/{file.name}"
        (folder / NAMES[0]).write_text(json.dumps({**manifest, "files": {**manifest["files"], elsewhere: {}}}))
    elif kind == "forged":  # as a manifest of version 0.1, which had no hash
        entry = {"bytes": 3, "sha256": "0" * 64}
        content = {"format": 1, "step": manifest["step"], "files": {**manifest["files"], "../x": entry}}
        (folder / NAMES[0]).write_text(json.dumps(content, indent=2))
    elif kind == "renamed":
        folder.rename(folder.with_name(f"step-{rng.randrange(20, 99):08d}"))
    else:
        file.unlink()
        if kind == "link":
            file.symlink_to(rng.choice([other / file.name, Path("/nowhere"), Path("/dev/zero")]))
        elif kind == "fifo":
            os.mkfifo(file)
        elif kind == "folder instead of a file":
            file.mkdir()
    return f"{kind} {folder.name}/{file.name}"


def fuzz(whole: Path, cases: int, seed: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """Damage one to three checkpoints, `cases` times; returns how many times all of it was found."""
    rng, opened, found = random.Random(seed), list[Path](), 0
    load_file = checkpoint.load_file
    monkeypatch.setattr(checkpoint, "load_file", lambda path: opened.append(Path(path).parent) or load_file(path))
    copy = whole.with_name("copy")
    for case in range(cases):
        shutil.copytree(whole, copy)
        names = sorted(path.name for path in whole.iterdir())
        broken = set(rng.sample(names, rng.choice([1, 1, 2, 3])))
        done = [
            damaged(copy / name, [whole / other for other in names if other != name], rng) for name in sorted(broken)
        ]
        expected = max(set(names) - broken, default=None)
        told = f"seed {seed}, case {case}: {done}"
        opened.clear()
        try:
            taken, warnings = checkpoint.find(copy, "auto")
            assert taken is not None and taken == copy / str(expected), told
            assert len(warnings) == len([name for name in broken if name > str(expected)]) or "renamed" in told, told
            checkpoint.read(taken)
            lines = warnings
        except CheckpointError as error:
            assert expected is None, f"{told}: {error}"
            lines = [str(error)]
        for folder in copy.iterdir():
            if folder.name in broken or folder.name not in names:
                with pytest.raises(CheckpointError):
                    checkpoint.read(folder)
        assert set(opened) <= {copy / str(expected)}, told
        assert all("\n" not in line and line.endswith(")") and len(line) < 1500 for line in lines), f"{told}: {lines}"
        found += 1
        shutil.rmtree(copy)
    return found


def test_damage_to_checkpoints_is_found_and_the_newest_whole_one_is_taken(
    whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fuzz(whole, 60, 1, monkeypatch) == 60


@pytest.mark.slow
def test_500_damages_to_checkpoints_are_found(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fuzz(whole, 500, 2, monkeypatch) == 500
