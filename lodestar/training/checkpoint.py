"""Checkpoints that are whole or absent, of named fp32 tensors that do not depend on the number of ranks.

A checkpoint is a folder `step-00000100` of safetensors and JSON, written under a temporary name and then renamed.
manifest.json, written last, has size and SHA-256 of every other file; they are checked before anything is read.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lodestar.errors import CheckpointError, first_line
from lodestar.files import MANIFEST, damage, read_object, replacing, write_manifest

REQUIRED_FILES = ("state.json", "weights.safetensors", "optimizer.safetensors")
_STATE = {"step": int, "skipped": int, "masked": int, "engine": dict, "changes": list, "recipe": dict}
"""Types of the values that every version reads; each may be absent but the step."""
_NAME = re.compile(r"step-(\d{8,})")
ARCHIVED = "archived-"
_IGNORED_PREFIXES = (".", ARCHIVED, "replaced-")  # the last: archived by versions before 0.2
Signature = tuple[tuple[str, int, int], ...]
"""Names, sizes and times of a folder's files."""
Hashed = dict[Path, Signature]
"""Checkpoints that were found whole: they are hashed again only where a file of them changed."""


def write(
    directory: Path,
    step: int,
    *,
    tensors: Mapping[str, Mapping[str, Tensor]],
    values: Mapping[str, Any],
    hashed: Hashed | None = None,
) -> Path:
    """Commit a checkpoint: `GROUP.safetensors` for each group of tensors, and `state.json` with the values.

    hashed   gets the checkpoint
    Raises OSError where the disk is full or the folder read-only; then nothing of it is left.
    """
    folder = directory / f"step-{step:08d}"
    with replacing(folder) as tmp:
        for name, group in tensors.items():
            try:
                save_file({key: value.contiguous() for key, value in group.items()}, tmp / f"{name}.safetensors")
            except SafetensorError as error:  # safetensors turns an OSError into its own
                match = re.search(r"os error (\d+)", str(error))
                number = int(match[1]) if match else errno.EIO
                raise OSError(number, os.strerror(number)) from None
        (tmp / "state.json").write_text(json.dumps({"step": step, **values}, indent=2), encoding="utf-8")
        write_manifest(tmp, step=step)
    if hashed is not None:
        hashed[folder] = _signature(folder)
    return folder


def read(folder: Path, hashed: Hashed | None = None) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """(tensors by group, values) of a checkpoint; CheckpointError where a file does not match the manifest.

    hashed   checkpoints that need not be hashed again
    """
    problem, tensors = _problem(folder, hashed), {}
    if problem is None:
        try:
            tensors = {Path(n).stem: load_file(folder / n) for n in REQUIRED_FILES if n.endswith(".safetensors")}
        except (OSError, SafetensorError) as error:
            problem = f"tensors cannot be read: {first_line(error)}"
    if problem is not None:
        raise CheckpointError(
            f"checkpoint.resume: {folder}: {problem} (name a whole step-... folder, or delete it to resume from the "
            "one before)"
        )
    return tensors, read_object(folder / "state.json")


def _problem(folder: Path, hashed: Hashed | None = None) -> str | None:
    """Why a folder is no checkpoint to resume from, in a few words; none for a whole one. No tensor is read.

    hashed   gets a whole one, which is not hashed again until a file of it changes
    """
    hashed = {} if hashed is None else hashed
    signature = _signature(folder)
    if signature and hashed.get(folder) == signature:
        return None
    named = _NAME.fullmatch(folder.name)
    values: dict[str, Any] = {"step": int(named[1])} if named else {}
    if problem := damage(folder, REQUIRED_FILES, **values):
        return problem
    try:
        values, step = read_object(folder / "state.json"), read_object(folder / MANIFEST).get("step")
    except ValueError as error:
        return f"state.json: {error}"
    if wrong := [name for name, kind in _STATE.items() if type(values.get(name, kind())) is not kind]:
        return f"state.json: {wrong[0]}: damaged: of another type"
    if values.get("step") != step:
        return f"{MANIFEST}: of another step than state.json"
    hashed[folder] = signature
    return None


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


def find(directory: Path, resume: str, hashed: Hashed | None = None) -> tuple[Path | None, list[str]]:
    """The checkpoint to resume from, if any, and a warning for each damaged one that was skipped.

    resume   auto, none, or a checkpoint folder, as checkpoint.resume
    hashed   gets the checkpoint, so that `read` does not hash it again
    raises   CheckpointError where there are checkpoints but none is valid: starting afresh would lose the run
    """
    if resume == "none":
        return None, []
    if resume != "auto":
        return Path(resume), []
    problems: list[str] = []
    for _, folder in reversed(_named(directory)):
        problem = _problem(folder, hashed)
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


def prune(directory: Path, keep: int, hashed: Hashed | None = None) -> None:
    """Delete what is older than the newest `keep` valid checkpoints, and what interrupted saves left.

    hashed   checkpoints that need not be hashed again
    """
    hashed = {} if hashed is None else hashed
    for leftover in directory.glob(".step-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    num_valid = 0
    for _, folder in reversed(_named(directory)):
        if num_valid == keep:
            shutil.rmtree(folder, ignore_errors=True)
            hashed.pop(folder, None)
        else:
            num_valid += _problem(folder, hashed) is None


def _signature(folder: Path) -> Signature:
    """Names, sizes and times of the files."""
    try:
        stats = [(entry.name, entry.stat(follow_symlinks=False)) for entry in os.scandir(folder)]
    except OSError:
        return ()
    return tuple(sorted((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats))
