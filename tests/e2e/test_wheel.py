"""An installed wheel, away from the repository: its command, its recipes, both launchers."""

from __future__ import annotations

import json
import os
import sysconfig
import venv
from pathlib import Path

import pytest

from tests import processes, tiny


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an environment `env` that holds the wheel alone; it borrows the libraries of this one."""
    home = tmp_path_factory.mktemp("wheel")
    venv.create(home / "env", with_pip=False)
    (packages,) = (home / "env").glob("lib/python*/site-packages")
    (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib"))
    install = [str(home / "env/bin/python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    install += ["--no-deps", "--no-index", "--ignore-installed", str(tiny.build_wheel(home))]
    processes.run(install, limit_s=120).check_returncode()
    tiny.encoder(home / "bert", "bert")
    tiny.pretrain_file(home / "pretrain.jsonl")
    tiny.finetune_file(home / "finetune.jsonl")
    return home


def call(home: Path, *command: str, code: int = 0) -> str:
    """What a command of the environment prints."""
    kept = ("PATH", "HOME", "LANG", "TMPDIR")
    env = {name: os.environ[name] for name in kept if name in os.environ}
    env |= {"DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    program = [str(home / "env/bin" / command[0]), *command[1:]]
    done = processes.run(program, env, cwd=home, limit_s=240)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


def recipe(home: Path, stage: str, encoder: Path) -> list[str]:
    (home / f"{stage}.yaml").write_text(
        f"run: {{output_dir: {home}/{stage}}}\nmodel: {{encoder: {encoder}, max_length: 32}}\n"
        f"data: {{train: [{home}/{stage}.jsonl], cache_dir: {home}/cache, processes: 1, workers: 0}}\n"
        "batch: {global_size: 7, micro_size: 3}\noptim: {lr: 1e-3}\nschedule: {steps: 2}\nprecision: fp32\n"
    )
    return ["--config", f"{stage}.yaml"]


def test_the_command_names_itself_and_its_recipes(home: Path) -> None:
    assert call(home, "lodestar", "--version").startswith("lodestar 0.")
    assert str(home) in call(home, "python", "-c", "import lodestar; print(lodestar.__file__)")
    assert str(home / "env") in (home / "env/bin/lodestar").read_text().partition("\n")[0]
    listed = call(home, "lodestar", "recipes")
    assert "finetune/48gpu" in listed and all(len(line.split(maxsplit=1)) == 2 for line in listed.splitlines())
    (home / "my.yaml").write_text(call(home, "lodestar", "recipes", "finetune/48gpu"))
    plan = json.loads(call(home, "lodestar", "finetune", "--config", "my.yaml", "--plan", "48", "--json"))
    assert plan["negatives_per_query"] == 65_535
    assert (
        "temperature" in json.loads(call(home, "lodestar", "schema", "finetune"))["$defs"]["LossConfig"]["properties"]
    )
    assert "usage" in call(home, "python", "-m", "lodestar", "--help")


@pytest.mark.parametrize("wrong", [["fintune"], ["recipes", "finetune/48"], ["schema", "search"]])
def test_mistakes_are_one_line(home: Path, wrong: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert call(home, "lodestar", *wrong, code=2) == ""


def test_a_reader_that_has_seen_enough_is_no_error(home: Path) -> None:
    piped = f"set -o pipefail; {home}/env/bin/lodestar schema finetune | head -1"
    done = processes.run(["bash", "-c", piped], limit_s=60)
    assert done.stdout == "{\n" and done.stderr == ""


@pytest.mark.slow
def test_both_launchers_train_and_the_result_answers(home: Path) -> None:
    pretrain = ["pretrain", *recipe(home, "pretrain", home / "bert"), "engine.kind=deepspeed"]
    call(
        home, "python", "-m", "deepspeed.launcher.runner", "--num_accelerators", "2", "--module", "lodestar", *pretrain
    )
    torchrun = ["python", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "lodestar"]
    call(home, *torchrun, "finetune", *recipe(home, "finetune", home / "pretrain/model"))
    for stage in ("pretrain", "finetune"):
        assert json.loads((home / stage / "summary.json").read_text())["finished"]
    tiny.write_jsonl(home / "corpus.jsonl", [{"_id": str(i), "text": text} for i, text in enumerate(tiny.texts(9))])
    answer = call(home, "lodestar", "search", "--model", "finetune/model", "--corpus", "corpus.jsonl", "shuffle rows")
    assert "shuffle rows" in answer
