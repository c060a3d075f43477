"""Checkpoints that are whole or absent, of named fp32 tensors that do not depend on how many ranks wrote them.

A checkpoint is a folder `step-00000100` of safetensors and JSON, written beside its place and renamed into it;
manifest.json, written last, holds size and SHA-256 of every other file, and nothing is read before it has been checked.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from lodestar.errors import CheckpointError
from lodestar.files import MANIFEST, damage, sync, write_manifest

NEEDED = ("state.json", "weights.safetensors", "optimizer.safetensors")
_NAME = re.compile(r"step-(\d{8,})")
ARCHIVED = "archived-"
_NOT_RENAMED = (".", ARCHIVED, "replaced-")  # the last as versions before 0.2 named archived ones


def write(
    directory: Path, step: int, *, tensors: Mapping[str, Mapping[str, Tensor]], values: Mapping[str, Any]
) -> Path:
    """Commit a checkpoint: `NAME.safetensors` for each group of tensors, and `state.json` with the values."""
    final = directory / f"step-{step:08d}"
    tmp = directory / f".{final.name}.tmp"
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir(parents=True)
    for name, group in tensors.items():
        save_file({key: value.contiguous() for key, value in group.items()}, tmp / f"{name}.safetensors")
    (tmp / "state.json").write_text(json.dumps({"step": step, **values}, indent=2), encoding="utf-8")
    write_manifest(tmp, step=step)
    shutil.rmtree(final, ignore_errors=True)
    tmp.rename(final)
    sync(directory)
    return final


def read(folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """(tensors by group, values) of a checkpoint, once every file has been checked against the manifest."""
    wrong, values = damage(folder, NEEDED), {}
    if wrong is None:
        values = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        if json.loads((folder / MANIFEST).read_text(encoding="utf-8")).get("step") != values["step"]:
            wrong = f"{MANIFEST}: of another step than state.json"
    if wrong is not None:
        raise CheckpointError(
            f"checkpoint.resume: {folder}: {wrong} (name a whole step-... folder, or delete it to go on from the one "
            "before)"
        )
    return {Path(n).stem: load_file(folder / n) for n in NEEDED if n.endswith(".safetensors")}, values


def with_new_names(tensors: Mapping[str, Tensor], new_names: Mapping[str, str]) -> dict[str, Tensor]:
    """Tensors whose names begin as a key of `new_names` does, under the names that they have today."""
    found = {}
    for name, tensor in tensors.items():
        before = next((each for each in new_names if name.startswith(each)), "")
        found[new_names.get(before, "") + name[len(before) :]] = tensor
    return found


def steps(directory: Path) -> list[int]:
    """Steps of the committed checkpoints in a folder, ascending; temporary files are not looked at."""
    return [step for step, folder in _named(directory) if (folder / MANIFEST).is_file()]


def _named(directory: Path) -> list[tuple[int, Path]]:
    """(step, folder) by the names of folders, ascending, whatever they hold."""
    if not directory.is_dir():
        return []
    matches = [(_NAME.fullmatch(path.name), path) for path in directory.iterdir() if path.is_dir()]
    return sorted((int(match[1]), path) for match, path in matches if match)


def find(directory: Path, resume: str) -> tuple[Path | None, list[str]]:
    """The checkpoint to go on from, if any, and a line for each damaged one that was passed over.

    Raises CheckpointError where there are checkpoints and none of them is valid: starting afresh would be a loss.
    """
    if resume == "none":
        return None, []
    if resume != "auto":
        return Path(resume), []
    passed: list[str] = []
    for step, folder in reversed(_named(directory)):
        wrong = damage(folder, NEEDED, step=step)
        if wrong is None:
            return folder, [f"{line} (delete it: an earlier checkpoint serves)" for line in passed]
        passed.append(f"{folder}: {wrong}")
    passed += [f"{folder}: not named step-..., as a checkpoint is" for folder in _renamed(directory)]
    if passed:
        raise CheckpointError(
            f"checkpoint.resume: {directory}: no valid checkpoint: {'; '.join(passed)} "
            "(restore one of them, or start afresh with checkpoint.resume=none)"
        )
    return None, []


def _renamed(directory: Path) -> list[Path]:
    """Folders that hold what a checkpoint holds under other names; neither unfinished nor archived ones."""
    if not directory.is_dir():
        return []
    others = (path for path in directory.iterdir() if path.is_dir() and not _NAME.fullmatch(path.name))
    return sorted(
        path
        for path in others
        if not path.name.startswith(_NOT_RENAMED) and any((path / name).exists() for name in (MANIFEST, *NEEDED))
    )


def archive(directory: Path, above: int) -> list[str]:
    """Rename the checkpoints above a step, which a run that starts there would take for its own; their new names."""
    names = []
    for step, folder in _named(directory):
        if step > above:
            name = f"{ARCHIVED}{folder.name}"
            shutil.rmtree(directory / name, ignore_errors=True)
            folder.rename(directory / name)
            names.append(name)
    return names


def prune(directory: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints."""
    for step in steps(directory)[:-keep]:
        shutil.rmtree(directory / f"step-{step:08d}", ignore_errors=True)
