"""Runs of two real ranks that are killed and stopped at random moments, start-up included, and started again.

    PYTHONPATH=. python benchmarks/soak.py [--kills 20] [--stops 100] [--seed 0] [--only NAME ...] [--output FILE]

Kills are of each kind of run, stops of all kinds together. After each `kill -9` (of one rank, of the launcher, or of
all) and each stop signal (to the launcher, or to all) the same command runs again, with no hand. In the end weights,
optimizer states and metrics must be those of an undisturbed run, to the last bit. Prints a table and the totals, and
fails if anything was lost; --output writes them to a file too.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_file

from tests import processes
from tests.faults import runs

COMBINATIONS = {
    "pretrain-zero1": ("pretrain", "torchrun", "engine.kind=deepspeed", "engine.zero_stage=1"),
    "pretrain-zero2": ("pretrain", "deepspeed", "engine.kind=deepspeed", "engine.zero_stage=2"),
    "finetune-ddp": ("finetune", "torchrun", "engine.kind=ddp"),
    "finetune-zero1": ("finetune", "deepspeed", "engine.kind=deepspeed", "engine.zero_stage=1"),
}
STEPS, EVERY = 120, 10
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
TIMED = ("samples_per_second", "tokens_per_second", "peak_memory_bytes")
"""Metrics that differ from run to run."""
LIMIT_SECONDS = 300.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="of each combination")
    parser.add_argument("--stops", type=int, default=100, help="signals, dealt to the combinations")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=list(COMBINATIONS), choices=list(COMBINATIONS))
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    rows = []
    for i, name in enumerate(options.only):
        stops = len(range(i, options.stops, len(options.only)))
        with tempfile.TemporaryDirectory() as folder:
            soak = Soak(runs.prepare(Path(folder)), name, random.Random(f"{options.seed}/{name}"))
            rows.append({"combination": name, **soak.run(options.kills, stops)})
        print(json.dumps(rows[-1]), flush=True)
    table = f"{as_table(rows)}\n\n{in_words(rows)}"
    print(table)
    if options.output is not None:
        command = f"PYTHONPATH=. python benchmarks/soak.py {' '.join(sys.argv[1:])}"
        machine = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
        options.output.write_text(f"# Killed, stopped, resumed\n\n`{command}` on {machine}:\n\n{table}\n")
    return int(any(row["different"] or row["lost"] or row["left"] or row["refused"] for row in rows))


class Soak:
    """One combination of stage, engine and launcher."""

    def __init__(self, folder: Path, name: str, rng: random.Random) -> None:
        self.folder, self.rng = folder, rng
        self.stage, self.launcher, *engine = COMBINATIONS[name]
        saving = f"checkpoint.every_steps={EVERY}"
        self.overrides = [*engine, "data.workers=1", "track.log_every=1", f"schedule.steps={STEPS}", saving]
        self.counts: Counter[str] = Counter()
        self.slowest_stop = 0.0
        self.start_seconds = 20.0

    def run(self, kills: int, stops: int) -> dict[str, Any]:
        whole, start = self.folder / "whole", time.monotonic()
        undisturbed = self.launch(whole)
        processes.wait_until((whole / "metrics.jsonl").is_file, undisturbed, limit_s=LIMIT_SECONDS)
        self.start_seconds = time.monotonic() - start
        self.finish(undisturbed)
        expected = outcome(whole)
        faults = ["kill"] * kills + ["stop"] * stops
        self.rng.shuffle(faults)
        while faults:
            self.counts["runs"] += 1
            parts = self.folder / f"parts-{self.counts['runs']}"
            while faults and (done := self.disturb(parts, faults[-1])) is not True:
                if done is None:
                    faults.pop()
            self.finish(self.launch(parts))
            self.counts["identical" if outcome(parts) == expected else "different"] += 1
        names = ("runs", "kills", "kills_before_step_1", "stops", "stops_before_step_1", "saved", "lost", "left")
        counts = {name: self.counts[name] for name in (*names, "refused", "identical", "different")}
        return {**counts, "slowest_stop_s": round(self.slowest_stop, 1)}

    def launch(self, run_folder: Path) -> subprocess.Popen[str]:
        recipe = self.folder / f"{self.stage}.yaml"
        options = [f"run.output_dir={run_folder}", *self.overrides]
        command = [*runs.LAUNCHERS[self.launcher](), f"launch/{self.stage}.py", "--config", str(recipe), *options]
        return processes.start(command)

    def finish(self, process: subprocess.Popen[str]) -> None:
        _, said = processes.finish(process, limit_s=LIMIT_SECONDS)
        if process.returncode != 0:
            self.counts["refused"] += 1
            print(said[-3000:], file=sys.stderr, flush=True)

    def disturb(self, run_folder: Path, fault: str) -> bool | None:
        """One start and one fault; true where the run was done before it."""
        before = last_step(run_folder)
        process = self.launch(run_folder)
        if not self.wait_for_moment(process, run_folder, before):
            self.finish(process)
            return True
        reached = last_step(run_folder)
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        self.counts[f"{fault}s"] += 1
        self.counts[f"{fault}s_before_step_1"] += reached == before
        start = time.monotonic()
        if fault == "kill":
            self.kill(process, family)
        else:
            self.stop(process)
        alive = runs.left(family[1:], limit_s=40)  # a launcher gives its ranks half a minute
        seconds = time.monotonic() - start
        self.counts["left"] += len(alive)
        for each in alive:
            each.kill()
        processes.finish(process, limit_s=30)
        if fault == "stop" and reached > before:
            self.slowest_stop = max(self.slowest_stop, seconds)
            self.counts["saved" if last_step(run_folder) == newest_checkpoint(run_folder) else "lost"] += 1
        return None

    def wait_for_moment(self, process: subprocess.Popen[str], run_folder: Path, before: int) -> bool:
        """Until a random moment of the start, or a random step; false where the run has ended first."""
        limit = time.monotonic() + LIMIT_SECONDS
        moment, step = limit, STEPS
        if self.rng.random() < 0.3:
            moment = time.monotonic() + self.rng.uniform(0.0, self.start_seconds)
        else:
            step = before + self.rng.randint(1, max(1, (STEPS - before) // 3))
        while process.poll() is None and time.monotonic() < moment and last_step(run_folder) < step:
            time.sleep(0.02)
        if time.monotonic() > limit:
            raise AssertionError(f"no step {step} within {LIMIT_SECONDS:g} s\n{processes.stop(process)}")
        time.sleep(self.rng.uniform(0.0, 0.2))
        return process.poll() is None

    def kill(self, process: subprocess.Popen[str], family: list[psutil.Process]) -> None:
        ranks = list(runs.ranks_of(process).values())
        target = self.rng.choice(["rank", "launcher", "all"])
        victims = [self.rng.choice(ranks)] if target == "rank" and ranks else family if target == "all" else family[:1]
        for victim in victims:
            with suppress(psutil.Error):
                victim.kill()

    def stop(self, process: subprocess.Popen[str]) -> None:
        number = self.rng.choice(STOP_SIGNALS)
        if self.rng.random() < 0.5:
            runs.to_group(process, number)
        else:
            process.send_signal(number)


def last_step(run_folder: Path) -> int:
    """The last one in metrics.jsonl."""
    with suppress(OSError, IndexError, ValueError):
        return json.loads((run_folder / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    return 0


def newest_checkpoint(run_folder: Path) -> int:
    return max((int(path.name[5:]) for path in (run_folder / "checkpoints").glob("step-*")), default=0)


def outcome(run_folder: Path) -> dict[str, Any]:
    """All that must be equal: bytes of tensors, and metrics without times."""
    checkpoint = run_folder / f"checkpoints/step-{STEPS:08d}"
    files = {"model": run_folder / "model/model.safetensors"}
    files |= {name: checkpoint / f"{name}.safetensors" for name in ("weights", "optimizer")}
    tensors = {
        f"{name}/{key}": tensor.numpy().tobytes()
        for name, path in files.items()
        if path.is_file()
        for key, tensor in load_file(path).items()
    }
    lines = (run_folder / "metrics.jsonl").read_text().splitlines()
    metrics = [{key: value for key, value in json.loads(line).items() if key not in TIMED} for line in lines]
    assert len(metrics) == STEPS or not tensors
    return {**tensors, "metrics": metrics}


def as_table(rows: list[dict[str, Any]]) -> str:
    names = [
        "combination", "kills", "kills_before_step_1", "stops", "stops_before_step_1", "saved", "lost", "left",
        "refused", "runs", "identical", "different", "slowest_stop_s",
    ]  # fmt: skip
    lines = [names, ["---"] + ["---:"] * (len(names) - 1), *([str(row[name]) for name in names] for row in rows)]
    return "\n".join(f"| {' | '.join(name.replace('_', ' ') for name in line)} |" for line in lines)


def in_words(rows: list[dict[str, Any]]) -> str:
    """The totals."""
    total = Counter[str]()
    for row in rows:
        total.update({name: row[name] for name in ("kills", "stops", "stops_before_step_1", "lost", "left", "runs")})
        total["identical"] += row["identical"]
    slowest = max(row["slowest_stop_s"] for row in rows)
    return (
        f"{total['stops']} stop signals, {total['stops_before_step_1']} of them before the first step: {total['lost']} "
        f"lost a step, the slowest took {slowest} s. After these and {total['kills']} kills {total['left']} processes "
        f"were left, and {total['identical']} of {total['runs']} runs ended as the undisturbed one."
    )


if __name__ == "__main__":
    raise SystemExit(main())
