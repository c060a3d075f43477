"""A file is whole or as it was; a manifest has the hash of every file."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lodestar.errors import ConfigError
from lodestar.files import (
    damage,
    kept_file_problem,
    locked,
    read_object,
    replacing,
    replacing_file,
    replacing_hashed_file,
    restore,
    write_json,
    write_manifest,
    write_text,
)
from tests import processes


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    write_json(path, {"rows": 1})
    with pytest.raises(ZeroDivisionError), replacing_file(path) as tmp:
        tmp.write_text("torn")
        raise ZeroDivisionError
    assert path.read_text() == '{\n  "rows": 1\n}\n'
    write_text(path, "new")
    assert path.read_text() == "new" and [file.name for file in tmp_path.iterdir()] == ["record.json"]


def test_a_writer_that_is_killed_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    write_text(path, "old")
    code = (
        "import os, signal, sys; from pathlib import Path; from lodestar.files import replacing_file\n"
        "with replacing_file(Path(sys.argv[1])) as tmp: tmp.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    process = processes.run([sys.executable, "-c", code, str(path)], limit_s=60)
    assert process.returncode == -signal.SIGKILL and path.read_text() == "old"


def test_a_manifest_finds_what_changed(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner/a").write_text("a")
    write_manifest(tmp_path, step=3)
    assert damage(tmp_path, ["inner/a"], step=3) is None
    assert damage(tmp_path, ["inner/a"], step=4) == "manifest.json: step is 3, not 4"
    assert damage(tmp_path, ["b"]) == "manifest.json: b: not listed"
    (tmp_path / "inner/a").write_text("b")
    assert damage(tmp_path, []) == "inner/a: damaged: its hash is not the manifest's"


@pytest.mark.parametrize("at", range(0, 300, 7))
def test_a_manifest_covers_itself(at: int, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a")
    write_manifest(tmp_path, step=3)
    manifest = tmp_path / "manifest.json"
    content = manifest.read_bytes()
    at %= len(content)
    for changed in (content[:at] + b" " + content[at:], content[:at] + content[at + 1 :], content + b"\n"):
        manifest.write_bytes(changed)
        assert damage(tmp_path, []), at


def test_a_manifest_without_a_hash_is_one_of_version_0_1_or_damaged(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a")
    write_manifest(tmp_path, step=3)
    content = json.loads((tmp_path / "manifest.json").read_text())
    del content["sha256"]
    write_json(tmp_path / "manifest.json", content)
    assert damage(tmp_path, ["a"], step=3) is None
    write_json(tmp_path / "manifest.json", {**content, "sha257": "0"})
    assert damage(tmp_path, ["a"], step=3) == "manifest.json: damaged: its hash is not its own"
    for name in ("../a", "/etc/passwd", "./a", "b/../a", "a\0"):
        entry = content["files"]["a"]
        write_json(tmp_path / "manifest.json", {**content, "files": {"a": entry, name: entry}})
        assert "not a file of the folder" in str(damage(tmp_path, ["a"], step=3)), name


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    for text in ("one", "two"):
        with replacing(folder) as tmp:
            (tmp / "a").write_text(text)
    with pytest.raises(ZeroDivisionError), replacing(folder) as tmp:
        (tmp / "a").write_text("torn")
        raise ZeroDivisionError
    assert (folder / "a").read_text() == "two" and [path.name for path in tmp_path.iterdir()] == ["model"]
    folder.rename(tmp_path / ".model.old")  # killed between the two renames
    restore(folder)
    assert (folder / "a").read_text() == "two" and [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_kept_file_is_used_only_if_every_byte_is_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "part"
    with replacing_hashed_file(path) as tmp:
        tmp.write_text("content")
    assert kept_file_problem(path) is None
    path.write_text("Content")
    assert kept_file_problem(path) == "damaged: its hash is another"
    (tmp_path / ".part.sha256").unlink()
    assert kept_file_problem(path) == "its hash is missing"
    path.unlink()
    assert kept_file_problem(path) == "no such file"


@pytest.mark.parametrize("text", ["", "[]", "3", "null", "{", "[" * 200_000, "9" * 5000, "\ud800"])
def test_what_is_no_json_object_is_told_in_a_few_words(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(text.encode(errors="surrogatepass"))
    with pytest.raises(ValueError, match=r"^(not valid JSON|must be an object, got (\[\]|3|null))$"):
        read_object(tmp_path / "a.json")


@pytest.mark.parametrize("put", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("/nowhere")])
def test_a_lock_that_is_no_file_is_an_error(put: Callable[[Path], None], tmp_path: Path) -> None:
    put(tmp_path / ".lock")
    with (
        pytest.raises(ConfigError, match=r"run\.output_dir: .*\.lock: is .* \(delete it\)"),
        locked(tmp_path, "run.output_dir"),
    ):
        pass


def test_a_damaged_lock_file_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_bytes(b"\xff\0" * 100)
    with locked(tmp_path, "run.output_dir"):
        assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on ")
