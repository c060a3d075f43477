"""The shipped batch scripts on a real SLURM of simulated nodes: signalled, saved, requeued, and exact.

`make slurm` installs SLURM where it can (root and apt); without it these tests skip themselves.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

from tests import processes, tiny
from tests.processes import ROOT

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
MISSING = [name for name in NEEDED if shutil.which(name) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)} (make slurm)"),
    pytest.mark.skipif(os.geteuid() != 0, reason="SLURM's daemons want root"),
]


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


NODES = ("n1", "n2", "n3", "n4")


class Cluster:
    """Nodes of one core on this machine, enough for two jobs, with daemons of their own in a folder of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder, host = folder, socket.gethostname()
        control, *ports = free_ports(1 + len(NODES))
        key = folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        folder.chmod(0o755)
        self.conf = folder / "slurm.conf"
        self.conf.write_text(
            f"ClusterName=test\nSlurmctldHost={host}(127.0.0.1)\nSlurmctldPort={control}\n"
            f"AuthType=auth/munge\nAuthInfo=socket={folder}/munge.socket,cred_expire=10\nCryptoType=crypto/munge\n"
            f"SlurmUser=root\nSlurmdUser=root\nStateSaveLocation={folder}/state\nSlurmdSpoolDir={folder}/spool-%n\n"
            f"SlurmctldPidFile={folder}/ctld.pid\nSlurmdPidFile={folder}/%n.pid\n"
            f"SlurmctldLogFile={folder}/ctld.log\nSlurmdLogFile={folder}/%n.log\n"
            "ProctrackType=proctrack/linuxproc\nTaskPlugin=task/none\nJobAcctGatherType=jobacct_gather/none\n"
            "SelectType=select/cons_tres\nSelectTypeParameters=CR_Core\nSlurmdParameters=config_overrides\n"
            "ReturnToService=2\nMpiDefault=none\nKillWait=30\nSchedulerType=sched/backfill\n"
            + "".join(
                f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=1 State=UNKNOWN\n"
                for node, port in zip(NODES, ports, strict=True)
            )
            + "PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP\n"
        )
        self.env = {**os.environ, "SLURM_CONF": str(self.conf)}
        self.daemons: list[subprocess.Popen[str]] = []

    def start(self) -> None:
        folder = self.folder
        munge = [f"--{name}={folder}/munge.{name.split('-')[0]}" for name in ("socket", "log-file", "pid-file")]
        self._daemon("munged", "--foreground", "--force", f"--key-file={folder}/munge.key", *munge,
                     f"--seed-file={folder}/munge.seed")  # fmt: skip
        self.wait(lambda: (folder / "munge.socket").exists(), "munged")
        self._daemon("slurmctld", "-D", "-i", "-c", "-f", str(self.conf))
        for node in NODES:
            self._daemon("slurmd", "-D", "-c", "-N", node, "-f", str(self.conf))
        count = str(len(NODES))
        self.wait(lambda: self.run("sinfo", "-h", "-t", "idle", "-o", "%D").strip() == count, f"{count} idle nodes")

    def stop(self) -> None:
        for daemon in reversed(self.daemons):
            daemon.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + 5
        for daemon in self.daemons:
            try:
                daemon.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                daemon.kill()

    def run(self, *command: str, **env: str) -> str:
        found = processes.run(command, {**self.env, **env}, limit_s=60)
        return found.stdout if found.returncode == 0 else f"{found.stdout}{found.stderr}"

    def _daemon(self, *command: str) -> None:
        log = open(self.folder / f"{command[0]}.out", "ab")  # noqa: SIM115 (the daemon's)
        self.daemons.append(processes.start(command, self.env, stdout=log, stderr=log))

    def wait(self, ready: Callable[[], object], what: str, seconds: float = 30, every: float = 0.3) -> None:
        """AssertionError with the ends of all logs, of daemons and jobs, where that takes too long."""
        deadline = time.monotonic() + seconds
        while not ready():
            if time.monotonic() > deadline:
                logs = "".join(path.read_text(errors="replace")[-4000:] for path in self.folder.glob("*.[lo][ou][gt]"))
                raise AssertionError(f"{what}: not after {seconds} s\n{logs}")
            time.sleep(every)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    made = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        made.start()
        yield made
    finally:
        made.stop()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data with a space; $(touch evaluated)")
    tiny.encoder(folder / "bert", "bert", dropout=0.1)
    tiny.pretrain_file(folder / "pretrain.jsonl", 200)
    tiny.finetune_file(folder / "finetune.jsonl", 200)
    return folder


def overrides(stage: str, data: Path, run: Path, steps: int) -> list[str]:
    """Nothing but size: what makes a recipe of 24 or 48 devices one of two cores."""
    more = ["data.query_max_length=48", "data.passage_max_length=32"] if stage == "finetune" else []
    return [
        f"run.output_dir={run}",
        f"model.encoder={data}/bert",
        "model.max_length=32",
        f'data.train=["{data}/{stage}.jsonl"]',
        f"data.cache_dir={data}/cache",
        "data.processes=1",
        "data.workers=1",
        "batch.global_size=16",
        "schedule.epochs=null",
        f"schedule.steps={steps}",
        "precision=fp32",
        "track.to=[]",
        "track.log_every=1",
        *more,
    ]


