"""Recipes that are no recipes: each is told in one line with its place and its remedy, within time and memory."""

from __future__ import annotations

import os
import re
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from contrastive.config import FinetuneRecipe
from lodestar.config import loader
from lodestar.errors import ConfigError
from retrieval.evaluation.config import EvaluateRecipe
from retromae.config import PretrainRecipe
from tests import processes
from tests.unit.lodestar.config.test_loader import RECIPE, VALUES

MESSAGE = re.compile(r"[^\n]+: [^\n]+ \([^\n]+\)")
LIMIT_S = 2  # of processor time: the machine may have other work
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


def mistake(tmp_path: Path, content: str | bytes, *overrides: str, schema: type = FinetuneRecipe) -> str:
    """The message, without the folder."""
    path = tmp_path / "r.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    start = time.process_time()
    with pytest.raises(ConfigError) as caught:
        loader.load(schema, path, overrides)
    assert time.process_time() - start < LIMIT_S
    message = str(caught.value).replace(f"{tmp_path}/", "")
    assert MESSAGE.fullmatch(message), message
    return message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (BOMB, "r.yaml:1: e.3.2.4.8.7: too much for a recipe, once aliases are replaced (write"),
        ('a: &a "' + "x" * 900_000 + '"\nb: [' + "*a," * 30_000 + "]", "r.yaml:1: b.3: too much for a recipe"),
        ("a: &a [*a]", "r.yaml:1: recipe: *a: an alias of itself (write the value out)"),
        ("a: *b", "r.yaml:1: recipe: *b: no such anchor above (write the value out)"),
        ("x0: &x0 [1]\n" + "".join(f"x{i}: &x{i} [*x{i - 1}]\n" for i in range(1, 3000)), "too much for a recipe"),
        ("a: " + "[" * 100_000, "r.yaml:1: recipe: nested deeper than 32 levels ("),
        ("a: " + "{a: " * 100_000, "r.yaml:1: recipe: nested deeper than 32 levels ("),
        ("- " * 100_000, "r.yaml:1: recipe: nested deeper than 32 levels ("),
        ("".join(" " * i + "a:\n" for i in range(1000)), "r.yaml:32: recipe: nested deeper than 32 levels ("),
        ("a: [" + "1," * 400_000 + "]", "r.yaml:1: recipe: holds too many values for a recipe ("),
        (RECIPE.replace("[a.jsonl]", "[" + "1," * 30_000 + "]"), None),
        (RECIPE.replace("1e-5", "!!float 1e-5"), "r.yaml:10: optim.lr: tag !!float: a recipe holds plain values only"),
        (RECIPE.replace("1e-5", "!!python/object/apply:os.system [x]"), "tag !!python/object/apply:os.system"),
        (RECIPE.replace("bert", "! bert"), "r.yaml:4: model.encoder: tag !: a recipe"),
        (RECIPE.replace("bert", "!e!x bert"), "r.yaml:4: recipe: not valid YAML: found undefined tag handle (rem"),
        ("!!map\n" + RECIPE, "r.yaml:1: recipe: tag !!map: a recipe"),
        (RECIPE + "[a, b]: 1", "r.yaml:13: recipe: a key must be a plain word (write KEY: VALUE)"),
        (RECIPE + "? {a: 1}\n: 1", "r.yaml:13: recipe: a key must be a plain word (write KEY: VALUE)"),
        (RECIPE + "<<: {a: 1}", "r.yaml:13: recipe: merge keys (<<) are not read (write the keys out)"),
        (RECIPE + "k" * 1000 + ": 1", "r.yaml:13: recipe: a key of 1,000 characters (write KEY: VALUE)"),
        (RECIPE + "---\n" + RECIPE, "r.yaml:13: recipe: a second document (remove `---`)"),
        ("", "r.yaml:1: recipe: must be a mapping of sections, got nothing ("),
        ("# only this", "r.yaml:1: recipe: must be a mapping of sections, got nothing ("),
        ("---", "r.yaml:1: recipe: must be a mapping of sections, got a value ("),
        ("[a]", "r.yaml:1: recipe: must be a mapping of sections, got a list ("),
        ("\tlr: 1", "r.yaml:1: recipe: not valid YAML: found character"),
        (RECIPE.encode("utf-16"), "r.yaml:1: recipe: is UTF-16 (save it as UTF-8)"),
        (RECIPE.encode("utf-16-le"), "r.yaml:1: recipe: holds the character U+0000 (remove it)"),
        (RECIPE.replace("bert", "bért").encode("latin-1"), "r.yaml:4: recipe: is not UTF-8: byte 0xE9 (save"),
        (RECIPE.replace("bert", "\ud800"), "r.yaml:4: recipe: is not UTF-8: byte 0xED ("),
        (RECIPE.replace("bert", '"\\ud800"'), "r.yaml:4: "),
        (RECIPE.replace("bert", "b\0"), "r.yaml:4: recipe: holds the character U+0000 (remove it)"),
        (RECIPE.replace("bert", '"b\\0"'), "r.yaml:4: model.encoder: holds a NUL character (remove it)"),
        (RECIPE.replace("1_024", "9" * 5000), "r.yaml:8: batch.global_size: is a number of more than 40 digits ("),
        (RECIPE.replace("1e-5", "9" * 5000), "r.yaml:10: optim.lr: is a number of more than 40 digits ("),
        (RECIPE.replace("output_dir: runs/x", "output_dir: ~"), "r.yaml:2: run.output_dir: must be a text, got null ("),
        (RECIPE.replace("output_dir: runs/x", "output_dir: ''"), "r.yaml:2: run.output_dir: must not be empty (name a"),
        (RECIPE.replace("output_dir: runs/x", "output_dir: '~'"), 'r.yaml:2: run.output_dir: no folder "~" (name one'),
        (RECIPE.replace("[a.jsonl]", "[{path: x, weight: -1}]"), "data.train.0.weight: must be greater than 0, got -1"),
        (RECIPE.replace("optim:\n  lr: 1e-5", "optim:"), "r.yaml:9: optim: must be a section, got null ("),
    ],
)  # fmt: skip
def test_a_file_that_is_no_recipe_is_told_in_one_line(
    content: str | bytes, message: str | None, tmp_path: Path
) -> None:
    if message is None:  # many mistakes: some are listed, and that there are others
        with pytest.raises(ConfigError) as caught:
            loader.load(FinetuneRecipe, _written(tmp_path, content))
        lines = str(caught.value).split("\nerror: ")
        assert len(lines) == 21 and lines[-1].endswith("recipe: holds more mistakes (correct those above first)")
    else:
        assert message in mistake(tmp_path, content)


