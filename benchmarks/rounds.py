"""Whether mining again raises the metric: a small encoder, on any BEIR folder with three splits, on two processes.

    PYTHONPATH=. python benchmarks/rounds.py --data BEIR_FOLDER --texts raw.jsonl.gz [--work runs/rounds] [--rounds 2]

From random weights the encoder first learns to find a text by one of its sentences (the inverse cloze task, Lee et al.
2019); then examples/rounds.py trains it on the split `train`: round 0 on pairs, each further round from the same
weights on negatives that the one before found. `random` is the control: as many negatives, but any passages.
All take the same number of steps. `test`, which nothing was chosen by, is measured at the end, with a paired bootstrap.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from examples.docstrings import make_encoder, train_tokenizer
from lodestar.data.readers import read_json
from retrieval.evaluation.beir import read_beir

ROOT = Path(__file__).parents[1]
LENGTH = 128
BASE_STEPS, STEPS = 600, 150
MINED, NEGATIVES = 8, 3
"""Negatives of a row that are found, and of those in one step."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a BEIR folder with qrels of train, dev and test")
    parser.add_argument("--texts", required=True, help="JSONL with `text`, gz or not")
    parser.add_argument("--work", default="runs/rounds")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seed", type=int, default=42)
    options = parser.parse_args()
    work = Path(options.work).resolve()
    work.mkdir(parents=True, exist_ok=True)
    prepare(work, options.data, Path(options.texts), random.Random(options.seed))

    base = recipe(work, "base", options, f"{work}/encoder", f"{work}/cloze.jsonl", steps=BASE_STEPS)
    torchrun("finetune", base)
    tuned = recipe(work, "run", options, f"{work}/base/model", f"{work}/train.jsonl", steps=STEPS)
    mine = {
        "model": "",
        "data": [""],
        "output": "",
        "mine": {"negatives": MINED, "first_rank": 0, "last_rank": 50, "relative_margin": 0.95},
        "encode": {"precision": "fp32"},
    }
    mining = ["--mine", write(work / "mine.yaml", mine), "--rounds", str(options.rounds)]
    python("examples/rounds.py", "--finetune", tuned, *mining, "--ranks", "2", "--negatives", str(NEGATIVES))
    control = recipe(work, "random", options, f"{work}/base/model", f"{work}/random.jsonl", steps=STEPS)
    torchrun("finetune", control, f"data.negatives_per_query={NEGATIVES}")

    names = ["run-round-0", "base", "random", *(f"run-round-{number}" for number in range(1, options.rounds + 1))]
    models = {name.removeprefix("run-").replace("-", " "): f"{work}/{name}/model" for name in names}
    measured = {"models": models, "evaluate": {"data": options.data, "split": "test"}, "output_dir": f"{work}/test"}
    python("launch/evaluate.py", "--config", write(work / "evaluate.yaml", measured))


def prepare(work: Path, data: str, raw: Path, chance: random.Random) -> None:
    """Training files, a tokenizer of their words, and an encoder of chance."""
    if (work / "encoder/model.safetensors").is_file():
        return
    beir = read_beir(data, "train")
    document = dict(zip(beir.document_ids, beir.documents, strict=True))
    rows = [
        {"query": query, "pos": [document[found] for found, grade in grades.items() if grade > 0]}
        for query, grades in zip(beir.queries, beir.relevant.values(), strict=True)
    ]
    passages = sorted({text for row in rows for text in row["pos"]})
    drawn = ([text for text in chance.sample(passages, MINED + 20) if text not in row["pos"]] for row in rows)
    cloze = list(without_a_sentence((row["text"] for _, row in read_json(raw)), chance))
    files = {
        "train": rows,
        "random": [{**row, "neg": others[:MINED]} for row, others in zip(rows, drawn, strict=True)],
        "cloze": cloze,
    }
    for name, those in files.items():
        with (work / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in those)
    texts = [text for row in [*rows, *cloze] for text in (row["query"], *row["pos"])]
    train_tokenizer(texts, work / "encoder", vocabulary=8000, max_length=LENGTH)
    make_encoder(work / "encoder", max_length=LENGTH)


def without_a_sentence(texts: Iterable[str], chance: random.Random) -> Iterator[dict[str, Any]]:
    """A sentence as query, the text around it as passage; one time in ten the whole text."""
    for text in texts:
        sentences = re.split(r"(?<=[.!?])\s+", text)
        long = [i for i, sentence in enumerate(sentences) if len(sentence) > 25]
        if len(sentences) >= 3 and long:
            taken = chance.choice(long)
            rest = " ".join(sentences[:taken] + sentences[taken + 1 :])
            yield {"query": sentences[taken], "pos": [rest if chance.random() < 0.9 else text]}


def recipe(work: Path, name: str, options: argparse.Namespace, encoder: str, train: str, *, steps: int) -> str:
    """Of fine-tuning; the same numbers for every model, tuned on `dev`."""
    content = {
        "run": {"name": name, "output_dir": f"{work}/{name}", "seed": options.seed},
        "model": {"encoder": encoder, "max_length": LENGTH, "dropout": 0.0},
        "data": {
            "train": [train],
            "negatives_per_query": 0,
            "query_max_length": 32,
            "passage_max_length": LENGTH,
            "cache_dir": f"{work}/cache",
            "workers": 1,
        },
        "loss": {"temperature": 0.035},
        "batch": {"global_size": 64, "micro_size": 32},
        "optim": {"name": "muon", "lr": 3e-3, "muon_lr": 3e-3, "weight_decay": 0.01, "clip_norm": 0},
        "schedule": {"steps": steps, "warmup_ratio": 0.06},
        "precision": "fp32",
        "engine": {"kind": "ddp"},
        "evaluate": {"data": options.data, "split": "dev", "every_steps": steps // 2},
        "track": {"to": []},
    }
    return write(work / f"{name}.yaml", content)


def write(path: Path, content: dict[str, Any]) -> str:
    path.write_text(json.dumps(content, indent=2), encoding="utf-8")  # JSON is YAML
    return str(path)


def torchrun(command: str, recipe: str, *overrides: str) -> None:
    launcher = shutil.which("torchrun", path=str(Path(sys.executable).parent)) or "torchrun"
    ranks = ["--standalone", "--nproc-per-node", "2"]
    subprocess.run([launcher, *ranks, f"launch/{command}.py", "--config", recipe, *overrides], cwd=ROOT, check=True)


def python(*command: str) -> None:
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True)


if __name__ == "__main__":
    main()
