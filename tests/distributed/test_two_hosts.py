"""Two hosts on one machine: network namespaces joined by a cable, a real torchrun on each."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import processes
from tests.distributed import steps

TORCHRUN = Path(sys.executable).parent / "torchrun"
NUMBER = os.getpid() % 200 + 20
HOSTS = [
    (f"lodestar{NUMBER}a", f"lode{NUMBER}a", f"10.77.{NUMBER}.1"),
    (f"lodestar{NUMBER}b", f"lode{NUMBER}b", f"10.77.{NUMBER}.2"),
]


def ip(*arguments: str) -> None:
    processes.run(["ip", *arguments], limit_s=30).check_returncode()


@pytest.fixture(scope="module")
def hosts() -> Iterator[None]:
    try:
        for space, _, _ in HOSTS:
            ip("netns", "add", space)
        ip(
            "link",
            "add",
            HOSTS[0][1],
            "netns",
            HOSTS[0][0],
            "type",
            "veth",
            "peer",
            "name",
            HOSTS[1][1],
            "netns",
            HOSTS[1][0],
        )
        for space, cable, address in HOSTS:
            ip("-n", space, "address", "add", f"{address}/24", "dev", cable)
            for link in ("lo", cable):
                ip("-n", space, "link", "set", link, "up")
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"network namespaces cannot be made here: {error}")
    yield
    for space, _, _ in HOSTS:
        ip("netns", "delete", space)


def start(stage: str, recipe: Path, *overrides: str) -> list[subprocess.Popen[str]]:
    """One torchrun on each host, with one rank."""
    launched = []
    for node, (space, cable, _) in enumerate(HOSTS):
        command = [
            "ip", "netns", "exec", space, str(TORCHRUN), "--nnodes", "2", "--node-rank", str(node),
            "--master-addr", HOSTS[0][2], "--master-port", "29777", "--nproc-per-node", "1",
            f"launch/{stage}.py", "--config", str(recipe), *overrides,
        ]  # fmt: skip
        launched.append(processes.start(command, {**processes.environment(), "GLOO_SOCKET_IFNAME": cable}))
    return launched


def finish(launched: list[subprocess.Popen[str]]) -> list[str]:
    """The stderr of each; all have ended."""
    try:
        return [processes.finish(process, limit_s=180)[1] for process in launched]
    finally:
        for process in launched:
            process.kill()


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_a_cut_cable_ends_both_hosts_with_one_line_that_names_the_peer(stage: str, hosts: None, tmp_path: Path) -> None:
    steps.recipe(stage, tmp_path)
    recipe = tmp_path / f"{stage}.yaml"

    options = [
        f"run.output_dir={tmp_path}/cut", "checkpoint.every_steps=1", "track.log_every=1",
        "engine.kind=deepspeed", "engine.timeout_minutes=0.1",
    ]  # fmt: skip
    launched = start(stage, recipe, *options, f"schedule.steps={10**6}")
    metrics = tmp_path / "cut/metrics.jsonl"
    processes.wait_until(lambda: metrics.exists() and len(metrics.read_text().splitlines()) >= 3, *launched)
    ip("-n", HOSTS[0][0], "link", "set", HOSTS[0][1], "down")
    try:
        outputs = finish(launched)
    finally:
        ip("-n", HOSTS[0][0], "link", "set", HOSTS[0][1], "up")
    for rank, output in enumerate(outputs):
        (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
        other = 1 - rank
        assert line.startswith(f"error: rank {rank} (") and HOSTS[rank][2] in line
        assert f"lost rank {other} (" in line and HOSTS[other][2] in line and "the same command resumes the run" in line
    assert all(process.returncode not in (0, None) for process in launched)

    saved_step = max(int(path.name[5:]) for path in (tmp_path / "cut/checkpoints").glob("step-*"))
    resumed = start(
        stage, recipe, *options, f"schedule.steps={saved_step + 2}", "checkpoint.allow_change=[schedule.steps]"
    )
    outputs = finish(resumed)
    assert [process.returncode for process in resumed] == [0, 0], outputs
    assert f"resumes from step {saved_step} of {saved_step + 2}" in outputs[0]
    assert (tmp_path / "cut/model/model.safetensors").is_file()
