"""The demo: a search engine over the Python libraries of this environment, trained from nothing on two CPU cores.

    python examples/demo.py [--ablation]

Each step is skipped when its result is there, and training resumes from its last checkpoint; run it again at any time.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

RUNS = Path("runs/demo")
DATA, ENCODER = RUNS / "data", RUNS / "encoder"
STAGE_1, STAGE_2, WITHOUT_STAGE_1 = RUNS / "pretrain", RUNS / "finetune", RUNS / "finetune-without-pretraining"
CORPUS, HELDOUT = DATA / "library" / "corpus.jsonl", DATA / "heldout"
RANKS = 2
STOPPED = 3
"""Exit code of a training run that was asked to stop, after it has saved a checkpoint."""
QUESTIONS = ("similarity of two texts", "shortest path between two nodes", "normalize the rows of a matrix")
ENVIRONMENT = {
    "DS_ACCELERATOR": "cpu",
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",  # nothing is downloaded
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",  # of reading a file of 4 MB
    "TRANSFORMERS_VERBOSITY": "error",
}
TRAINING = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",  # processes tokenize side by side already
    # Keep the pages of large tensors instead of giving them back after each step: fewer page faults.
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 34),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--ablation", action="store_true", help="also train stage 2 without stage 1, for comparison")
    options = parser.parse_args()
    os.chdir(Path(__file__).resolve().parent.parent)  # recipes name their files from here
    os.environ.update(ENVIRONMENT)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    try:
        demo(ablation=options.ablation)
    except Failed as failure:
        print(f"error: {failure}", file=sys.stderr)
        return failure.exit_code
    except KeyboardInterrupt:
        print("\nstopped; the same command resumes from here", file=sys.stderr)
        return 130
    return 0


def demo(*, ablation: bool) -> None:
    start = time.perf_counter()
    data()
    models = {"untrained encoder": ENCODER}
    train("stage 1: RetroMAE pre-training under deepspeed, ZeRO-1", STAGE_1, deepspeed("pretrain"))
    models["after stage 1"] = STAGE_1 / "model"
    if ablation:
        command = torchrun("finetune", f"model.encoder={ENCODER}", f"run.output_dir={WITHOUT_STAGE_1}")
        train("for comparison: stage 2 without stage 1", WITHOUT_STAGE_1, command)
        models["stage 2 without stage 1"] = WITHOUT_STAGE_1 / "model"
    train("stage 2: contrastive fine-tuning under torchrun", STAGE_2, torchrun("finetune"))
    models["after stage 2"] = STAGE_2 / "model"

    say("all of them on the held-out packages")
    show(measure(models, RUNS))
    say("three questions to the held-out packages")
    search = [sys.executable, "launch/search.py", "--model", str(STAGE_2 / "model"), "--corpus", str(HELDOUT)]
    call([*search, "--top", "3", *QUESTIONS], "search")
    say(f"done in {(time.perf_counter() - start) / 60:.1f} minutes")
    print(f"model    {STAGE_2 / 'model'}   (opens with sentence-transformers and transformers)")
    print(f"reports  {STAGE_1 / 'report.html'}  {STAGE_2 / 'report.html'}")
    print(f'ask      {python()} launch/search.py --model {STAGE_2 / "model"} "shuffle the rows of a tensor"')
    print("         (all installed libraries; the first question waits a minute or two, until they are embedded)")


# --- steps -----------------------------------------------------------------------------------


def data() -> None:
    """Docstrings, tokenizer and encoder."""
    say("docstrings of the standard library and of the installed packages; a tokenizer; an encoder of random weights")
    summary = DATA / "summary.json"
    if not (summary.is_file() and (ENCODER / "model.safetensors").is_file()):
        call([sys.executable, "examples/docstrings.py", "--output", str(DATA), "--encoder", str(ENCODER)], "the data")
    counts = json.loads(summary.read_text(encoding="utf-8"))
    print(
        f"{counts['training_texts']:,} texts and {counts['training_pairs']:,} queries to train on; held out: "
        f"{counts['heldout_passages']:,} passages, {counts['heldout_queries']:,} queries"
    )


def train(what: str, folder: Path, command: Sequence[str]) -> None:
    """A stage by its command; it resumes by itself, and leaves `finished` in its summary.json."""
    say(what)
    summary = folder / "summary.json"
    if not read(summary).get("finished"):
        call(command, what.partition(":")[0], TRAINING)
    found = read(summary)
    if "search_corpus" not in found:  # what launch/search.py looks in unless told otherwise
        summary.write_text(json.dumps({**found, "search_corpus": str(CORPUS)}, indent=2) + "\n", encoding="utf-8")
    print(f"{found.get('steps', 0):,} steps in {found.get('seconds', 0):.0f} s: {folder / 'report.html'}")


def measure(models: dict[str, Path], folder: Path) -> list[dict[str, Any]]:
    """Rows of the table: BM25, each model, the last one with BM25; from folder/evaluation.json if it is up to date."""
    stored = folder / "evaluation.json"
    newest = max((path / "model.safetensors").stat().st_mtime for path in models.values())
    if stored.is_file() and stored.stat().st_mtime > newest:
        rows = json.loads(stored.read_text(encoding="utf-8"))["rows"]
        if [row["model"] for row in rows][1:-1] == list(models):
            return rows
    import torch

    from retrieval.evaluation.beir import read_beir
    from retrieval.evaluation.compare import compare, write

    beir = read_beir(HELDOUT)
    rows = compare(models, beir, device=torch.device("cpu"), progress=sys.stderr.isatty())
    write(folder, beir, "test", rows)
    return rows


def show(rows: Sequence[dict[str, Any]]) -> None:
    from retrieval.evaluation import results

    results.show(rows, "held-out packages: networkx, sklearn, sentence_transformers")


# --- processes -------------------------------------------------------------------------------


def deepspeed(stage: str, *overrides: str) -> list[str]:
    """The command of a stage; a port of its own, because deepspeed's default one may be taken."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = [beside_python("deepspeed"), "--num_accelerators", str(RANKS), "--master_port", str(port)]
    return [*launcher, "--log_level", "error", *command_line(stage), *overrides]


