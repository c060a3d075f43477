"""wandb without a key or a network: the run goes on, told once."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from lodestar.config.schema import TrackConfig
from lodestar.reporting.trackers import Tracker
from tests.processes import free_port


@pytest.mark.parametrize("key", [pytest.param("0123456789" * 4, marks=pytest.mark.slow), ""])
def test_a_run_does_not_wait_for_wandb(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    env = {"WANDB_MODE": "online", "WANDB_BASE_URL": f"http://127.0.0.1:{free_port()}", "WANDB_API_KEY": key}
    for name, value in {**env, "HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc")}.items():
        monkeypatch.setenv(name, value)
    start = time.monotonic()
    track = TrackConfig.model_validate({"to": ["wandb"]})
    tracker = Tracker.open(tmp_path / "run", track, "run", track, env)
    assert time.monotonic() - start < 60  # 8 of wandb's own, and its processes on a busy machine
    tracker.log({"step": 1, "loss": 1.0})
    tracker.close()
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert line.startswith("warning: track.to: wandb cannot be reached: ") and "wandb sync" in line
    assert list((tmp_path / "run/wandb").glob("offline-run-*")) and (tmp_path / "run/metrics.jsonl").is_file()
