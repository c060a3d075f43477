"""The table of docs/scaling.md: steps of the 48gpu recipe on paper, from 8 to 1,024 devices, as `--plan` computes them.

PYTHONPATH=. python benchmarks/scaling.py [--device a100-40g]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from contrastive.config import FinetuneRecipe
from contrastive.plan import plan
from lodestar.config.loader import load
from lodestar.planning.cost_model import DEVICES, GIB

RECIPE = Path(__file__).parents[1] / "configs/finetune/48gpu.yaml"
TOKENS = 128
LOADER_TEXTS_PER_SECOND = 17_000
"""Of one loader process: benchmarks/bench.py measured 70,000 of 32 tokens; taken as if tokens were all that counts."""
WORKERS = 4
SIZES = (
    (8, 4_096), (48, 32_768), (128, 131_072), (256, 262_144), (512, 524_288), (1024, 1_048_576), (1024, 32_768),
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=sorted(DEVICES), default="a100-40g")
    device = parser.parse_args().device
    print(f"{device}, BERT-base, bf16, DDP, queries and passages of {TOKENS} tokens\n")
    print("| devices | global batch | model s | loss s | gather s | reduction s | loader s | embeddings GiB |")
    print("|---:|---:|---:|---:|---:|---:|---:|---:|")
    for world_size, global_size in SIZES:
        lengths = [f"data.{role}_max_length={TOKENS}" for role in ("query", "passage")]
        recipe = load(FinetuneRecipe, RECIPE, [f"batch.global_size={global_size}", *lengths])
        found = plan(recipe, world_size, device)
        seconds, rows = found["seconds"], max(found["rows_per_rank"])
        loader = rows * (2 + recipe.data.negatives_per_query) / (LOADER_TEXTS_PER_SECOND * WORKERS)
        parts = " | ".join(f"{seconds[name]:.3f}" for name in ("model", "loss", "gather", "reduction"))
        held = found["memory"]["embeddings"] / GIB
        print(f"| {world_size:,} | {global_size:,} | {parts} | {loader:.3f} | {held:.1f} |")


if __name__ == "__main__":
    main()
