"""Whether mining again raises the metric: a small encoder from random weights, on any BEIR folder with three splits.

    PYTHONPATH=. python benchmarks/rounds.py --data BEIR_FOLDER [--work runs/rounds] [--rounds 2] [--seed 42]

Trains on the split `train` by examples/rounds.py: round 0 on pairs, each further round on negatives that the one before
found. `random` is the control: the same number of negatives, but any passages. All take the same number of steps from
the same weights; `test`, which nothing was chosen by, is measured at the end with a paired bootstrap.
The tokenizer sees the training texts alone.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from chassis.retrieval import read_beir
from examples.docstrings import make_encoder, train_tokenizer

ROOT = Path(__file__).parents[1]
STEPS, LENGTH, NEGATIVES = 400, 128, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a BEIR folder with qrels of train, dev and test")
    parser.add_argument("--work", default="runs/rounds")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seed", type=int, default=42)
    options = parser.parse_args()
    work = Path(options.work).resolve()

    train = work / "train.jsonl"
    if not (work / "encoder/model.safetensors").is_file():
        work.mkdir(parents=True, exist_ok=True)
        beir = read_beir(options.data, "train")
        document = dict(zip(beir.document_ids, beir.documents, strict=True))
        with train.open("w", encoding="utf-8") as file:
            for query, grades in zip(beir.queries, beir.relevant.values(), strict=True):
                answers = [document[found] for found, grade in grades.items() if grade > 0]
                file.write(json.dumps({"query": query, "pos": answers}) + "\n")
        rows = [json.loads(line) for line in train.open(encoding="utf-8")]
        passages, chance = sorted({text for row in rows for text in row["pos"]}), random.Random(options.seed)
        with (work / "random.jsonl").open("w", encoding="utf-8") as file:
            for row in rows:
                others = [text for text in chance.sample(passages, NEGATIVES + 4) if text not in row["pos"]]
                file.write(json.dumps({**row, "neg": others[:NEGATIVES]}) + "\n")
        texts = sorted({text for row in rows for text in (row["query"], *row["pos"])})
        train_tokenizer(texts, work / "encoder", vocabulary=8000, max_length=LENGTH)
        make_encoder(work / "encoder", seed=options.seed, max_length=LENGTH)

    finetune, window = recipes(work, options.data, train, options.seed)
    names = ["examples/rounds.py", "--finetune", finetune, "--mine", window, "--ranks", "2"]
    call(*names, "--rounds", str(options.rounds))
    control = work / "run-random"
    changes = [f"data.train=[{work}/random.jsonl]", "data.negatives_per_query=1", f"run.output_dir={control}"]
    torchrun("finetune", finetune, *changes)

    rounds = {f"round {number}": str(work / f"run-round-{number}/model") for number in range(options.rounds + 1)}
    models = {"round 0": rounds.pop("round 0"), "random negatives": f"{control}/model", **rounds}
    measured = {"models": models, "evaluate": {"data": options.data, "split": "test"}, "output_dir": str(work / "test")}
    call("launch/evaluate.py", "--config", write(work / "evaluate.yaml", measured))


def recipes(work: Path, data: str, train: Path, seed: int) -> tuple[str, str]:
    """Of fine-tuning and of mining."""
    finetune = {
        "run": {"name": "rounds", "output_dir": f"{work}/run", "seed": seed},
        "model": {"encoder": f"{work}/encoder", "max_length": LENGTH, "dropout": 0.0},
        "data": {
            "train": [str(train)],
            "negatives_per_query": 0,
            "query_max_length": 32,
            "passage_max_length": LENGTH,
            "cache_dir": f"{work}/cache",
            "workers": 1,
        },
        "loss": {"temperature": 0.035},
        "batch": {"global_size": 64, "micro_size": 32},
        "optim": {"name": "muon", "lr": 3e-3, "muon_lr": 3e-3, "weight_decay": 0.01, "clip_norm": 0},
        "schedule": {"steps": STEPS, "warmup_ratio": 0.06},
        "precision": "fp32",
        "engine": {"kind": "ddp"},
        "evaluate": {"data": data, "split": "dev", "every_steps": 200},
        "track": {"to": []},
    }
    mine = {
        "model": "",
        "data": [str(train)],
        "output": "",
        "mine": {"negatives": NEGATIVES, "first_rank": 0, "last_rank": 50, "relative_margin": 0.95, "seed": seed},
        "encode": {"precision": "fp32"},
    }
    return write(work / "finetune.yaml", finetune), write(work / "mine.yaml", mine)


def write(path: Path, recipe: dict[str, Any]) -> str:
    path.write_text(json.dumps(recipe, indent=2), encoding="utf-8")  # JSON is YAML
    return str(path)


def torchrun(door: str, recipe: str, *overrides: str) -> None:
    launcher = shutil.which("torchrun", path=str(Path(sys.executable).parent)) or "torchrun"
    ranks = ["--standalone", "--nproc-per-node", "2"]
    subprocess.run([launcher, *ranks, f"launch/{door}.py", "--config", recipe, *overrides], cwd=ROOT, check=True)


def call(*command: str) -> None:
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True)


if __name__ == "__main__":
    main()