def _written(tmp_path: Path, content: str | bytes) -> Path:
    path = tmp_path / "r.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_a_bom_crlf_and_aliases_within_bounds_are_fine(tmp_path: Path) -> None:
    expected = loader.load(FinetuneRecipe, _written(tmp_path, RECIPE))
    for content in (b"\xef\xbb\xbf" + RECIPE.encode(), RECIPE.replace("\n", "\r\n"), "---\n" + RECIPE + "...\n"):
        assert loader.load(FinetuneRecipe, _written(tmp_path, content)) == expected
    shared = RECIPE.replace("runs/x", "&place runs/x").replace("[a.jsonl]", "[*place, *place]")
    assert loader.load(FinetuneRecipe, _written(tmp_path, shared)).data.train == ["runs/x", "runs/x"]


def _sparse(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(600 << 20)


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(path))  # the length of a full path may exceed a socket's limit


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (os.mkfifo, "is a FIFO, not a file"),
        (_socket, "is a socket, not a file"),
        (Path.mkdir, "is a folder, not a file"),
        (lambda path: path.symlink_to("nowhere"), "is a link to nothing"),
        (lambda path: path.symlink_to("/dev/zero"), "is a device, not a file"),
        (_sparse, "more than 1,048,576 bytes"),
    ],
)
def test_what_is_no_file_of_a_recipes_size_is_never_read(
    make: Callable[[Path], object], problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "r.yaml")
    with pytest.raises(ConfigError, match=f"^r.yaml:1: recipe: {problem} \\("):
        loader.load(FinetuneRecipe, "r.yaml")


