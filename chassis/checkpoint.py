"""Checkpoints that are whole or absent, of named fp32 tensors that do not depend on how many ranks wrote them.

A checkpoint is a folder `step-00000100` of safetensors and JSON, written beside its place and renamed into it;
manifest.json, written last, holds size and SHA-256 of every other file, and nothing is read before it has been checked.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from chassis.errors import CheckpointError

MANIFEST = "manifest.json"
FORMAT = 1
_NAME = re.compile(r"step-(\d{8,})")


def write(
    directory: Path, step: int, *, tensors: Mapping[str, Mapping[str, Tensor]], values: Mapping[str, Any]
) -> Path:
    """Commit a checkpoint: `NAME.safetensors` for each group of tensors, and `state.json` with the values."""
    final = directory / f"step-{step:08d}"
    draft = directory / f".{final.name}.draft"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    for name, group in tensors.items():
        save_file({key: value.contiguous() for key, value in group.items()}, draft / f"{name}.safetensors")
    (draft / "state.json").write_text(json.dumps({"step": step, **values}, indent=2), encoding="utf-8")
    files = {path.name: {"bytes": path.stat().st_size, "sha256": _hash(path)} for path in sorted(draft.iterdir())}
    manifest = draft / MANIFEST
    manifest.write_text(json.dumps({"format": FORMAT, "step": step, "files": files}, indent=2), encoding="utf-8")
    for path in (*draft.iterdir(), draft):
        _sync(path)
    shutil.rmtree(final, ignore_errors=True)
    draft.rename(final)
    _sync(directory)
    return final


def read(folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """(tensors by group, values) of a checkpoint, once every file has been checked against the manifest."""
    check(folder)
    tensors = {path.stem: load_file(path) for path in sorted(folder.glob("*.safetensors"))}
    return tensors, json.loads((folder / "state.json").read_text(encoding="utf-8"))


def check(folder: Path) -> None:
    """Raise CheckpointError unless every file of the manifest is there with its size and hash."""
    manifest = folder / MANIFEST
    if not manifest.is_file():
        raise CheckpointError(f"checkpoint.resume: {folder}: no {MANIFEST}: not a checkpoint (name a step-... folder)")
    try:
        content = json.loads(manifest.read_text(encoding="utf-8"))
        files = dict(content["files"])
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"{manifest}: damaged (delete {folder} to go on from the one before)") from None
    if content.get("format") != FORMAT:
        raise CheckpointError(
            f"{manifest}: format {content.get('format')} is not known to this version (knows {FORMAT})"
        )
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path}: missing (delete {folder} to go on from the one before)")
        if path.stat().st_size != expected["bytes"] or _hash(path) != expected["sha256"]:
            raise CheckpointError(
                f"{path}: damaged: its hash is not the manifest's (delete {folder} to go on from the one before)"
            )


def steps(directory: Path) -> list[int]:
    """Steps of the committed checkpoints in a folder, ascending; drafts are not looked at."""
    if not directory.is_dir():
        return []
    matches = [(_NAME.fullmatch(path.name), path) for path in directory.iterdir()]
    return sorted(int(match[1]) for match, path in matches if match and (path / MANIFEST).is_file())


def find(directory: Path, resume: str) -> tuple[Path | None, list[str]]:
    """The checkpoint to go on from, if any, and a line for each damaged one that was passed over."""
    if resume == "none":
        return None, []
    if resume != "auto":
        return Path(resume), []
    passed: list[str] = []
    for step in reversed(steps(directory)):
        folder = directory / f"step-{step:08d}"
        try:
            check(folder)
            return folder, passed
        except CheckpointError as error:
            passed.append(str(error))
    return None, passed


def set_aside(directory: Path, above: int) -> list[str]:
    """Rename the checkpoints above a step, which a run that starts there would take for its own; their new names."""
    names = []
    for step in steps(directory):
        if step > above:
            name = f"replaced-step-{step:08d}"
            shutil.rmtree(directory / name, ignore_errors=True)
            (directory / f"step-{step:08d}").rename(directory / name)
            names.append(name)
    return names


def prune(directory: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints."""
    for step in steps(directory)[:-keep]:
        shutil.rmtree(directory / f"step-{step:08d}", ignore_errors=True)


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
