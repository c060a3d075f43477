"""The demos: a search engine over the documentation of Python packages, trained on two CPU cores.

    python examples/demo.py                 from random weights, through both stages
    python examples/demo.py --ablation      also stage 2 without stage 1, for comparison
    python examples/demo.py --pretrained    from a small pre-trained encoder, with and without stage 1

Each step is skipped when its result is there, and training resumes from its last checkpoint; run it again at any time.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console

from examples import minilm
from examples.launching import call, deepspeed, python, torchrun
from lodestar.errors import LodestarError

DATA = Path("runs/demo/data")
HELDOUT = DATA / "heldout"
QUESTIONS = ("similarity of two texts", "shortest path between two nodes", "normalize the rows of a matrix")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--ablation", action="store_true", help="also train stage 2 without stage 1")
    parser.add_argument("--pretrained", action="store_true", help="start from a pre-trained encoder, all-MiniLM-L6-v2")
    options = parser.parse_args()
    os.chdir(Path(__file__).resolve().parent.parent)  # recipes name their files from here
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    start = time.perf_counter()
    try:
        demo = from_pretrained() if options.pretrained else from_random_weights(ablation=options.ablation)
        finish(*demo, start)
    except LodestarError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("\nstopped; the same command resumes from here", file=sys.stderr)
        return 130
    return 0


# --- the two demos ---------------------------------------------------------------------------


def from_random_weights(*, ablation: bool) -> tuple[Path, Path]:
    """Returns the folders of the run of both stages and of the evaluation."""
    encoder, alone = Path("runs/demo/encoder"), Path("runs/demo/finetune-alone")
    stage_1, stage_2 = Path("runs/demo/pretrain"), Path("runs/demo/finetune")
    data(encoder)
    config = ("--config", "configs/pretrain/demo.yaml")
    train("stage 1: RetroMAE pre-training under deepspeed, ZeRO-1", stage_1, deepspeed("pretrain", *config))
    config = ("--config", "configs/finetune/demo.yaml")
    train("stage 2: contrastive fine-tuning under torchrun", stage_2, torchrun("finetune", *config))
    if not ablation:
        return stage_2, evaluate("configs/evaluate/demo.yaml", Path("runs/demo/evaluation"), [stage_1, stage_2])
    overrides = (f"model.encoder={encoder}", f"run.output_dir={alone}")
    train("for comparison: stage 2 without stage 1", alone, torchrun("finetune", *config, *overrides))
    runs = [stage_1, stage_2, alone]
    return stage_2, evaluate("configs/evaluate/demo_ablation.yaml", Path("runs/demo/ablation"), runs)


def from_pretrained() -> tuple[Path, Path]:
    """Returns the folders of the run of both stages and of the evaluation."""
    encoder, runs = Path("runs/demo-pretrained/encoder"), Path("runs/demo-pretrained")
    adapted, tuned, both = runs / "pretrain", runs / "finetune-alone", runs / "finetune"
    say("a pre-trained encoder: all-MiniLM-L6-v2, 23 million parameters")
    if not encoder.is_dir():
        minilm.fetch(encoder)
    print(encoder)
    data()
    config = ("--config", "configs/finetune/demo_pretrained.yaml")
    overrides = (f"model.encoder={encoder}", f"run.output_dir={tuned}")
    train("fine-tuned as it is", tuned, torchrun("finetune", *config, *overrides))
    adapt = deepspeed("pretrain", "--config", "configs/pretrain/demo_pretrained.yaml")
    train("RetroMAE pre-training on the docstrings", adapted, adapt)
    train("fine-tuned after that", both, torchrun("finetune", *config))
    return both, evaluate("configs/evaluate/demo_pretrained.yaml", runs / "evaluation", [adapted, tuned, both])


# --- steps -----------------------------------------------------------------------------------


def data(encoder: Path | None = None) -> None:
    """Docstrings; with `encoder`, also a tokenizer of their words and an encoder of random weights, in that folder."""
    say("docstrings of installed packages" + ("; a tokenizer; an encoder of random weights" if encoder else ""))
    summary = DATA / "summary.json"
    if not (summary.is_file() and (encoder is None or (encoder / "model.safetensors").is_file())):
        more = ["--encoder", str(encoder)] if encoder else []
        call([sys.executable, "-m", "examples.docstrings", "--output", str(DATA), *more], "the data")
    counts = read(summary)
    print(
        f"{counts['training_texts']:,} texts and {counts['training_pairs']:,} queries to train on; held out: "
        f"{counts['heldout_passages']:,} passages, {counts['heldout_queries']:,} queries"
    )


def train(what: str, folder: Path, command: Sequence[str]) -> None:
    """A stage by its command; it resumes by itself, and leaves `finished` in its summary.json."""
    say(what)
    summary = folder / "summary.json"
    if not read(summary).get("finished"):
        call(command, what)
    result = read(summary)
    if "search_corpus" not in result:  # what launch/search.py looks in unless told otherwise
        corpus = str(DATA / "library" / "corpus.jsonl")
        summary.write_text(json.dumps({**result, "search_corpus": corpus}, indent=2) + "\n", encoding="utf-8")
    print(f"{result.get('steps', 0):,} steps in {result.get('seconds', 0):.0f} s: {folder / 'report.html'}")


def evaluate(config: str, folder: Path, runs: Sequence[Path]) -> Path:
    """The table of all models, measured again only when one of them is newer; returns `folder`."""
    say("all of them on packages that nothing was trained on: networkx, sklearn, sentence_transformers")
    stored = folder / "evaluation.json"
    newest = max((run / "model" / "model.safetensors").stat().st_mtime for run in runs)
    if stored.is_file() and stored.stat().st_mtime > newest:
        from retrieval.evaluation import results  # and torch with it

        results.show(read(stored)["rows"], str(HELDOUT))
    else:
        call(torchrun("evaluate", "--config", config), "the evaluation")
    return folder


def finish(run: Path, evaluation: Path, start: float) -> None:
    """Three questions, and what to do next."""
    say("three questions to the held-out packages")
    model = run / "model"
    search = [sys.executable, "launch/search.py", "--model", str(model), "--corpus", str(HELDOUT)]
    call([*search, "--top", "3", *QUESTIONS], "search")
    say(f"done in {(time.perf_counter() - start) / 60:.1f} minutes; what next:")
    print(f'ask            {python()} launch/search.py --model {model} "shuffle the rows of a tensor"')
    print("               (all packages; the first question waits a minute, until their texts are embedded)")
    print(f"look           {run / 'report.html'}  {evaluation / 'evaluation.html'}")
    print(f"use            SentenceTransformer({str(model)!r})  (transformers opens it too)")
    print("your own data  docs/custom.md: from a CSV file to search results")


# --- telling ---------------------------------------------------------------------------------


def say(what: str) -> None:
    Console(highlight=False).print(f"\n[bold]{what}[/bold]")


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _interrupt(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    raise SystemExit(main())
