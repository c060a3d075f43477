"""Lodestar beside the code of others, in one run: `make bench-peers`, which makes their environments.

    PYTHONPATH=. python benchmarks/peers.py [--quick] [--only ROW ...] [--repeats 5] [--precision bf16] [--output FILE]

Each package runs in processes of its own, of one thread, on the same texts and weights, with dropout 0.1. Each takes
one step in turn, after one that does not count; figures are medians over the turns. A step is all that a package
does for one batch: tokens, masks, forward, backward, clipping, AdamW. Memory is the peak of the whole process.
Encoding in bf16, sentence-transformers' weights are bf16, and ours fp32 under autocast. The loss, scale and start are
measured in fp32 alone. --quick takes a quarter of the examples, and two turns: to see that all of it runs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks import peers_problem as problem
from benchmarks.yardstick import measure

PEERS = ".venv-peers/bin/python"
ARMS = {
    "lodestar": (sys.executable, "", "benchmarks.peers_lodestar"),
    "sentence-transformers": (sys.executable, "", "benchmarks.peers_sentence_transformers"),
    "FlagEmbedding": (PEERS, "", "benchmarks.peers_flag_embedding"),
    "RetroMAE's authors": (PEERS, ".venv-peers/retromae", "benchmarks.peers_flag_embedding"),
}
"""Package -> its Python, where that finds packages of older versions, and the module that takes its steps."""
TEMPERATURE = 0.02
TILE_SCORES = 1 << 22
"""Of the products to which the loss is compared."""
AT_ONCE = {"micro_tokens": 8192, "keep_graph": 10**6}
"""All graphs are kept: one pass, no GradCache. Micro-batches fit the processor's cache better than all texts do."""
CACHED = {"micro_tokens": 3072, "keep_graph": 1}
"""Fewer tokens at a time than 32 texts of 128, which sentence-transformers' cached loss takes."""


@dataclass(frozen=True)
class Row:
    """One row of the table: what each package does, and the aim."""

    name: str
    arms: Mapping[str, str]
    """Package -> its command."""
    speed: float
    """At least so many times the fastest other package's."""
    memory: float
    """At most so many times that package's."""
    examples: int
    kind: str = ""
    """Of the texts: of 510 tokens, natural, full, mixed."""
    batch: Mapping[str, int] = field(default_factory=dict)
    """Keys of Lodestar's recipe."""


