"""Checkpoints that are whole or absent, of named fp32 tensors that do not depend on the number of ranks.

A checkpoint is a folder `step-00000100` of safetensors and JSON, written under a temporary name and then renamed.
manifest.json, written last, has size and SHA-256 of every other file; they are checked before anything is read.
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

REQUIRED_FILES = ("state.json", "weights.safetensors", "optimizer.safetensors")
_NAME = re.compile(r"step-(\d{8,})")
ARCHIVED = "archived-"
_IGNORED_PREFIXES = (".", ARCHIVED, "replaced-")  # the last: archived by versions before 0.2


def write(
    directory: Path, step: int, *, tensors: Mapping[str, Mapping[str, Tensor]], values: Mapping[str, Any]
) -> Path:
    """Commit a checkpoint: `GROUP.safetensors` for each group of tensors, and `state.json` with the values."""
    folder = directory / f"step-{step:08d}"
    tmp = directory / f".{folder.name}.tmp"
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir(parents=True)
    for name, group in tensors.items():
        save_file({key: value.contiguous() for key, value in group.items()}, tmp / f"{name}.safetensors")
    (tmp / "state.json").write_text(json.dumps({"step": step, **values}, indent=2), encoding="utf-8")
    write_manifest(tmp, step=step)
    shutil.rmtree(folder, ignore_errors=True)
    tmp.rename(folder)
    sync(directory)
    return folder


def read(folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """(tensors by group, values) of a checkpoint; CheckpointError where a file does not match the manifest."""
    problem, values = damage(folder, REQUIRED_FILES), {}
    if problem is None:
        values = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        if json.loads((folder / MANIFEST).read_text(encoding="utf-8")).get("step") != values["step"]:
            problem = f"{MANIFEST}: of another step than state.json"
    if problem is not None:
        raise CheckpointError(
            f"checkpoint.resume: {folder}: {problem} (name a whole step-... folder, or delete it to resume from the "
            "one before)"
        )
    return {Path(n).stem: load_file(folder / n) for n in REQUIRED_FILES if n.endswith(".safetensors")}, values


def with_new_names(tensors: Mapping[str, Tensor], new_names: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors, renamed where a name starts with a key of `new_names`: that prefix becomes the key's value."""
    renamed = {}
    for name, tensor in tensors.items():
        prefix = next((prefix for prefix in new_names if name.startswith(prefix)), "")
        renamed[new_names.get(prefix, "") + name.removeprefix(prefix)] = tensor
    return renamed


def steps(directory: Path) -> list[int]:
    """Steps of the committed checkpoints in a folder, ascending."""
    return [step for step, folder in _named(directory) if (folder / MANIFEST).is_file()]


def _named(directory: Path) -> list[tuple[int, Path]]:
    """(step, folder) of all folders named step-..., ascending, whatever their content."""
    if not directory.is_dir():
        return []
    matches = [(_NAME.fullmatch(path.name), path) for path in directory.iterdir() if path.is_dir()]
    return sorted((int(match[1]), path) for match, path in matches if match)


def find(directory: Path, resume: str) -> tuple[Path | None, list[str]]:
    """The checkpoint to resume from, if any, and a warning for each damaged one that was skipped.

    resume   auto, none, or a checkpoint folder, as checkpoint.resume
    raises   CheckpointError where there are checkpoints but none is valid: starting afresh would lose the run
    """
    if resume == "none":
        return None, []
    if resume != "auto":
        return Path(resume), []
    problems: list[str] = []
    for step, folder in reversed(_named(directory)):
        problem = damage(folder, REQUIRED_FILES, step=step)
        if problem is None:
            return folder, [f"{line} (delete it: an earlier checkpoint is used)" for line in problems]
        problems.append(f"{folder}: {problem}")
    problems += [f"{folder}: not named step-..., as a checkpoint is" for folder in _renamed(directory)]
    if problems:
        raise CheckpointError(
            f"checkpoint.resume: {directory}: no valid checkpoint: {'; '.join(problems)} "
            "(restore one of them, or start afresh with checkpoint.resume=none)"
        )
    return None, []


def _renamed(directory: Path) -> list[Path]:
    """Folders with files of a checkpoint under another name; without unfinished and archived ones."""
    if not directory.is_dir():
        return []
    others = (path for path in directory.iterdir() if path.is_dir() and not _NAME.fullmatch(path.name))
    return sorted(
        path
        for path in others
        if not path.name.startswith(_IGNORED_PREFIXES)
        and any((path / name).exists() for name in (MANIFEST, *REQUIRED_FILES))
    )


def archive(directory: Path, above: int) -> list[str]:
    """Rename the checkpoints above a step, which are not of the run that starts there; returns their new names."""
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
