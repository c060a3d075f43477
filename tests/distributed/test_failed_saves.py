"""A save that fails leaves the older checkpoints, is told once by rank 0, and only the third in a row ends the run."""

from __future__ import annotations

import io
import json
import os
import re
import resource
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lodestar.distributed.testing import run_world
from lodestar.errors import LodestarError
from lodestar.training import checkpoint
from tests import processes
from tests.distributed import steps

TOTAL = 7


def trouble(kind: str, disk: Path, on: bool) -> None:
    """Real trouble with writing to the disk, or its end."""
    if kind == "limit":  # as a quota: no file larger than that
        size = 20_000 if on else resource.RLIM_INFINITY
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    elif kind == "read-only":  # the folder alone: a disk cannot turn so while files are open
        checkpoints = disk / "run/checkpoints"
        is_mounted = str(checkpoints) in Path("/proc/mounts").read_text()
        if on and not is_mounted:
            for options in (["--bind", str(checkpoints)], ["-o", "remount,bind,ro"]):
                processes.run(["mount", *options, str(checkpoints)], limit_s=20).check_returncode()
        elif not on and is_mounted:
            processes.run(["umount", "-l", str(checkpoints)], limit_s=20).check_returncode()
    elif not on:
        (disk / "ballast").unlink(missing_ok=True)
    elif not (disk / "ballast").exists():
        with open(disk / "ballast", "wb", buffering=0) as file:
            while True:
                try:
                    file.write(bytes(4096))
                except OSError:
                    break


def train(
    rank: int, size: int, folder: Path, disk: Path, kind: str, at: tuple[int, ...], every: int = 1
) -> tuple[int, str]:
    """(exit code, stderr) of a run whose disk makes trouble in some saves."""
    from lodestar.distributed.runtime import Runtime, choose_device
    from lodestar.training import hooks
    from lodestar.training.trainer import Trainer

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    sys.stderr = io.StringIO()
    saves = (f"checkpoint.every_steps={every}", "checkpoint.keep=2", f"run.output_dir={disk}/run")
    recipe = steps.recipe("pretrain", folder, f"schedule.steps={TOTAL * every}", "track.log_every=1", *saves)

    def write_in_trouble(directory: Path, step: int, **values: Any) -> Path:
        trouble(kind, disk, step in at)
        try:
            return write(directory, step, **values)
        finally:
            trouble(kind, disk, False)

    write, checkpoint.write = checkpoint.write, write_in_trouble
    try:
        with hooks.StopHook(size) as stop:
            code = Trainer(recipe, Runtime(rank, size, rank, choose_device(rank))).run(steps.build_pretrain_task, stop)
    except LodestarError as error:
        code = error.exit_code
        print(f"error: {error}", file=sys.stderr)
    return code, sys.stderr.getvalue()


@pytest.fixture
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A folder, or a small disk of its own where the trouble needs one."""
    place = tmp_path / "disk"
    place.mkdir()
    if request.node.callspec.params["kind"] == "limit":
        yield place
        return
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)]
    if os.geteuid() != 0 or processes.run(mount, limit_s=20).returncode:
        pytest.skip("needs to mount a disk, as root may")
    yield place
    processes.run(["umount", "--recursive", "--lazy", str(place)], limit_s=20)


KINDS = ["limit", pytest.param("full", marks=pytest.mark.slow)]


@pytest.mark.parametrize("kind", [*KINDS, pytest.param("read-only", marks=pytest.mark.slow)])
def test_a_run_survives_two_failed_saves_in_a_row(kind: str, disk: Path, tmp_path: Path) -> None:
    steps.recipe("pretrain", tmp_path)
    (code, said), (other_code, other_said) = run_world(train, 2, tmp_path, disk, kind, (3, 4, 6))
    assert code == other_code == 0 and "not saved" not in other_said, said
    told = [line for line in said.splitlines() if "not saved" in line]
    assert [f"checkpoints: step {step}: " in line for step, line in zip((3, 4, 6), told, strict=True)] == [True] * 3
    reason = {"limit": "File too large", "full": "No space left on device", "read-only": "Read-only file system"}[kind]
    assert all(line.startswith("warning: ") and line.endswith(")") and reason in line for line in told), told
    folder = disk / "run/checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000005", "step-00000007"]
    lines = [json.loads(line) for line in (disk / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [*range(1, TOTAL + 1)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("at", "words"), [((3, 4, 5, 6), "step 5: .* 3 times in a row"), ((TOTAL,), f"step {TOTAL}: .* at the end")]
)
def test_the_third_in_a_row_and_the_last_one_end_it(
    kind: str, at: tuple[int, ...], words: str, disk: Path, tmp_path: Path
) -> None:
    steps.recipe("pretrain", tmp_path)
    (code, said), (other_code, _) = run_world(train, 2, tmp_path, disk, kind, at)
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert code == other_code == 2 and said.count("warning: checkpoint") == min(2, len(at) - 1)
    assert re.search(f"checkpoint: .*{words} .*make room there", line), line
    older = checkpoint.steps(disk / "run/checkpoints")
    assert older == [at[0] - 2, at[0] - 1]
    assert all(checkpoint.read(disk / f"run/checkpoints/step-{step:08d}")[1]["step"] == step for step in older)
    assert not [path for path in (disk / "run/checkpoints").iterdir() if path.name.startswith(".")]
    assert run_world(train, 2, tmp_path, disk, kind, ())[0][0] == 0  # with room it goes on


def test_the_third_in_a_row_ends_it_before_the_next_save(tmp_path: Path) -> None:
    """Only rank 0 knows of it; all ranks end after the same step, as after a signal."""
    steps.recipe("pretrain", tmp_path)
    outcomes = run_world(train, 2, tmp_path, tmp_path, "limit", (20, 40, 60), 20)
    assert [code for code, _ in outcomes] == [2, 2]
    assert all(re.search("error: checkpoint: .*step 60: .* 3 times in a row", said) for _, said in outcomes)
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert 60 < json.loads(lines[-1])["step"] < 80
