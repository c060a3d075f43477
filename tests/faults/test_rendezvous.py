"""Ranks that cannot meet: one line with the remedy, before torch is loaded where that can be."""

from __future__ import annotations

import signal
import socket
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lodestar.distributed.rendezvous import meet
from lodestar.distributed.runtime import Placement
from lodestar.errors import LaunchError
from tests import processes
from tests.faults import runs
from tests.processes import environment, free_port

GOOD = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return runs.prepare(tmp_path)


@pytest.fixture
def other_program() -> Iterator[str]:
    """The port of a program that accepts connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield str(server.getsockname()[1])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"RANK": "2"}, "RANK: '2' is not a number from 0 to 1"),
        ({"RANK": "-1"}, "RANK: '-1' is not a number from 0 to 1"),
        ({"RANK": "one"}, "RANK: 'one' is not a number"),
        ({"RANK": "٣"}, "is not a number"),
        ({"RANK": "1" * 5000}, "is not a number"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE: '0' is not a number of at least 1"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE: '' is not a number"),
        ({"LOCAL_RANK": "2"}, "LOCAL_RANK: '2' is not a number from 0 to 1"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR: not set"),
        ({"MASTER_ADDR": "no.such.host.invalid"}, "MASTER_ADDR: 'no.such.host.invalid' is not a known host"),
        ({"MASTER_ADDR": "203.0.113.7"}, "MASTER_ADDR: 203.0.113.7 does not lead to the host of rank 0"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT: 'http' is no port"),
        ({"MASTER_PORT": "0"}, "MASTER_PORT: '0' is no port"),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT: '65536' is no port"),
        ({"MASTER_PORT": "9" * 40}, "is no port"),
    ],
)
def test_an_environment_in_which_ranks_cannot_meet_is_named(change: dict[str, str], told: str) -> None:
    env = {**GOOD, "MASTER_PORT": free_port(), **change}
    with pytest.raises(LaunchError, match=r"environment: .* \(.*\)$") as raised:
        Placement.from_env(env).address(env)
    assert told in str(raised.value) and len(str(raised.value)) < 200
    assert raised.value.print_on_this_rank in (None, True)


def test_a_port_in_use_is_told_before_torch_is_loaded(folder: Path, other_program: str) -> None:
    command = [sys.executable, "-X", "importtime", *runs.command("finetune", folder)]
    done = processes.run(command, {**environment(), **GOOD, "MASTER_PORT": other_program}, limit_s=60)
    said = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert done.returncode == 2 and not any(line.endswith(" torch") for line in done.stderr.splitlines())
    told = f"error: environment: MASTER_PORT: {other_program} is in use (export another, the same on all nodes)"
    assert said == [told]


def test_ranks_that_do_not_come_are_counted_and_named() -> None:
    with pytest.raises(LaunchError, match=r"1 of 3 ranks came to 127.0.0.1:.* missing: 1, 2 \("):
        meet("127.0.0.1", int(free_port()), rank=0, world_size=3, serves=True, attempt="0", timeout_seconds=0.5)
    with pytest.raises(LaunchError, match=r"no rank 0 at 127.0.0.1:.* \(start it there"):
        meet("127.0.0.1", int(free_port()), rank=1, world_size=3, serves=False, attempt="0", timeout_seconds=0.5)


def test_another_program_at_the_port_is_told(other_program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lodestar.distributed.rendezvous.HANDSHAKE_SECONDS", 1.0)
    with pytest.raises(LaunchError, match=f"another program answers at 127.0.0.1:{other_program}"):
        meet("127.0.0.1", int(other_program), rank=1, world_size=2, serves=False, attempt="0", timeout_seconds=60)


def test_ranks_with_one_number_or_two_sizes_are_told() -> None:
    def come(rank: int, size: int, seconds: float) -> None:
        meet("127.0.0.1", port, rank=rank, world_size=size, serves=rank == 0, attempt="0", timeout_seconds=seconds)

    port = int(free_port())
    with ThreadPoolExecutor() as pool:
        first = pool.submit(come, 0, 3, 20.0)
        with pytest.raises(LaunchError, match="WORLD_SIZE: 4, but 3 on rank 0"):
            come(1, 4, 10.0)
        with pytest.raises(LaunchError, match="RANK: 1 belongs to two processes"):
            come(1, 3, 10.0)
        come(2, 3, 10.0)
        first.result()


@pytest.mark.slow
def test_a_rank_that_waits_for_others_tells_who_is_missing(folder: Path) -> None:
    (said,) = runs.finish_all(runs.by_hand("finetune", folder, "engine.timeout_minutes=0.02", ranks=[0]), limit_s=120)
    (line,) = runs.errors(said)
    assert "1 of 2 ranks came" in line and "within 0.02 minutes; missing: 1 (" in line


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])
def test_a_rank_that_waits_for_others_ends_by_a_signal(number: signal.Signals, folder: Path) -> None:
    (waiting,) = runs.by_hand("finetune", folder, ranks=[1])
    processes.wait_until(lambda: has_loaded_torch(waiting.pid), waiting)
    waiting.send_signal(number)
    processes.finish(waiting, limit_s=30)
    assert waiting.returncode == -number


def has_loaded_torch(pid: int) -> bool:
    """And started to look for rank 0, which it does once all is imported."""
    import psutil

    return any(each.status == "SYN_SENT" for each in psutil.Process(pid).net_connections()) or (
        psutil.Process(pid).cpu_percent(0.5) < 30 and "libtorch_cpu" in Path(f"/proc/{pid}/maps").read_text()
    )


@pytest.mark.slow
def test_a_home_that_is_not_writable_does_no_harm(folder: Path, tmp_path: Path) -> None:
    broken = {"HOME": "/dev/null/home", "TMPDIR": "/dev/null/tmp", "XDG_CACHE_HOME": "", "HF_HOME": ""}
    env = {name: value for name, value in {**environment(), **broken}.items() if value}
    more = ("data.workers=1", f"data.cache_dir={tmp_path}/fresh")
    done = processes.run([sys.executable, *runs.command("pretrain", folder, *more)], env, limit_s=180)
    assert done.returncode == 0 and not runs.errors(done.stderr), done.stderr