def test_a_nul_in_the_path_is_told() -> None:
    with pytest.raises(ConfigError, match=r"recipe: embedded null byte \(name a YAML file\)"):
        loader.load(FinetuneRecipe, "a\0b")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        *((f"optim.lr={text}", f"optim.lr: must be a finite number, got {got} (write a number, as 0.1)")
          for text, got in ((".nan", "NaN"), (".inf", "Infinity"), ("-.Inf", "-Infinity"), ("1e999", "Infinity"))),
        *((f"optim.lr={text}", f'optim.lr: must be a number, got "{text}" (') for text in ("nan", "Infinity", "x")),
        *((f"{key}=1000000000000", f"{key}: must be at most ") for key in (
            "batch.global_size", "batch.micro_size", "batch.keep_graph", "schedule.steps", "data.workers",
            "data.processes", "model.max_length", "data.query_max_length", "data.negatives_per_query",
            "checkpoint.every_steps", "checkpoint.keep", "track.log_every", "evaluate.batch_size",
            "evaluate.max_queries", "engine.timeout_minutes", "engine.give_up_after", "loss.distillation", "optim.lr")),
        ("loss.temperature=1e-45", "loss.temperature: must be at least 0.0001, got 1e-45 (raise it)"),
        ("model.dropout=1", "model.dropout: must be less than 1, got 1 (lower it)"),
        ("model.dropout=-0.1", "model.dropout: must be at least 0, got -0.1 (raise it)"),
        ("optim.betas=[0.9, 1]", "optim.betas.1: must be less than 1, got 1 (lower it)"),
        ("optim.betas=[0.9]", "optim.betas: must have one entry more, got [0.9] (add it)"),
        ("run.seed=-1", "run.seed: must be at least 0, got -1 (raise it)"),
        ("batch.micro_tokens=x", 'micro_tokens: must be an integer or auto, got "x" (write a whole number, as 16)'),
        ("batch.micro_tokens=1.5", "batch.micro_tokens: must be an integer or auto, got 1.5 ("),
        ("data.train=x", 'data.train: must be a list, got "x" (write it in brackets, as [a, b])'),
        ("data.train=[]", "data.train: must have at least 1 entry, got [] (add one)"),
        ("data.train=[4]", "data.train.0: must be a text or a section, got 4 ("),
        ("data.train=[{weight: 1}]", "data.train.0.path: not set (it has no default: add it)"),
        ("data.train=[!!str x]", "data.train.0: tag !!str: a recipe holds plain values only (remove the tag)"),
        ("model.pooling=max", "model.pooling: must be one of cls, mean, last_token or auto, got \"max\" (correct it)"),
        ("precision=fp8", "precision: must be one of bf16, fp16, tf32, fp32, got \"fp8\" (correct it)"),
        ("model.random_weights=yes", 'model.random_weights: must be true or false, got "yes" (write'),
        ("evaluate.dta=x", "evaluate.dta: unknown key (did you mean 'data'?)"),  # in a section that the file lacks
        ("foo.bar=1", "foo: unknown key (known here: run, model"),
        ("optim..lr=1", "optim..lr=1: not an override (write KEY=VALUE"),
        ("run=1", "run: must be a section, got 1 ("),
        ("=1", "=1: not an override (write KEY=VALUE"),
        ("a" + ".a" * 5000 + "=1", "...: not an override (write KEY=VALUE"),
        ("run.name=[[", 'run.name: cannot read the value "[[" (quote it)'),
        ("run.name=" + "[" * 100_000, "run.name: recipe: nested deeper than 32 levels ("),
        ("optim={lr: 1, lr: 2}", "optim.lr: already set above (keep one of the two)"),
        ("model.encoder=\udcff", "model.encoder: holds half of a surrogate pair, which is no character (remove it)"),
        ("run.output_dir=~", "run.output_dir: must be a text, got null (write a value; ~ and nothing at all stand for"),
        ("run.output_dir=", "run.output_dir: must be a text, got null (write a value; ~ and nothing at all stand for"),
        *((f"{key}={name}", f"{key}: must consist of letters, digits, '_', '-' and '.', ") for key, name in (
            ("run.name", "../x"), ("run.name", ".x"), ("run.name", "a b"), ("run.name", "x" * 101),
            ("track.project", "a/b"), ("evaluate.split", "../test"))),
        ("evaluate.keep_best=ndcg@10", "evaluate.keep_best: not a metric, got \"ndcg@10\" (did you mean"),
        ("evaluate.keep_best=mrr_at_10", "evaluate.keep_best: needs evaluate.data (name a BEIR folder)"),
        ("engine={kind: deepspeed, zero_stage: 0}", "engine.zero_stage: fp16 needs 1, 2 or 3 under deepspeed ("),
        ("model.compile=true", "model.compile: must be one of false, layers, got true (correct it)"),
        ("model.compile=layers", "model.compile: zero_stage 3 gathers weights inside the layers (use 0, 1 or 2, or"),
    ],
)  # fmt: skip
def test_an_override_that_cannot_be_is_told_in_one_line(override: str, message: str, tmp_path: Path) -> None:
    more = ["precision=fp16"] if "deepspeed" in override else []
    more += ["engine={kind: deepspeed, zero_stage: 3}"] if "compile" in override else []
    told = mistake(tmp_path, RECIPE, override, *more)
    assert told.startswith("command line: ") and message in told


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ('tasks={"../x": {kind: sts, data: d}}', "tasks.../x: must consist of letters"),
        ("tasks={a: {kind: foo}}", "tasks.a.kind: must be one of retrieval, classification, clustering, sts, pair_"),
        ("tasks={a: {}}", "tasks.a.kind: not set (it has no default: add it)"),
        ("tasks={a: 3}", "tasks.a: must be a section, got 3 ("),
        ("tasks={a: {kind: sts, data: x, z: 1}}", "tasks.a.z: unknown key (known here: data, sentence1"),
        ("models=5", "models: must be a list or a section, got 5 ("),
        ("models=[1]", "models.0: must be a text, got 1 ("),
        ('models={"a/b": x}', "models.a/b: must consist of letters"),
        ("prompts={b: {query: x}}", "prompts.b: no model has that label (known: a)"),
        ("bootstrap.resamples=1000000000000", "bootstrap.resamples: must be at most 1,000,000, got 1000000000000 ("),
    ],
)
def test_labels_and_unions_are_told_by_their_key(override: str, message: str, tmp_path: Path) -> None:
    told = mistake(tmp_path, "models: {a: x}\nevaluate: {data: y}\n", override, schema=EvaluateRecipe)
    assert told.startswith(f"command line: {message}")


