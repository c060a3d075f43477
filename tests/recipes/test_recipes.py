"""Every recipe loads and plans, and every command of the README is one that its command understands."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from contrastive import cli as finetune
from lodestar import commands as lodestar
from retrieval.check.cli import CHECKS
from retrieval.check.cli import main as check_main
from retrieval.embedding import cli as encode
from retrieval.evaluation import cli as evaluate
from retrieval.export import cli as export
from retrieval.mining import cli as mine
from retrieval.search import cli as search
from retromae import cli as pretrain
from tests import processes

ROOT = Path(__file__).parents[2]
COMMANDS: dict[str, Any] = {"pretrain": pretrain.main, "finetune": finetune.main}
OTHER_COMMANDS: dict[str, Any] = {
    "encode": encode.main,
    "evaluate": evaluate.main,
    "export": export.export_main,
    "index": search.index_main,
    "merge": export.merge_main,
    "mine": mine.main,
}
RECIPES = sorted((ROOT / "configs").rglob("*.yaml"))
OF_TRAINING, OF_USE = (
    [path for path in RECIPES if path.parent.name in commands] for commands in (COMMANDS, OTHER_COMMANDS)
)
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def devices(recipe: Path) -> int:
    """The number in a recipe's name."""
    found = re.match(r"(\d+)gpu", recipe.stem)
    return int(found[1]) if found else 2


def planned(command: Any, argv: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert command([*argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("recipe", OF_TRAINING, ids=lambda path: str(path.relative_to(ROOT / "configs")))
def test_every_recipe_of_training_loads_and_plans(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for size in (1, devices(recipe), 1000):
        plan = planned(COMMANDS[recipe.parent.name], ["--config", str(recipe), "--plan", str(size)], capsys)
        assert plan["world_size"] == size
        assert sum(plan["rows_per_rank"]) == plan["global_size"] and len(plan["rows_per_rank"]) == size
        assert plan["peak_memory_bytes"] == sum(plan["memory"].values()) > 0


@pytest.mark.parametrize("recipe", OF_USE, ids=lambda path: str(path.relative_to(ROOT / "configs")))
def test_every_recipe_of_use_loads_and_plans(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "model" in " ".join(planned(OTHER_COMMANDS[recipe.parent.name], ["--config", str(recipe), "--plan"], capsys))


@pytest.mark.parametrize("recipe", OF_USE, ids=lambda path: str(path.relative_to(ROOT / "configs")))
def test_a_plan_names_the_check_only_where_there_is_one(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = recipe.parent.name
    assert OTHER_COMMANDS[command](["--config", str(recipe), "--plan"]) == 0
    assert ("lodestar check" in capsys.readouterr().out) == (command in CHECKS)
    if command not in CHECKS:
        assert check_main(["--config", str(recipe)]) == 2
        assert f"error: {recipe}:1: {command}: its recipes have no check (" in capsys.readouterr().err


def test_no_recipe_is_left_out() -> None:
    assert sorted([*OF_TRAINING, *OF_USE]) == RECIPES


def test_the_recipe_of_48_devices_has_65535_negatives_per_query(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(ROOT / "configs/finetune/48gpu.yaml")
    for size in ("1", "8", "48"):
        assert planned(finetune.main, ["--config", recipe, "--plan", size], capsys)["negatives_per_query"] == 65_535
    rows = planned(finetune.main, ["--config", recipe, "--plan", "48"], capsys)["rows_per_rank"]
    assert (rows.count(683), rows.count(682)) == (32, 16)


def test_the_recipe_of_24_devices_has_30_texts_on_each(capsys: pytest.CaptureFixture[str]) -> None:
    plan = planned(pretrain.main, ["--config", str(ROOT / "configs/pretrain/24gpu.yaml"), "--plan", "24"], capsys)
    assert plan["rows_per_rank"] == [30] * 24 and plan["chunks_per_rank"] == 1


def test_a_plan_for_a_device_says_whether_it_fits_and_what_a_step_takes(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--config", str(ROOT / "configs/finetune/48gpu.yaml"), "--plan", "48", "--device", "a100-40g"]
    plan = planned(finetune.main, argv, capsys)
    assert plan["fits"] and plan["device_memory_bytes"] > plan["peak_memory_bytes"]
    assert plan["seconds_per_step"] == pytest.approx(sum(plan["seconds"].values()))
    kept = planned(finetune.main, [*argv, "batch.keep_graph=3"], capsys)
    assert not kept["fits"] and kept["memory"]["activations"] == 3 * plan["memory"]["activations"]
    none_kept = planned(finetune.main, [*argv, "batch.keep_graph=0"], capsys)
    assert none_kept["chunks_per_rank"] == 4 and none_kept["memory"] == plan["memory"]
    assert plan["seconds"]["model"] / none_kept["seconds"]["model"] == pytest.approx(3.75 / 4, rel=1e-3)
    shared = planned(finetune.main, [*argv, "batch.micro_size=2", "batch.keep_graph=0.4"], capsys)
    assert 0.3 < shared["memory"]["activations"] / plan["device_memory_bytes"] <= 0.4
    assert finetune.main([*argv[:-1], "a100"]) == 2
    assert "a100-40g" in capsys.readouterr().err


def test_a_plan_takes_under_three_seconds_and_no_torch() -> None:
    command = [sys.executable, "-X", "importtime", "launch/finetune.py", "--config", "configs/finetune/48gpu.yaml"]
    found = processes.run([*command, "--plan", "48"], limit_s=30)
    assert found.returncode == 0 and "65,535" in found.stdout
    assert not any(line.endswith(" torch") for line in found.stderr.splitlines())


def commands() -> list[tuple[Path, str]]:
    """The lines of the documents' fenced blocks, with continued ones joined."""
    found = []
    for document in DOCUMENTS:
        fenced = re.findall(r"^```(\w*)\n(.*?)^```$", document.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
        for block in (block for language, block in fenced if language in ("", "bash", "sh")):
            for line in block.replace("\\\n", " ").splitlines():
                if re.match(r"(make|python|deepspeed|torchrun|srun|sbatch|lodestar) ", line):
                    found.append((document, line))
    return found


@pytest.mark.parametrize(("document", "line"), commands(), ids=lambda value: value if isinstance(value, str) else "")
def test_every_command_of_the_documents_is_understood(
    document: Path, line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    words = shlex.split(line, comments=True)
    if words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(words[1:]) <= set(targets)
        return
    if words[0] == "sbatch":
        assert all((ROOT / word).is_file() for word in words[1:] if "=" not in word and not word.startswith("-"))
        return
    if "lodestar" in words:
        name, *arguments = words[words.index("lodestar") + 1 :]
        assert name in (*lodestar.COMMANDS, "--help", "--version")
        config = arguments[arguments.index("--config") + 1] if "--config" in arguments else ""
        if name == "search":
            search.parse_search(arguments)
        if not (ROOT / config).is_file():
            return  # my.yaml: of the reader's own
        script = f"launch/{name}.py"
    else:
        script = next(word for word in words if word.endswith(".py"))
        arguments = words[words.index(script) + 1 :]
    assert (ROOT / script).is_file()
    if script == "launch/search.py":
        search.parse_search(arguments)
    elif command := (COMMANDS | OTHER_COMMANDS).get(Path(script).stem):
        planned(command, [*arguments, *([] if "--plan" in arguments else ["--plan"])], capsys)


def test_the_documents_hold_commands() -> None:
    assert sum(document.name == "README.md" for document, _ in commands()) >= 6
