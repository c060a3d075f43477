"""What one GPU makes of both recipes: speed, memory, and what only a GPU shows. One command, under eight minutes.

    PYTHONPATH=. python benchmarks/gpu.py --out FOLDER [--only NAME ...] [--tiny]

Needs torch, transformers and pydantic; no data, no model, no network: weights are random and texts are generated.
Results are printed as they come, and written to FOLDER/gpu.md (one table) and FOLDER/gpu.json. The sections run in a
process of their own, the most important first. One that fails or takes too long is a line of the table; a new process
goes on with the others.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

LIMITS_S = {
    "yardstick": 40,
    "packed": 70,
    "padded": 70,
    "inside": 90,
    "correct": 120,
    "gradcache": 60,
    "head": 40,
    "attention": 40,
    "whole": 90,
    "compile": 180,
}
"""Seconds after which a section is ended, by name, in the order in which they run."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of gpu.md and gpu.json")
    parser.add_argument("--only", nargs="+", choices=LIMITS_S, metavar="NAME", help="sections to run; none: all")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, on a CPU too: whether it runs")
    parser.add_argument("--limit", type=float, default=460, help="seconds after which no section goes on")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    lines = options.out / "gpu.jsonl"
    lines.write_text("")
    end, waiting = time.monotonic() + options.limit, list(options.only or LIMITS_S)
    while waiting and time.monotonic() < end:
        ended_by = _run(waiting, lines, end, ["--tiny"] if options.tiny else [])
        begun = [record["section"] for record in _records(lines) if "began" in record]
        if begun and ended_by:
            _append(lines, {"section": begun[-1], "case": "ended", "values": {"error": ended_by}})
        if not begun or waiting[0] not in begun:
            _append(lines, {"section": waiting[0], "case": "ended", "values": {"error": ended_by or "did not begin"}})
            begun.append(waiting[0])
        waiting = [name for name in waiting if name not in begun]
    for name in waiting:
        _append(lines, {"section": name, "case": "left out", "values": {"error": f"no time in {options.limit:.0f} s"}})
    _write(options.out, _records(lines))


def _run(names: list[str], lines: Path, end: float, flags: list[str]) -> str | None:
    """Run the sections in one process; why it was ended, or ended itself, before the last."""
    earlier = len(_records(lines))
    worker = subprocess.Popen([sys.executable, "-m", "benchmarks.gpu_sections", str(lines), *names, *flags])
    try:
        while worker.poll() is None:
            time.sleep(0.2)
            begun = [record for record in _records(lines)[earlier:] if "began" in record]
            if time.monotonic() > end:
                return "the time of all sections is over"
            if begun and time.time() > begun[-1]["began"] + LIMITS_S[begun[-1]["section"]]:
                return f"over its limit of {LIMITS_S[begun[-1]['section']]} s"
        return f"its process ended with exit code {worker.returncode}" if worker.returncode else None
    finally:
        if worker.poll() is None:
            worker.kill()
            worker.wait()


def _records(lines: Path) -> list[dict[str, Any]]:
    """Lines that are whole: the other process may be writing the last one."""
    return [json.loads(line) for line in lines.read_text().splitlines(keepends=True) if line.endswith("\n")]


def _append(lines: Path, record: dict[str, Any]) -> None:
    with lines.open("a") as file:
        file.write(json.dumps(record) + "\n")
    print(json.dumps(record), flush=True)


def _write(folder: Path, records: list[dict[str, Any]]) -> None:
    results = [record for record in records if "values" in record]
    (folder / "gpu.json").write_text(json.dumps(results, indent=1) + "\n")
    rows = ["| section | case | result |", "|---|---|---|"]
    for record in results:
        values = "; ".join(f"{key} {_short(value)}" for key, value in record["values"].items() if key != "detail")
        rows.append(f"| {record['section']} | {record['case']} | {values.replace('|', '/')} |")
    (folder / "gpu.md").write_text("\n".join(rows) + "\n")
    print("\n".join(rows))


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
