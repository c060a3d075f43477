"""Atomic writes of files and folders, manifests with the hashes of files, and the lock of a run folder.

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
import stat
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, BinaryIO

from lodestar.errors import ConfigError, DataError

MANIFEST = "manifest.json"
FORMAT = 1
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
"""Errors of file systems without locks."""


@contextmanager
def replacing(folder: Path) -> Generator[Path]:
    """A temporary folder that replaces `folder` at the end, unless an error occurs."""
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
    """A temporary path of this process whose file replaces `path` at the end, unless an error occurs."""
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield tmp
        tmp.replace(path)
    finally:
        tmp.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write as UTF-8, atomically: a reader sees the old file or the new one."""
    with replacing_file(path) as tmp:
        tmp.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


NO_SUCH_FILE = "no such file"


def file_problem(path: str | Path) -> str | None:
    """Why a path cannot be read as a file, in a few words; none for a regular file. Never waits, as for a FIFO."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        if os.path.islink(path):
            return "is a link to nothing"
        return NO_SUCH_FILE if isinstance(error, FileNotFoundError) else getattr(error, "strerror", str(error))
    if stat.S_ISREG(mode):
        return None
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}
    return f"is {kinds.get(stat.S_IFMT(mode), 'a device')}, not a file"


def open_regular(path: str | Path) -> BinaryIO:
    """Open a regular file to read its bytes; DataError for anything else, and OSError where it cannot be opened."""
    if problem := file_problem(path):
        raise DataError(f"{path}:1: file: {problem} (name a file of rows)")
    return os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb")


def sync(path: Path) -> None:
    """fsync a file, or a folder's list of names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- manifests -------------------------------------------------------------------------------


def write_manifest(folder: Path, **values: Any) -> None:
    """Write size and SHA-256 of every file below `folder`, and `values`; fsync all files and folders."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in paths}
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"format": FORMAT, **values, "files": files}, indent=2), encoding="utf-8")
    for path in (*folder.rglob("*"), folder):
        sync(path)


def damage(folder: Path, required: Iterable[str], **values: Any) -> str | None:
    """What is wrong with a folder that has a manifest, in a few words; none where every byte is as it was written.

    required   files that the manifest must list
    values     that the manifest must have
    """
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return f"{MANIFEST}: missing"
    try:
        content = json.loads(manifest.read_text(encoding="utf-8"))
        files = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in content["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST}: damaged"
    if content.get("format") != FORMAT:
        return f"{MANIFEST}: format {content.get('format')!r} is not known to this version (knows {FORMAT})"
    for key, value in values.items():
        if content.get(key) != value:
            return f"{MANIFEST}: {key} is {content.get(key)!r}, not {value!r}"
    for name in sorted({*required, *files}):
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
    """Hold the lock of `folder` against other processes, on this host or another; ConfigError names its holder.

    The kernel releases the lock when the process ends, for whatever reason; the file only names the holder.
    """
    with open(folder / ".lock", "a+", encoding="utf-8") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock, which a forked worker would hold too
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
    """Create a folder with its parents; ConfigError where that fails or the folder cannot be written to.

    field   of the recipe that names it
    """
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=path):
            pass  # the folder can be written to
    except OSError as error:
        raise ConfigError(f"{field}: {path}: {error.strerror} (name another folder)") from None
    return Path(path)


def check_absent(folder: str | Path) -> None:
    """ConfigError where the output folder exists."""
    if Path(folder).exists():
        raise ConfigError(f"output: {folder}: already exists (delete it, or name another folder)")
