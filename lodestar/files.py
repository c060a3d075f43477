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
import sys
import time
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path, PurePosixPath
from tempfile import TemporaryFile
from typing import Any, BinaryIO, TypeVar

from lodestar.errors import ConfigError, DataError, shown

Json = TypeVar("Json", dict[str, Any], list[Any])

MANIFEST = "manifest.json"
FORMAT = 1
_LARGEST_JSON = 1 << 26
"""Bytes."""
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
"""Errors of file systems without locks."""


@contextmanager
def replacing(folder: Path) -> Generator[Path]:
    """A temporary folder that replaces `folder` at the end, once it is on the disk; after an error nothing is left."""
    restore(folder)
    tmp, old = _beside(folder)
    for leftover in (tmp, old):
        shutil.rmtree(leftover, ignore_errors=True)
    tmp.mkdir(parents=True)
    try:
        yield tmp
        for path in (*tmp.rglob("*"), tmp):
            sync(path)
        if folder.exists():
            folder.rename(old)
        tmp.rename(folder)
    except BaseException:
        shutil.rmtree(tmp, ignore_errors=True)
        restore(folder)
        raise
    sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def restore(folder: Path) -> None:
    """Rename back the folder that `replacing` had set aside when its process was killed."""
    _, old = _beside(folder)
    if old.is_dir() and not folder.exists():
        old.rename(folder)


def _beside(folder: Path) -> tuple[Path, Path]:
    """The new and the old folder of `replacing`."""
    return folder.with_name(f".{folder.name}.tmp"), folder.with_name(f".{folder.name}.old")


@contextmanager
def replacing_file(path: Path) -> Generator[Path]:
    """A temporary path of this process whose file replaces `path` at the end, once it is on the disk; unless an error
    occurs. ConfigError where `path` is a folder.
    """
    if path.is_dir():
        raise ConfigError(f"{path}: is a folder, not a file (delete it)")
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield tmp
        sync(tmp)
        tmp.replace(path)
        sync(path.parent)
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


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a regular file; ValueError, with the reason in a few words, for anything else."""
    return json_value(path, dict, _LARGEST_JSON)


def json_value(path: Path, kind: type[Json], most_bytes: int) -> Json:
    """The JSON object or list in a regular file; ValueError as `read_object`, also for a file of more bytes."""
    if problem := file_problem(path):
        raise ValueError(problem)
    try:
        is_small = path.stat().st_size <= most_bytes
        value: Any = json.loads(path.read_bytes()) if is_small else None
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise ValueError("not valid JSON") from None
    if not is_small:
        raise ValueError(f"is larger than {most_bytes >> 20} MiB")
    if not isinstance(value, kind):
        raise ValueError(f"must be {'an object' if kind is dict else 'a list'}, got {shown(value)}")
    return value


def sync(path: Path) -> None:
    """fsync a file, or a folder's list of names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # of file systems that cannot sync a folder
            raise
    finally:
        os.close(descriptor)


# --- manifests -------------------------------------------------------------------------------


