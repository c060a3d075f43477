"""Rounds of mining: train, find hard negatives with what was trained, train again from the same encoder on them.

    python examples/rounds.py --finetune FINE_TUNING_RECIPE --mine MINING_RECIPE [--rounds 2] [--ranks 2]

Round 0 is the fine-tuning recipe as it is. Round r mines with round r - 1's model for the recipe's data.train, and
trains on what was found, with the same number of steps. Results lie beside run.output_dir; run again, it goes on.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from contrastive.config import FinetuneRecipe
from lodestar.config.loader import load
from lodestar.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--finetune", required=True, metavar="FILE", help="a recipe with evaluate.data")
    parser.add_argument("--mine", required=True, metavar="FILE")
    parser.add_argument("--rounds", type=int, default=2, metavar="N")
    parser.add_argument("--ranks", type=int, default=1, metavar="N", help="processes on this machine")
    parser.add_argument("--negatives", type=int, default=1, metavar="N", help="of each query in a step")
    options = parser.parse_args()

    try:
        recipe = load(FinetuneRecipe, options.finetune, [])
    except ConfigError as error:
        raise SystemExit(f"error: {error}") from None
    if not recipe.evaluate.data:
        raise SystemExit(f"error: {options.finetune}: evaluate.data: not set (rounds are compared by it)")
    if len(recipe.data.sets) > 1:
        raise SystemExit(f"error: {options.finetune}: data.train: {len(recipe.data.sets)} sets (rounds take one)")
    train = json.dumps([each.path for each in recipe.data.sets])
    folders = [Path(f"{recipe.run.output_dir}-round-{number}") for number in range(options.rounds + 1)]
    for number, folder in enumerate(folders):
        changes = [f"run.output_dir={folder}"]
        if number:
            mined = folder / "mined.jsonl"
            folder.mkdir(parents=True, exist_ok=True)
            call(
                "mine",
                options.mine,
                options.ranks,
                f"model={folders[number - 1]}/model",
                f"data={train}",
                f"output={mined}",
            )
            changes += [f"data.train=[{mined}]", f"data.negatives_per_query={options.negatives}"]
        call("finetune", options.finetune, options.ranks, *changes)
    for number, folder in enumerate(folders):
        final = json.loads((folder / "summary.json").read_text(encoding="utf-8"))["final"]
        print(f"round {number}: nDCG@10 {final['ndcg_at_10']:.4f}, MRR@10 {final['mrr_at_10']:.4f}: {folder}")


def call(command: str, recipe: str, ranks: int, *overrides: str) -> None:
    """A command on so many processes; ends this one where it fails."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    found = subprocess.run([sys.executable, *launcher, f"{ROOT}/launch/{command}.py", "--config", recipe, *overrides])
    if found.returncode:
        raise SystemExit(found.returncode)


if __name__ == "__main__":
    main()
