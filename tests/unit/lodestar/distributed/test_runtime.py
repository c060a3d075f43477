"""Placement, counter-based random numbers, the learning rate, throughput, console and metrics."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path

import pytest
import torch

from lodestar import rng
from lodestar.config.schema import TrackConfig
from lodestar.distributed.runtime import Placement, joined
from lodestar.errors import LaunchError
from lodestar.reporting.throughput import Console, Throughput
from lodestar.reporting.trackers import Tracker, read_metrics
from lodestar.training.schedule import lr_factor
from tests import processes

SRUN = {"SLURM_PROCID": "5", "SLURM_NTASKS": "24", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "0"}
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "3"}


@pytest.mark.parametrize(
    ("env", "placement"),
    [
        ({}, Placement(0, 1, 0)),
        (TORCHRUN, Placement(3, 8, 3)),
        (SRUN, Placement(5, 24, 1)),
        ({**SRUN, **TORCHRUN}, Placement(3, 8, 3)),  # torchrun started by srun
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "24", "SLURM_LOCALID": "0"}, Placement(0, 1, 0)),  # in a batch script
    ],
)
def test_the_launchers_environment_gives_the_placement(env: dict[str, str], placement: Placement) -> None:
    assert Placement.from_env(env) == placement


def test_half_an_environment_is_an_error() -> None:
    with pytest.raises(LaunchError, match="environment: WORLD_SIZE, LOCAL_RANK: not set"):
        Placement.from_env({"RANK": "0"})


def test_deepspeed_is_told_of_a_cpu_in_every_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate imports it to save a model; without the name it warns of a missing GPU."""
    monkeypatch.setenv("DS_ACCELERATOR", "")  # so that it is restored
    monkeypatch.delenv("DS_ACCELERATOR")
    with joined(Placement(0, 1, 0)) as runtime:
        assert os.environ.get("DS_ACCELERATOR") == ("cpu" if runtime.device.type == "cpu" else None)


def test_a_draw_depends_on_its_key_alone() -> None:
    keys = torch.arange(1000)
    assert rng.hashed(keys, 3).equal(rng.hashed(keys, 3))
    assert rng.hashed(keys, 3)[500:].equal(rng.hashed(keys[500:], 3))
    assert not rng.hashed(keys, 3).equal(rng.hashed(keys, 4))
    draws = rng.uniform(keys, 1)
    assert float(draws.min()) >= 0 and float(draws.max()) < 1 and abs(float(draws.mean()) - 0.5) < 0.03
    assert rng.key("a", "b") != rng.key("b", "a")


def test_the_generator_is_the_published_splitmix64() -> None:
    """First outputs of the reference implementation for the state 0, without the top bit, which `rng` drops."""
    golden = -7046029254386353131
    states = torch.tensor([1, 2, 3]) * golden
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [number % 2**64 for number in rng._mix(states).tolist()] == expected


@pytest.mark.parametrize("size", [1, 2, 3, 17, 64, 1000])
def test_a_shuffle_by_position_is_a_permutation(size: int) -> None:
    positions = torch.arange(size)
    shuffled = rng.permuted(positions, size, 7, "order", 0)
    assert sorted(shuffled.tolist()) == positions.tolist()
    if size > 16:
        assert not shuffled.equal(rng.permuted(positions, size, 7, "order", 1))
        assert shuffled[5:9].equal(rng.permuted(positions[5:9], size, 7, "order", 0))


@pytest.mark.parametrize(("step", "factor"), [(0, 0.25), (3, 1.0), (4, 1.0), (9, 0.5), (14, 0.0)])
def test_the_learning_rate_rises_and_falls(step: int, factor: float) -> None:
    assert lr_factor(step, total=14, warmup=4, floor=0.0, shape="linear") == pytest.approx(factor)


def test_the_other_shapes() -> None:
    def at(step: int, shape: str) -> float:
        return lr_factor(step, total=10, warmup=0, floor=0.1, shape=shape)

    assert at(0, "cosine") == 1.0 and at(5, "cosine") == pytest.approx(0.55) and at(10, "cosine") == pytest.approx(0.1)
    assert at(10, "linear") == pytest.approx(0.1) and at(9, "constant") == 1.0


def test_throughput_reads_rates_and_resets() -> None:
    times = iter([0.0, 2.0, 2.0, 3.0, 3.0])
    throughput = Throughput(lambda: next(times))
    for _ in range(2):
        throughput.add(samples=5, tokens=60, padded_tokens=80)
    rates = throughput.read()
    assert (rates["samples_per_second"], rates["tokens_per_second"], rates["padding_share"]) == (5.0, 60.0, 0.25)
    assert rates["peak_memory_bytes"] > 1e6
    assert throughput.read()["samples_per_second"] == 0


def test_without_a_terminal_the_console_writes_lines(capsys: pytest.CaptureFixture[str]) -> None:
    times = iter([0.0, 30.0])
    console = Console(total=1200, initial=200, enabled=True, clock=lambda: next(times))
    console.update(300, loss=1.25, texts_per_second=1234.5)
    Console(total=9, initial=0, enabled=False).update(3, loss=1.0, texts_per_second=1.0)
    console.close()
    assert capsys.readouterr().err == "step 300/1,200  loss 1.25  1,234 texts/s  0:04:30 left\n"


def test_metrics_are_lines_and_a_resumed_run_deletes_later_ones(tmp_path: Path) -> None:
    tracker = Tracker.open(tmp_path, TrackConfig(), "run", TrackConfig(), {})
    for step in (1, 2, 3):
        tracker.log({"step": step, "loss": math.nan if step == 2 else 1.0 / step})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')  # incomplete: the run was killed
    tracker.resume_at(2)
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": None}]
    Tracker.silent().log({"step": 1})


FAULTS = """
import resource, sys, torch
from lodestar.distributed.runtime import keep_pages
if sys.argv[1] == "kept":
    keep_pages()
for _ in range(30):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(1 << 24)  # 64 MiB
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="pages of glibc")
def test_large_tensors_take_the_pages_of_those_before_once_pages_are_kept() -> None:
    kept, returned = (
        int(processes.run([sys.executable, "-c", FAULTS, what], processes.environment(), limit_s=60).stdout)
        for what in ("kept", "returned")
    )
    assert kept == 0 and returned > 30