def test_a_stream_without_steps_and_muon_under_zero_3_are_found_in_the_recipe(tmp_path: Path) -> None:
    by_epochs = RECIPE.replace("steps: 10", "epochs: 1") + "engine: {kind: ddp}\n"
    assert "data.streaming: a stream has no known length (" in mistake(
        tmp_path, by_epochs, "data.streaming=true", schema=PretrainRecipe
    )
    muon = ("optim.name=muon", "optim.clip_norm=0", "engine.kind=deepspeed", "engine.zero_stage=3")
    assert "engine.zero_stage: muon needs whole matrices (" in mistake(tmp_path, RECIPE, *muon)


def test_a_path_below_the_home_folder_is_expanded_whatever_its_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    overrides = [f"{key}=~/x" for key in ("run.output_dir", "model.encoder", "checkpoint.resume", "evaluate.data")]
    recipe = loader.load(FinetuneRecipe, _written(tmp_path, RECIPE), [*overrides, "data.train=[~/a, {path: ~/b}]"])
    paths = (recipe.run.output_dir, recipe.model.encoder, recipe.checkpoint.resume, recipe.evaluate.data)
    assert set(paths) == {f"{tmp_path}/x"} and [dataset.path for dataset in recipe.data.sets] == [
        f"{tmp_path}/a",
        f"{tmp_path}/b",
    ]
    assert recipe.data.cache_dir == f"{tmp_path}/.cache/lodestar"  # the default too


