"""Files and folders that are whole or absent, manifests that vouch for their bytes, and the lock of a run folder.

Loads without torch.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from lodestar.errors import ConfigError

MANIFEST = "manifest.json"
FORMAT = 1
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
"""What a file system answers that knows no locks."""


@contextmanager
def replacing(folder: Path) -> Generator[Path]:
    """A folder beside `folder` that takes its place once it is whole."""
    tmp, old = folder.with_name(f".{folder.name}.tmp"), folder.with_name(f".{folder.name}.old")
    for leftover in (tmp, old):
        shutil.rmtree(leftover, ignore_errors=True)
    tmp.mkdir(parents=True)
    yield tmp
    if folder.exists():
        folder.rename(old)
    tmp.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def replacing_file(path: Path) -> Generator[Path]:
    """A file of this process beside `path` that takes its place once it is whole."""
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield tmp
        tmp.replace(path)
    finally:
        tmp.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """As UTF-8; a reader sees the old file or the new one."""
    with replacing_file(path) as tmp:
        tmp.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """As `write_text`, indented."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def sync(path: Path) -> None:
    """Onto the disk: a file, or a folder's list of names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- manifests -------------------------------------------------------------------------------


def write_manifest(folder: Path, **values: Any) -> None:
    """Size and SHA-256 of every file below `folder`, and `values`; everything is on the disk when it returns."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in paths}
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"format": FORMAT, **values, "files": files}, indent=2), encoding="utf-8")
    for path in (*folder.rglob("*"), folder):
        sync(path)


def damage(folder: Path, needed: Iterable[str], **values: Any) -> str | None:
    """What is wrong with a folder that has a manifest, in a few words; none where every byte is as it was written.

    needed   files that the manifest must list
    values   what the manifest must say besides
    """
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return f"{MANIFEST}: missing"
    try:
        content = json.loads(manifest.read_text(encoding="utf-8"))
        files = {name: (int(facts["bytes"]), str(facts["sha256"])) for name, facts in content["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST}: damaged"
    if content.get("format") != FORMAT:
        return f"{MANIFEST}: format {content.get('format')!r} is not known to this version (knows {FORMAT})"
    for key, value in values.items():
        if content.get(key) != value:
            return f"{MANIFEST}: {key} is {content.get(key)!r}, not {value!r}"
    for name in sorted({*needed, *files}):
        if name not in files:
            return f"{MANIFEST}: {name}: not listed"
        if not (folder / name).is_file():
            return f"{name}: missing"
    for name, (size, digest) in files.items():
        if (folder / name).stat().st_size != size or _sha256(folder / name) != digest:
            return f"{name}: damaged: its hash is not the manifest's"
    return None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


# --- locks -----------------------------------------------------------------------------------


@contextmanager
def locked(folder: Path, field: str) -> Generator[None]:
    """Keep other processes, on this host or another, out of `folder`; ConfigError says who holds it.

    The kernel holds the lock and lets go of it when the process ends, however it ends; the file only says who has it.
    """
    with open(folder / ".lock", "a+", encoding="utf-8") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock: a forked worker must not hold it too
        except OSError as error:
            if error.errno in _NO_LOCKS:
                yield
                return
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise ConfigError(
                f"{field}: {folder}: in use by {holder} (wait until it ends, or choose another {field})"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {datetime.now():%Y-%m-%d %H:%M:%S}")
        file.flush()
        yield
        file.truncate(0)


def make_folder(path: str | Path, field: str) -> Path:
    """With its parents; ConfigError where that cannot be done."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=path):
            pass  # it can be written to
    except OSError as error:
        raise ConfigError(f"{field}: {path}: {error.strerror} (name another folder)") from None
    return Path(path)


def check_absent(folder: str | Path) -> None:
    if Path(folder).exists():
        raise ConfigError(f"output: {folder}: is there already (delete it, or name another folder)")
