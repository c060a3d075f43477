"""The table of docs/scaling.md: a step of fine-tuning on paper, from 8 to 1,024 devices, by the plan's own formulas.

PYTHONPATH=. python benchmarks/scaling.py [--device a100-40g]
"""

from __future__ import annotations

import argparse

from chassis.cost import BERT_BASE, DEVICES, GIB, memory, model_flops, seconds
from chassis.schema import BatchPlan, Engine

QUERY = PASSAGE = 128  # tokens
PASSAGES_PER_QUERY = 2
LOADER_TEXTS_PER_SECOND = 17_000
"""Of one loader process: benchmarks/bench.py measured 70,000 of 32 tokens; taken as if tokens were all that counts."""
WORKERS = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=sorted(DEVICES), default="a100-40g")
    name = parser.parse_args().device
    print(f"{name}, BERT-base, bf16, ZeRO-1, {QUERY} tokens, {PASSAGES_PER_QUERY} passages for each query\n")
    print("| devices | global batch | model s | loss s | gather s | reduction s | loader s | embeddings GiB |")
    print("|---:|---:|---:|---:|---:|---:|---:|---:|")
    for world_size, global_size in (
        (8, 4_096), (48, 32_768), (128, 131_072), (256, 262_144), (512, 524_288), (1024, 1_048_576), (1024, 32_768),
    ):  # fmt: skip
        rows = max(BatchPlan(global_size, world_size, 1).rows_per_rank)
        tokens = rows * (QUERY + PASSAGES_PER_QUERY * PASSAGE)
        passages = global_size * PASSAGES_PER_QUERY
        found = seconds(
            BERT_BASE,
            DEVICES[name],
            world_size=world_size,
            precision="bf16",
            flops=model_flops(BERT_BASE, tokens, PASSAGE, passes=4),
            gathered=passages,
            scored=rows * passages,
        )
        loader = rows * (1 + PASSAGES_PER_QUERY) / (LOADER_TEXTS_PER_SECOND * WORKERS)
        held = memory(
            BERT_BASE, engine=Engine(kind="deepspeed"), world_size=world_size, precision="bf16", tokens_at_once=0,
            embeddings=2 * 4 * BERT_BASE.width * passages,
        ).embeddings  # fmt: skip
        print(
            f"| {world_size:,} | {global_size:,} | {found.model:.3f} | {found.loss:.3f} | {found.gather:.3f} | "
            f"{found.reduction:.3f} | {loader:.3f} | {held / GIB:.1f} |"
        )


if __name__ == "__main__":
    main()