def _circular() -> dict[str, object]:
    values: dict[str, object] = {}
    values["run"] = values
    return values


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": {"global_size": 10**5000}}, "recipe: batch.global_size: is a number of more than 40 digits ("),
        ({"optim": {"lr": float("nan")}}, "recipe: optim.lr: must be a finite number, got NaN ("),
        ({"optim": {1: 2}}, "recipe: optim: the key 1 is no name (write it as a short text)"),
        ({"run": {"output_dir": "a\0"}}, "recipe: run.output_dir: holds a NUL character (remove it)"),
        ({"model": {"encoder": "\ud800"}}, "recipe: model.encoder: holds half of a surrogate pair"),
        (_circular(), "nested deeper than 32 levels ("),
    ],
)
def test_values_of_python_that_no_recipe_may_hold_are_told(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        loader.recipe_of(FinetuneRecipe, VALUES | change)
    assert message in str(caught.value) and MESSAGE.fullmatch(str(caught.value))


def test_the_pure_parser_tells_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyYAML may be installed without libyaml."""
    import yaml

    monkeypatch.setattr("lodestar.config.tree._LOADER", yaml.SafeLoader)
    assert "*a: an alias of itself (" in mistake(tmp_path, "a: &a [*a]")
    assert "nested deeper than 32 levels (" in mistake(tmp_path, "a: " + "[" * 100_000)
    assert "r.yaml:4: model.encoder: tag !: a recipe" in mistake(tmp_path, RECIPE.replace("bert", "! bert"))
    assert "half of a surrogate pair" in mistake(tmp_path, RECIPE.replace("bert", '"\\ud800"'))
    assert loader.load(FinetuneRecipe, _written(tmp_path, RECIPE)).batch.global_size == 1024


OPTIONS = [
    (["--plan", "1000000000"], '--plan: must be a number of processes, got "1000000000" (take one from 1 to 100,000)'),
    (["--plan", "9" * 5000], "--plan: must be a number of processes, got "),
    (["--plan", "²"], "--plan: must be a number of processes, got "),
    (["--plan", "--plan"], "--plan: given twice (keep one of the two)"),
    (["--config", "b.yaml"], "--config: given twice (keep one of the two)"),
    (["--config=b.yaml"], "--config: given twice (keep one of the two)"),
    (["optim.lr=1", "run.name=x", "optim.lr=2"], "optim.lr: given twice (keep one of the two)"),
    (["--json"], "--json: only with --plan (add that, or leave it out)"),
    (["--device", "h100"], "--device: only with --plan (add that, or leave it out)"),
    (["--rehearse"], "--rehearse: has no value (give one)"),
    (["--plna"], "--plna: unknown option (did you mean '--plan'?)"),
    (["--json=1"], "--json: takes no value (leave it out)"),
    (["--plan", "--device", "a100"], "--device: must be one of 'a100-40g', "),
]


@pytest.mark.parametrize(("options", "message"), OPTIONS, ids=[" ".join(options)[:30] for options, _ in OPTIONS])
def test_options_that_cannot_be_are_told_in_our_form(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from contrastive.cli import main

    assert main(["--config", str(_written(tmp_path, RECIPE)), *options]) == 2
    out, err = capsys.readouterr()
    assert err.startswith(f"error: command line: {message}") and MESSAGE.fullmatch(err.strip()) and not out


def test_a_bomb_takes_little_time_and_memory(tmp_path: Path) -> None:
    """In a process of its own, whose peak is that of the recipe."""
    path = _written(tmp_path, BOMB)
    code = (
        "import re, sys; from contrastive.cli import main; code = main(sys.argv[1:]); "
        r"print(re.search(r'VmHWM:\s+(\d+)', open('/proc/self/status').read())[1]); raise SystemExit(code)"
    )
    done = processes.run([sys.executable, "-c", code, "--config", str(path)], limit_s=30)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and int(done.stdout) < 200_000  # KiB


def test_an_override_over_a_key_with_a_dot_is_told_too(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"a\.b: unknown key"):
        loader.load(FinetuneRecipe, _written(tmp_path, RECIPE + "a.b: 1\n"), ["a=1"])
