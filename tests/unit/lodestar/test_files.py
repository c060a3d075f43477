"""A file is whole or as it was; a manifest has the hash of every file."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest

from lodestar.files import damage, replacing_file, write_json, write_manifest, write_text
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