FINETUNE = {"lodestar": "finetune", "FlagEmbedding": "finetune", "sentence-transformers": "finetune"}
GRADCACHE = {"lodestar": "finetune", "sentence-transformers": "gradcache"}
PRETRAIN = {"lodestar": "pretrain", "RetroMAE's authors": "pretrain"}
ENCODE = {"lodestar": "encode", "sentence-transformers": "encode"}
ROWS = [
    Row("retromae-510", PRETRAIN, 2.2, 0.45, 8, "510", {"micro_tokens": 2048}),
    Row("retromae-natural", PRETRAIN, 3.5, 0.45, 32, "natural", {"micro_tokens": 2048}),
    Row("contrastive-full-32", FINETUNE, 1.15, 1.0, 32, "full", AT_ONCE),
    Row("contrastive-full-128", FINETUNE, 1.3, 1.0, 128, "full", AT_ONCE),
    Row("contrastive-mixed-32", FINETUNE, 1.8, 1.0, 32, "mixed", AT_ONCE),
    Row("contrastive-mixed-128", FINETUNE, 2.2, 1.0, 128, "mixed", AT_ONCE),
    Row("gradcache-full-128", GRADCACHE, 1.2, 1.0, 128, "full", CACHED),
    Row("gradcache-mixed-128", GRADCACHE, 1.2, 1.0, 128, "mixed", CACHED),
    Row("gradcache-full-512", GRADCACHE, 1.6, 1.0, 512, "full", CACHED),
    Row("gradcache-mixed-512", GRADCACHE, 1.6, 1.0, 512, "mixed", CACHED),
    Row("encode-natural", ENCODE, 1.3, 1.0, 512, "natural"),
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    others = ["loss", "scale", "start"]
    names = [*(row.name for row in ROWS), *others]
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", nargs="*", default=names, choices=names, metavar="ROW", help=", ".join(names))
    parser.add_argument(
        "--attention", default="padded", choices=["padded", "packed"], help="Lodestar's model.attention"
    )
    parser.add_argument(
        "--precision", default="fp32", choices=["fp32", "bf16"], help="bf16: of matrix products, where a CPU has units"
    )
    parser.add_argument("--repeats", type=int, default=5, help="turns that count, three or more for a result")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    repeats = 2 if options.quick else options.repeats
    lines = [f"`{json.dumps(measure())}`", ""]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        problem.encoder(folder)
        rows = [row for row in ROWS if row.name in options.only]
        if rows:
            lines += [*HEAD]
        for row in rows:
            costs = run(row, folder, repeats, options.attention, options.precision, quick=options.quick)
            lines.append(as_line(row, costs))
            print(lines[-1], flush=True)
        for name, measured in (("loss", loss), ("scale", scale), ("start", start)):
            if name in options.only and options.precision == "fp32":
                lines += ["", measured(folder, repeats, quick=options.quick)]
                print(lines[-1], flush=True)
    if options.output is not None:
        command = f"PYTHONPATH=. python benchmarks/peers.py {' '.join(sys.argv[1:])}"
        text = "\n".join([f"# Beside other packages\n\n`{command}` on {machine()}:\n", *lines])
        options.output.write_text(f"{text}\n", encoding="utf-8")
    return 0


# --- measuring -------------------------------------------------------------------------------


def run(
    row: Row, folder: Path, repeats: int, attention: str, precision: str, *, quick: bool
) -> dict[str, dict[str, float]]:
    """What a step costs each package."""
    examples = row.examples // 4 if quick else row.examples
    texts: dict[str, Any] = {}
    if row.kind in ("510", "natural"):
        texts["texts"] = problem.texts_510(examples) if row.kind == "510" else problem.natural_texts(examples)
    else:
        texts["triples"] = problem.triples(examples, row.kind)
    longest = problem.MAX_TOKENS if "texts" in texts else problem.PASSAGE_TOKENS
    values = _values(folder, row.batch, longest, **texts) | {"attention": attention, "precision": precision}
    return in_turns(row.arms, values, folder, repeats)


def _values(folder: Path, batch: Mapping[str, int], max_tokens: int, **texts: object) -> dict[str, Any]:
    """What the processes read."""
    return {
        "encoder": str(folder / "mini"), "model": str(folder / "model"), "temperature": TEMPERATURE, "batch": {**batch},
        "query_tokens": problem.QUERY_TOKENS, "passage_tokens": problem.PASSAGE_TOKENS, "max_tokens": max_tokens,
        "attention": "padded", "precision": "fp32", **texts,
    }  # fmt: skip


def in_turns(
    arms: Mapping[str, str], values: Mapping[str, Any], folder: Path, repeats: int
) -> dict[str, dict[str, float]]:
    """Medians of the steps of all arms, which take turns; an arm is a package, or a package with a remark in (...)."""
    path = folder / "problem.json"
    path.write_text(json.dumps(values))
    workers: dict[str, Worker] = {}
    try:
        for arm, command in arms.items():
            workers[arm] = Worker(arm.partition(" (")[0], command, path)
        steps: dict[str, list[dict[str, float]]] = {arm: [] for arm in arms}
        for turn in range(repeats + 1):
            order = list(arms) if turn % 2 else list(arms)[::-1]
            for arm in order:
                steps[arm].append(workers[arm].step())
        return {arm: _medians(steps[arm][1:]) | worker.end() for arm, worker in workers.items()}
    finally:
        for worker in workers.values():
            worker.process.kill()


def _medians(steps: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: statistics.median(step[name] for step in steps) for name in steps[0]}


class Worker:
    """A process that takes steps: `peers_worker.serve`."""

    def __init__(self, package: str, command: str, path: Path) -> None:
        python, older, module = ARMS[package]
        self.process = subprocess.Popen(
            [python, "-m", module, command, str(path)], env=_environment(older), text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        self.loaded = self._answer()

    def step(self) -> dict[str, float]:
        assert self.process.stdin is not None
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        return self._answer()

    def end(self) -> dict[str, float]:
        assert self.process.stdin is not None
        self.process.stdin.close()
        return self.loaded | self._answer()

    def _answer(self) -> dict[str, float]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):  # else a library prints while it is imported
                return json.loads(line)
        raise RuntimeError(f"{self.process.args}: has ended with {self.process.wait()} (see its message above)")


def _environment(packages: str = "") -> dict[str, str]:
    return {
        **os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
        "WANDB_MODE": "offline", "PYTHONPATH": f"{packages}:.",
    }  # fmt: skip


def loss(folder: Path, repeats: int, *, quick: bool) -> str:
    """The contrastive loss alone, in a line of text."""
    queries, passages, width = (1024, 2048, 256) if quick else (8192, 16_384, 768)
    values = {"queries": queries, "passages": passages, "width": width, "temperature": TEMPERATURE,
              "tile_scores": TILE_SCORES}  # fmt: skip
    arms = {"lodestar": "loss", "lodestar (products alone)": "products", "lodestar (whole matrix)": "loss_whole"}
    tiled, products, whole = in_turns(arms, values, folder, repeats).values()
    growth, whole_growth = (arm["peak_mib"] - arm["loaded_mib"] for arm in (tiled, whole))
    return (
        f"The loss of {queries:,} x {passages:,} x {width} in tiles: {products['cpu_s'] / tiled['cpu_s']:.0%} of the "
        f"rate of its three matrix products (aim 85 %), {tiled['cpu_s']:.2f} s against {whole['cpu_s']:.2f} s for the "
        f"whole matrix; memory grows by {growth:,.0f} MiB against {whole_growth:,.0f} MiB "
        f"(1/{whole_growth / growth:.1f}, aim 1/12)."
    )


def scale(folder: Path, repeats: int, *, quick: bool) -> str:
    """What an example costs, by global batch: GradCache over short texts, and how much of it the loss takes."""
    lines = ["| global batch | CPU ms an example | of it the loss | peak MiB |", "|---:|---:|---:|---:|"]
    for size in (64, 256) if quick else (256, 1024, 4096, 16_384, 32_768):
        turns = repeats if size <= 1024 else 1  # of minutes each
        values = _values(folder, CACHED, problem.MAX_TOKENS, triples=problem.triples(size, "short"))
        cost = in_turns({"lodestar": "finetune"}, values, folder, turns)["lodestar"]
        sizes = {"queries": size, "passages": 2 * size, "width": 256, "tile_scores": TILE_SCORES}
        part = in_turns({"lodestar": "loss"}, {**sizes, "temperature": TEMPERATURE}, folder, turns)["lodestar"]
        each, of_loss = (1000 * x["cpu_s"] / size for x in (cost, part))
        lines.append(f"| {size:,} | {each:.2f} | {of_loss:.2f} | {cost['peak_mib']:,.0f} |")
    return "\n".join(lines)


def start(folder: Path, repeats: int, *, quick: bool) -> str:
    """From the start of a run on a warm cache to its first step, in a line of text."""
    values = _values(folder, {}, problem.PASSAGE_TOKENS, triples=problem.triples(256, "mixed"))
    (folder / "problem.json").write_text(json.dumps(values))
    seconds: list[dict[str, float]] = []
    for _ in range(repeats + 1):  # the first lists what a run imports, and fills the cache
        command = [sys.executable, "-m", "benchmarks.peers_start", str(folder)]
        done = subprocess.run(command, env=_environment(), text=True, stdout=subprocess.PIPE, check=True)
        seconds.append(json.loads(done.stdout.splitlines()[-1]))
    median = _medians(seconds[1:])
    return (
        f"A run on a warm cache begins its first step {median['start_s']:.2f} s after its imports, which take "
        f"{median['imports_s']:.2f} s (aim 2 s)."
    )


# --- telling ---------------------------------------------------------------------------------

OTHERS = ["torch", "transformers", "FlagEmbedding"]
HEAD = [
    "| row | package | CPU s | wall s | peak MiB | loaded MiB | faster | aim | memory | aim |",
    "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
]


def as_line(row: Row, costs: Mapping[str, Mapping[str, float]]) -> str:
    """Lodestar's figures and, in the lines below, those of the others; ratios to the fastest of them."""
    lodestar, others = costs["lodestar"], {arm: cost for arm, cost in costs.items() if arm != "lodestar"}
    best = min(others.values(), key=lambda cost: cost["cpu_s"])
    faster, memory = best["cpu_s"] / lodestar["cpu_s"], lodestar["peak_mib"] / best["peak_mib"]
    ratios = [f"{faster:.2f}x", f"{row.speed}x", f"{memory:.2f}x", f"{row.memory}x"]
    lines = [
        [row.name if arm == "lodestar" else "", arm, *figures(cost), *(ratios if arm == "lodestar" else [""] * 4)]
        for arm, cost in costs.items()
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def figures(cost: Mapping[str, float]) -> list[str]:
    return [f"{cost['cpu_s']:.2f}", f"{cost['wall_s']:.2f}", f"{cost['peak_mib']:,.0f}", f"{cost['loaded_mib']:,.0f}"]


def machine() -> str:
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        model = next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), "")
    code = f"from importlib.metadata import version; print(', '.join(f'{{n}} {{version(n)}}' for n in {OTHERS}))"
    others = subprocess.run([PEERS, "-c", code], text=True, stdout=subprocess.PIPE, check=True).stdout.strip()
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "sentence-transformers"))
    return (
        f"{model or platform.machine()}, one thread of {os.cpu_count()}; {packages}; the others' environment: "
        f"{others}; RetroMAE's code from FlagEmbedding 1.2.11 with transformers 4.44.2"
    )


if __name__ == "__main__":
    raise SystemExit(main())
