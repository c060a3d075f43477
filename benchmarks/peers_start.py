"""Seconds from the start of a fine-tuning run to its first step, and of its imports.

python -m benchmarks.peers_start FOLDER

The first run in a folder writes down which modules a run imports; those after it import them first, by the clock.
"""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any


class FirstStep(Exception):
    """The run has come so far."""


def main(folder: Path) -> None:
    modules, problem = folder / "modules.json", json.loads((folder / "problem.json").read_text())
    started = time.perf_counter()
    for name in json.loads(modules.read_text()) if modules.exists() else []:
        with suppress(Exception):  # some are parts of others
            import_module(name)
    imported = time.perf_counter()

    from contrastive.cli import main as finetune
    from contrastive.stage import FinetuneStage

    def backward(self: FinetuneStage, *arguments: Any) -> Any:
        raise FirstStep

    FinetuneStage.backward = backward  # type: ignore[method-assign]
    rows = [{"query": query, "pos": [pos], "neg": [neg]} for query, pos, neg in problem["triples"]]
    train = folder / "start.jsonl"
    if not train.exists():
        train.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = f"{folder}/start-{os.getpid()}"  # a run that crashes at one step three times is not started again
    overrides = (f"run.output_dir={run}", f"model.encoder={problem['encoder']}", "schedule.steps=10",
                 "optim.lr=1e-5", "model.max_length=128", f"data.train=[{train}]", f"data.cache_dir={folder}/cache",
                 "batch.global_size=32", "precision=fp32", "checkpoint.resume=none")  # fmt: skip
    empty = folder / "start.yaml"
    empty.write_text("{}\n")
    with suppress(FirstStep):
        finetune(["--config", str(empty), *overrides])
        raise AssertionError("it ended before a step")
    now = time.perf_counter()
    if not modules.exists():
        modules.write_text(json.dumps(sorted(sys.modules)))
    print(json.dumps({"imports_s": imported - started, "start_s": now - imported}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