def write_manifest(folder: Path, *, hash_of: Callable[[Path], str] | None = None, **values: Any) -> None:
    """Write size and SHA-256 of every file below `folder`, `values`, and a hash of all that; fsync all of it.

    hash_of   the SHA-256 of a file, where it need not be computed again
    """
    hash_of, manifest = hash_of or sha256, folder / MANIFEST
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path != manifest)
    files = {str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": hash_of(path)} for path in paths}
    content = {"format": FORMAT, **values, "files": files}
    manifest.write_bytes(_as_bytes({**content, "sha256": _hash_of(content)}))
    for path in (*folder.rglob("*"), folder):
        sync(path)


def manifest_hashes(folder: Path) -> dict[str, str]:
    """The SHA-256 of each file that a folder's manifest lists; ValueError, in a few words, where that is damaged."""
    try:
        return {name: digest for name, (_, digest) in _listed(_read_manifest(folder / MANIFEST, {})).items()}
    except ValueError as error:
        raise ValueError(f"{MANIFEST}: {error}") from None


def damage(
    folder: Path, required: Iterable[str], hash_of: Callable[[Path], str] | None = None, **values: Any
) -> str | None:
    """What is wrong with a folder that has a manifest, in a few words; none where every byte is as it was written.

    required   files that the manifest must list
    hash_of    the SHA-256 of a file, where it need not be computed again
    values     that the manifest must have
    """
    try:
        content = _read_manifest(folder / MANIFEST, values)
        files = _listed(content)
    except ValueError as error:
        return f"{MANIFEST}: {error}"
    for key, value in values.items():
        if content.get(key) != value:
            return f"{MANIFEST}: {key} is {shown(content.get(key))}, not {value!r}"
    for name in sorted({*required, *files}):
        if name not in files:
            return f"{MANIFEST}: {name}: not listed"
        if not _is_inside(name):
            return f"{MANIFEST}: {shown(name)}: not a file of the folder"
    for name, (size, digest) in files.items():
        if problem := _damage_of_file(folder / name, size, digest, hash_of or sha256):
            return f"{name}: {problem}"
    return None


def _read_manifest(path: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """The content, without its hash; ValueError, in a few words, where it is not as it was written."""
    if problem := _problem_in_folder(path):
        raise ValueError(problem)
    content = read_object(path)
    if content.get("format") != FORMAT:
        raise ValueError(f"format {shown(content.get('format'))} is not known to this version (knows {FORMAT})")
    try:
        written, digest = _as_bytes(content), content.pop("sha256", None)
        is_whole = written == path.read_bytes() and digest == _hash_of(content)
    except RecursionError:
        raise ValueError("damaged: nested too deeply") from None
    # Manifests of version 0.1 have no hash, and no other key.
    if not is_whole and (digest is not None or not content.keys() <= {"format", "step", "files", *values}):
        raise ValueError("damaged: its hash is not its own")
    return content


def _listed(content: Mapping[str, Any]) -> dict[str, tuple[int, str]]:
    """Bytes and SHA-256 of each file that a manifest lists; ValueError, in a few words, where it does not."""
    try:
        return {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in content["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
        raise ValueError("damaged: not a list of files with their hashes") from None


def _as_bytes(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, indent=2).encode()


def _hash_of(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _is_inside(name: str) -> bool:
    """Whether the name is that of a file below a folder, written in the one way that `write_manifest` writes it."""
    path = PurePosixPath(name)
    return name == str(path) and not path.is_absolute() and ".." not in path.parts and "\0" not in name


def _damage_of_file(path: Path, size: int, digest: str, hash_of: Callable[[Path], str]) -> str | None:
    if problem := _problem_in_folder(path):
        return problem
    try:
        is_whole = path.stat().st_size == size and hash_of(path) == digest
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return None if is_whole else "damaged: its hash is not the manifest's"


def _problem_in_folder(path: Path) -> str | None:
    """As `file_problem`, and of links: what they point to may change or go with another folder."""
    if path.is_symlink():
        return "is a link, not a file"
    problem = file_problem(path)
    return "missing" if problem == NO_SUCH_FILE else problem


# --- hashes of single files ------------------------------------------------------------------


@contextmanager
def replacing_hashed_file(path: Path) -> Generator[Path]:
    """As `replacing_file`, with a hidden file of the hash beside it, for `kept_file_problem`."""
    with replacing_file(path) as tmp:
        yield tmp
        write_text(_hash_path(path), f"{sha256(tmp)}  {path.name}\n")  # as sha256sum has it


NO_HASH = "its hash is missing"
"""Of a file that an earlier version wrote, or whose writer was killed."""


def kept_file_problem(path: Path) -> str | None:
    """Why a file of an earlier run is not to be used, in a few words; none where every byte is as it was written."""
    if problem := file_problem(path):
        return problem
    try:
        written = _hash_path(path).read_bytes() if file_problem(_hash_path(path)) is None else None
        if written == f"{sha256(path)}  {path.name}\n".encode():
            return None
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return NO_HASH if written is None else "damaged: its hash is another"


def _hash_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.sha256")


def sha256(path: Path) -> str:
    """Of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


# --- locks -----------------------------------------------------------------------------------


class InUseError(ConfigError):
    """Another process holds the lock."""


@contextmanager
def locked(folder: Path, field: str, name: str = ".lock", *, wait: bool = False) -> Generator[None]:
    """Hold the lock of `folder` against other processes, on this host or another; InUseError names its holder.

    The kernel releases the lock when the process ends, for whatever reason; the file only names the holder.

    wait   until the holder ends, with a line every minute
    """
    path = folder / name
    if (problem := file_problem(path)) not in (None, NO_SUCH_FILE):
        raise ConfigError(f"{field}: {path}: {problem} (delete it)")
    try:
        file = open(path, "a+", encoding="utf-8", errors="replace")  # noqa: SIM115
    except OSError as error:
        raise ConfigError(
            f"{field}: {path}: cannot be opened: {error.strerror} (mend its permissions, or delete it)"
        ) from None
    with file:
        next_line = time.monotonic()
        while True:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock, which a forked worker would hold too
                break
            except OSError as error:
                if error.errno in _NO_LOCKS:
                    yield
                    return
            file.seek(0)
            holder = file.read(100).strip() or "another process"
            if not wait:
                raise InUseError(
                    f"{field}: {folder}: in use by {holder} (wait until it ends, or choose another {field})"
                )
            if time.monotonic() >= next_line:
                print(f"{field}: {folder}: waits for {holder}", file=sys.stderr, flush=True)
                next_line += 60
            time.sleep(0.2)
        with suppress(OSError):  # a full disk: the holder has no name then
            os.ftruncate(file.fileno(), 0)
            holder = f"process {os.getpid()} on {socket.gethostname()} since {datetime.now():%Y-%m-%d %H:%M:%S}"
            os.write(file.fileno(), holder.encode())
        yield
        with suppress(OSError):
            os.ftruncate(file.fileno(), 0)


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
