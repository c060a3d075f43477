"""The GPU benchmark in its tiny form, which runs on a CPU too."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks.gpu import LIMITS_S
from tests import processes

ENVIRONMENT = {**processes.environment(), "PYTHONPATH": str(processes.ROOT)}


@pytest.mark.slow
def test_every_section_of_the_gpu_benchmark_runs(tmp_path: Path) -> None:
    sections = [name for name in LIMITS_S if name != "compile"]  # on a CPU it needs a compiler
    command = [sys.executable, "benchmarks/gpu.py", "--tiny", "--out", str(tmp_path), "--only", *sections]
    ended = processes.run(command, ENVIRONMENT, limit_s=300)
    assert ended.returncode == 0, ended.stderr
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert {result["section"] for result in results} == set(sections)
    assert not [result for result in results if "error" in result["values"]]
    cases = {(result["section"], result["case"]): result["values"] for result in results}
    for stage in ("pretrain", "finetune"):
        assert cases["correct", f"{stage}, fp32, padded"]["gradient_error"] == 0
        assert cases["correct", f"{stage}, fp32, packed"]["gradient_error"] < 1e-5
        assert cases["correct", f"{stage}, packed, dropout, the same step twice"]["equal"]
        assert cases["packed", f"{stage}, natural lengths"]["padding"] == 0
        assert cases["padded", f"{stage}, natural lengths"]["padding"] > 0
    assert (tmp_path / "gpu.md").read_text().count("\n") == len(results) + 2


def test_a_section_that_fails_is_a_line_and_the_others_go_on(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    ended = processes.run(command, ENVIRONMENT, limit_s=60)
    assert ended.returncode == 0, ended.stderr
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert [(r["section"], r["case"], r["values"].get("error")) for r in results] == [
        ("yardstick", "ended", "its process ended with exit code 3"),
        ("padded", "ended", "over its limit of 1 s"),
        ("packed", "works", None),
    ]


PROGRAM = """
import subprocess, sys
from benchmarks import gpu

WORKER = '''
import json, sys, time
lines, name = sys.argv[1], sys.argv[2]
record = lambda **values: open(lines, "a").write(json.dumps({"section": name, **values}) + chr(10))
record(began=time.time())
if name == "yardstick":
    raise SystemExit(3)
time.sleep(60 if name == "padded" else 0)
record(case="works", values={})
'''
popen = subprocess.Popen
subprocess.Popen = lambda command, **options: popen([sys.executable, "-c", WORKER, *command[3:]], **options)
gpu.LIMITS_S["padded"] = 1
sys.argv = ["gpu.py", "--out", sys.argv[1], "--only", "yardstick", "padded", "packed"]
gpu.main()
"""