def submit(cluster: Cluster, stage: str, arguments: list[str], *options: str) -> str:
    recipe = {"pretrain": "configs/pretrain/24gpu.yaml", "finetune": "configs/finetune/48gpu.yaml"}[stage]
    size = ["--nodes=2", "--gpus-per-node=0", "--cpus-per-task=1", f"--output={cluster.folder}/{stage}-%j.out"]
    said = cluster.run(
        "sbatch", "--parsable", *size, *options, f"launch/slurm/{stage}.sbatch", recipe, *arguments,
        PYTHON=sys.executable, RANKS_PER_NODE="1", OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu",
    )  # fmt: skip
    assert said.strip().isdigit(), said
    return said.strip()


def ended(cluster: Cluster, job: str, seconds: float) -> str:
    """The job's last state, and how often it was requeued."""
    deadline = time.monotonic() + seconds
    while True:
        told = cluster.run("scontrol", "show", "job", job)
        state = dict(part.split("=", 1) for part in told.split() if "=" in part)
        if state.get("JobState") in ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL"):
            return f"{state['JobState']} after {state['Restarts']} restarts"
        logs = "".join(path.read_text(errors="replace")[-4000:] for path in cluster.folder.glob(f"*-{job}.out"))
        assert time.monotonic() < deadline, f"job {job}: {told}\n{logs}"
        time.sleep(1)


def log(cluster: Cluster, job: str) -> str:
    return "".join(path.read_text(errors="replace") for path in cluster.folder.glob(f"*-{job}.out"))


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_a_job_that_meets_its_limit_goes_on_to_the_same_weights(
    stage: str, cluster: Cluster, data: Path, tmp_path: Path
) -> None:
    steps = 40  # the signal comes by the fifth
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    undisturbed = submit(cluster, stage, overrides(stage, data, whole, steps), "--time=10")
    job = submit(cluster, stage, overrides(stage, data, parts, steps), "--time=10")
    cluster.wait((parts / "metrics.jsonl").is_file, f"job {job}: metrics", 120, every=0.05)
    cluster.run("scancel", "--signal=USR1", job)
    assert ended(cluster, job, 400) == "COMPLETED after 1 restarts", log(cluster, job)
    assert "run: stopped" in log(cluster, job) and "run: finished" in log(cluster, job)
    assert ended(cluster, undisturbed, 300) == "COMPLETED after 0 restarts", log(cluster, undisturbed)
    assert json.loads((whole / "environment.json").read_text())["world_size"] == 2
    last = f"checkpoints/step-{steps:08d}/weights.safetensors"
    first, second = load_file(whole / last), load_file(parts / last)
    assert all(first[name].equal(second[name]) for name in first)
    assert not (ROOT / "evaluated").exists()


def test_the_signal_before_a_real_time_limit_saves_and_requeues(cluster: Cluster, data: Path, tmp_path: Path) -> None:
    """SLURM itself sends it, up to a minute early: the shortest limits take two minutes."""
    run = tmp_path / "run"
    arguments = overrides("finetune", data, run, 10**6)
    limits = ("--time=2", "--signal=USR1@45", "--nodes=1")
    job, submitted = submit(cluster, "finetune", arguments, *limits), time.monotonic()
    cluster.wait((run / "metrics.jsonl").is_file, f"job {job}: metrics", 120)
    ranks = [process for process in psutil.process_iter(["cmdline"]) if is_rank(process, run)]
    assert ranks
    try:
        if time.monotonic() < submitted + 40:  # the signal, before which SLURM sends SIGCONT, comes after 45 seconds
            for rank in ranks:
                rank.suspend()  # it would take the time of other tests
        cluster.wait(
            lambda: "Restarts=1" in cluster.run("scontrol", "show", "job", job), f"job {job}: requeued", 180, every=1
        )
    finally:
        for rank in ranks:
            with suppress(psutil.NoSuchProcess):
                rank.kill()
    told = log(cluster, job)
    assert "run: stopped" in told and "stopped by SIGUSR1" in told and "DUE TO TIME LIMIT" not in told
    step = int(told.partition("stopped by SIGUSR1 at step ")[2].partition(";")[0])
    assert (run / f"checkpoints/step-{step:08d}/manifest.json").is_file()
    cluster.wait(lambda: f"resumes from step {step} " in log(cluster, job), f"job {job}: resumed", 120)
    cluster.run("scancel", job)


def is_rank(process: psutil.Process, run: Path) -> bool:
    """Whether it is a rank, or its loader's worker, in this run folder."""
    words = process.info["cmdline"] or [""]  # type: ignore[attr-defined]
    return words[0] == sys.executable and "torch.distributed.run" not in words and f"run.output_dir={run}" in words