def torchrun(stage: str, *overrides: str) -> list[str]:
    return [beside_python("torchrun"), "--standalone", "--nproc-per-node", str(RANKS), *command_line(stage), *overrides]


def command_line(stage: str) -> list[str]:
    return [f"launch/{stage}.py", "--config", f"configs/{stage}/demo.yaml"]


def beside_python(program: str) -> str:
    """This environment's program, also where the environment is not activated."""
    return os.path.relpath(Path(sys.executable).with_name(program))


def call(command: Sequence[str], what: str, more: dict[str, str] | None = None) -> None:
    """Run to the end on this terminal; raises Failed, or KeyboardInterrupt once it has stopped in good order.

    The command gets a session of its own: Ctrl-C must reach the ranks, which save and stop, and not their launcher,
    which would kill them.
    """
    print("$", shlex.join(python() if part == sys.executable else part for part in command), flush=True)
    process = subprocess.Popen(command, env={**os.environ, **(more or {})}, start_new_session=True)
    interrupted = False
    while True:
        try:
            code = process.wait()
            break
        except KeyboardInterrupt:
            if interrupted:
                os.killpg(process.pid, signal.SIGKILL)  # asked twice
            else:
                stop(process.pid)
            interrupted = True
    if interrupted or code == STOPPED:
        raise KeyboardInterrupt
    if code:
        raise Failed(f"{what} failed with exit code {code} (its last lines above say why)", code)


def stop(process_id: int) -> None:
    """SIGTERM to the ranks below a launcher, that is to the first processes with a RANK; else to all of the session."""
    import psutil

    children = psutil.Process(process_id).children(recursive=True)
    placed = {child.pid: child for child in children if "RANK" in child.environ()}
    ranks = [child for child in placed.values() if child.ppid() not in placed]
    if not ranks:
        os.killpg(process_id, signal.SIGTERM)
    for rank in ranks:
        rank.terminate()


class Failed(Exception):
    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def _interrupt(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


# --- telling ---------------------------------------------------------------------------------


def say(what: str) -> None:
    from rich.console import Console

    Console(highlight=False).print(f"\n[bold]{what}[/bold]")


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def python() -> str:
    return os.path.relpath(sys.executable) if Path(sys.executable).is_relative_to(Path.cwd()) else "python"


if __name__ == "__main__":
    raise SystemExit(main())
