"""The faults of docs/reliability.md to torchrun with a plain transformers Trainer, on two CPU processes.

    PYTHONPATH=. python benchmarks/trainer_faults.py

A masked language model as small as that of benchmarks/soak.py, a checkpoint every 10 steps, resumed from the last one
if there is one: what Trainer's documentation shows. Prints a line for each fault.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

from tests import processes, tiny
from tests.faults import runs

STEPS, EVERY = 60, 10


def train(folder: Path, output: Path) -> None:
    """One rank."""
    from transformers import (
        AutoModelForMaskedLM,
        AutoTokenizer,
        DataCollatorForLanguageModeling,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )
    from transformers.trainer_utils import get_last_checkpoint

    class Record(TrainerCallback):
        def on_step_end(self, args, state, control, **more):  # type: ignore[no-untyped-def]
            if state.is_world_process_zero:
                (output / "step").write_text(str(state.global_step))
            time.sleep(0.05)  # else a run is over before a fault

    output.mkdir(exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(folder / "bert")
    rows = [tokenizer(text, truncation=True, max_length=32) for text in tiny.texts(40)]
    arguments = TrainingArguments(
        output_dir=str(output), max_steps=STEPS, save_steps=EVERY, save_total_limit=2, per_device_train_batch_size=8,
        learning_rate=1e-3, use_cpu=True, report_to=[], disable_tqdm=True, seed=42,
    )  # fmt: skip
    trainer = Trainer(
        model=AutoModelForMaskedLM.from_pretrained(folder / "bert"),
        args=arguments,
        train_dataset=rows,  # type: ignore[arg-type]
        data_collator=DataCollatorForLanguageModeling(tokenizer),
        callbacks=[Record()],
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(output)))
    trainer.save_model(str(output / "model"))


class Bench:
    """Runs in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = runs.prepare(folder)

    def launch(self, name: str) -> subprocess.Popen[str]:
        return processes.start([*runs.LAUNCHERS["torchrun"](), __file__, str(self.folder), str(self.folder / name)])

    def at_step(self, name: str, step: int) -> subprocess.Popen[str]:
        process = self.launch(name)
        processes.wait_until(lambda: self.step(name) >= step, process, limit_s=300)
        return process

    def step(self, name: str) -> int:
        path = self.folder / name / "step"
        return int(path.read_text() or 0) if path.exists() else 0

    def saved(self, name: str) -> int:
        return max((int(path.name[11:]) for path in (self.folder / name).glob("checkpoint-*")), default=0)

    def fault(self, name: str, act: Callable[[subprocess.Popen[str]], None], limit_s: float) -> str:
        """What is left of a run that gets it at step 25."""
        process = self.at_step(name, 25)
        family = psutil.Process(process.pid).children(recursive=True)
        start = time.monotonic()
        act(process)
        left = runs.left(family, limit_s=limit_s)
        seconds, said = time.monotonic() - start, processes.stop(process)
        for each in left:
            with suppress(psutil.NoSuchProcess):
                each.kill()
        names = "rank" if "rank      : 1" in said.replace("\t", " ") else "nothing"
        return (
            f"{len(left)} processes left after {seconds:.0f} s; step {self.step(name)}, saved {self.saved(name)}; "
            f"{said.count('Traceback (most recent')} tracebacks, {len(said.splitlines())} lines, which name {names}"
        )

    def weights(self, name: str) -> bytes:
        return (self.folder / name / "model/model.safetensors").read_bytes()

    def finish(self, name: str) -> tuple[int, str]:
        process = self.launch(name)
        _, said = processes.finish(process, limit_s=300)
        return process.returncode, said


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        bench, report = Bench(Path(name)), {}
        bench.finish("whole")
        bench.finish("again")
        same = bench.weights("again") == bench.weights("whole")
        report["none, twice"] = f"bit-identical: {same}"
        report["SIGTERM to all"] = bench.fault("term", lambda process: runs.to_group(process, signal.SIGTERM), 40)
        report["kill -9 of a rank"] = bench.fault("kill", lambda process: runs.ranks_of(process)[1].kill(), 40)
        report["kill -9 of the launcher"] = bench.fault("launcher", lambda process: process.kill(), 1.5)
        report["SIGSTOP of a rank"] = bench.fault("stop", lambda process: runs.ranks_of(process)[1].suspend(), 40)
        code, _ = bench.finish("kill")
        same = bench.weights("kill") == bench.weights("whole")
        report["resumed after kill -9"] = f"exit {code}, bit-identical: {same}"
        newest = bench.folder / f"term/checkpoint-{bench.saved('term')}/model.safetensors"
        newest.write_bytes(newest.read_bytes()[:-100])
        code, said = bench.finish("term")
        report["newest checkpoint cut"] = f"exit {code}, {said.count('Traceback (most recent')} tracebacks"
        for fault, outcome in report.items():
            print(json.dumps({"fault": fault, "outcome": outcome}), flush=True)


if __name__ == "__main__":
    train(Path(sys.argv[1]), Path(sys.argv[2])) if len(sys.argv) > 1 else main()
