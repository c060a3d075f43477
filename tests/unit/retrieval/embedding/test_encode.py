"""A corpus to files of embeddings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from lodestar.config import loader
from lodestar.distributed.runtime import Runtime
from lodestar.distributed.testing import run_world
from lodestar.errors import ConfigError, DataError
from retrieval.embedding.cli import main, plan
from retrieval.embedding.config import EncodeRecipe
from retrieval.embedding.corpus import read_texts
from retrieval.embedding.encode import encode
from retrieval.embedding.shards import MANIFEST, read_embeddings, read_shard
from tests import tiny

ROWS = tiny.texts(50, seed=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("encode")
    tiny.trained(root / "model", root / "plain")
    tiny.write_jsonl(root / "texts.jsonl", [{"_id": f"d{i}", "text": text} for i, text in enumerate(ROWS)])
    tiny.beir_folder(root / "beir")
    return root


def recipe(folder: Path, out: Path, *overrides: str) -> EncodeRecipe:
    path = out.parent / "encode.yaml"
    values = {"model": f"{folder}/model", "texts": [f"{folder}/texts.jsonl"], "output": {"dir": str(out)}}
    path.write_text(json.dumps({**values, "encode": {"shard_rows": 8}}))
    return loader.load(EncodeRecipe, path, overrides)


def make(recipe: EncodeRecipe) -> None:
    encode(recipe, Runtime(0, 1, 0, torch.device("cpu")))


def gathered(out: Path) -> tuple[list[str], np.ndarray]:
    parts = list(read_embeddings(out))
    return [name for ids, _ in parts for name in ids], np.concatenate([vectors for _, vectors in parts])


def _rank(rank: int, size: int, recipe: Any) -> None:
    encode(recipe, Runtime(rank, size, rank, torch.device("cpu")))


@pytest.mark.parametrize("file_format", ["safetensors", "parquet"])
@pytest.mark.parametrize("role", ["query", "document"])
def test_files_hold_sentence_transformers_own_embeddings_in_input_order(
    file_format: str, role: str, folder: Path, tmp_path: Path
) -> None:
    make(recipe(folder, tmp_path / "out", f"output.format={file_format}", f"role={role}"))
    theirs = SentenceTransformer(str(folder / "model"), device="cpu")
    expected = (theirs.encode_query if role == "query" else theirs.encode_document)(ROWS)
    ids, found = gathered(tmp_path / "out")
    assert ids == [f"d{i}" for i in range(50)] and found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-6)
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert manifest["rows"] == 50 and manifest["width"] == 32 and len(manifest["files"]) == 7


def test_two_ranks_and_two_processes_write_what_one_writes(folder: Path, tmp_path: Path) -> None:
    make(recipe(folder, tmp_path / "one"))
    make(recipe(folder, tmp_path / "processes", "encode.devices=[cpu, cpu]"))
    run_world(_rank, 2, recipe(folder, tmp_path / "ranks"))
    (ids, whole), *others = (gathered(tmp_path / name) for name in ("one", "processes", "ranks"))
    for other_ids, other in others:
        assert other_ids == ids
        np.testing.assert_allclose(other, whole, atol=1e-6)
    assert (tmp_path / "one" / MANIFEST).read_text() == (tmp_path / "ranks" / MANIFEST).read_text()


def test_a_run_that_was_interrupted_goes_on_at_its_shard(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    made = recipe(folder, out)
    make(made)
    ids, whole = gathered(out)
    manifest = (out / MANIFEST).read_text()
    (out / "shard-00003.safetensors").unlink()
    (out / "shard-00005.safetensors").write_bytes(b"torn")
    (out / MANIFEST).unlink()
    kept = (out / "shard-00001.safetensors").stat().st_mtime_ns
    with pytest.raises(DataError, match="not finished"):
        gathered(out)
    make(made)
    again, found = gathered(out)
    assert again == ids and np.array_equal(found, whole) and (out / MANIFEST).read_text() == manifest
    assert (out / "shard-00001.safetensors").stat().st_mtime_ns == kept


@pytest.mark.parametrize("file_format", ["safetensors", "parquet"])
def test_a_shard_with_a_flipped_byte_is_encoded_again(
    file_format: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    made = recipe(folder, out, f"output.format={file_format}", "output.dtype=int8")
    make(made)
    names = [f"shard-{number:05d}.{file_format}" for number in range(7)]
    ids, whole = gathered(out)
    ranges = (out / "ranges.json").read_text()
    damaged = [(name, at / 10) for name, at in zip(names[:5], (0, 1, 5, 9, 9.99), strict=True)] + [("ranges.json", 0.5)]
    for name, at in damaged:
        content = bytearray((out / name).read_bytes())
        content[int(at * len(content))] ^= 4
        (out / name).write_bytes(content)
    kept = (out / names[6]).stat().st_mtime_ns
    capsys.readouterr()
    make(made)
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert [Path(line.split(": ")[1]).name for line in told] == ["ranges.json", *names[:5]]
    again, found = gathered(out)
    assert again == ids and np.array_equal(found, whole) and (out / "ranges.json").read_text() == ranges
    assert (out / names[6]).stat().st_mtime_ns == kept


@pytest.mark.parametrize("other", ["role=query", "output.dtype=float16", "encode.shard_rows=9", "output.width=8"])
def test_a_folder_of_other_embeddings_is_not_mixed_up(other: str, folder: Path, tmp_path: Path) -> None:
    make(recipe(folder, tmp_path / "out"))
    with pytest.raises(ConfigError, match=r"shard-00000\.safetensors is of another model, corpus or setting"):
        make(recipe(folder, tmp_path / "out", other))


def test_numbers_are_kept_as_asked(folder: Path, tmp_path: Path) -> None:
    found = {}
    for dtype in ("float32", "float16", "int8", "binary"):
        make(recipe(folder, tmp_path / dtype, f"output.dtype={dtype}"))
        found[dtype] = gathered(tmp_path / dtype)[1]
    whole = found["float32"]
    np.testing.assert_array_equal(found["float16"], whole.astype(np.float16))
    low, high = np.array(json.loads((tmp_path / "int8/ranges.json").read_text())["ranges"])
    back = low + (found["int8"].astype(np.float32) + 128.5) * (high - low) / 255
    assert found["int8"].dtype == np.int8 and np.abs(back - whole).max() < (high - low).max() / 255
    signs = np.unpackbits((found["binary"].astype(np.int16) + 128).astype(np.uint8), axis=1).astype(bool)
    np.testing.assert_array_equal(signs, whole > 0)
    make(recipe(folder, tmp_path / "narrow", "output.width=8"))
    narrow = whole[:, :8] / np.linalg.norm(whole[:, :8], axis=1, keepdims=True)
    np.testing.assert_allclose(gathered(tmp_path / "narrow")[1], narrow, atol=1e-6)


def test_a_beir_folder_is_read_by_role_with_its_titles(folder: Path, tmp_path: Path) -> None:
    made = recipe(folder, tmp_path / "out", f"texts=[{folder}/beir]", "role=query")
    make(made)
    assert read_shard(tmp_path / "out/shard-00000.safetensors")[0][0].startswith("q")
    assert plan(made, 1)["rows"] == 12


def test_ranges_of_another_run_are_not_taken(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/ranges.json").write_text(json.dumps({"key": "another", "ranges": [[0] * 32, [1e-9] * 32]}))
    make(recipe(folder, tmp_path / "out", "output.dtype=int8"))
    assert len(np.unique(gathered(tmp_path / "out")[1])) > 100


def test_a_title_goes_before_the_text_alone(folder: Path, tmp_path: Path) -> None:
    tiny.write_jsonl(tmp_path / "titled.jsonl", [{"title": "T", "text": "x", "body": "y"}])
    for field, expected in (("text", "T x"), ("title", "T"), ("body", "y")):
        made = recipe(folder, tmp_path / "out", f"texts=[{tmp_path}/titled.jsonl]", f"field={field}")
        assert list(read_texts(made)) == [("0", expected)]


def test_a_mistake_is_one_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe(folder, tmp_path / "out")
    config_file = str(tmp_path / "encode.yaml")
    assert main(["--config", config_file, "field=body"]) == 2
    problem = "body: must be a text, got NoneType (name it in field; here: _id, text)"
    assert capsys.readouterr().err.endswith(f"texts.jsonl:1: {problem}\n")
    assert main(["--config", config_file, "encode.devices=[cuda:9]"]) == 2
    assert "error: devices: cuda:9" in capsys.readouterr().err
    (tmp_path / "half.jsonl").write_text('{"text": "fine"}\n{"text": "half \\ud83d"}\n')
    (tmp_path / "empty.jsonl").write_text("")
    for wrong, told in (
        ([f"texts=[{tmp_path}/half.jsonl]"], "half.jsonl:2: row: holds half a character"),
        ([f"texts=[{tmp_path}/empty.jsonl]", "output.dtype=int8"], "no row"),
        ([f"output.dir={config_file}/below"], "output.dir: "),
    ):
        assert main(["--config", config_file, *wrong]) == 2
        assert told in capsys.readouterr().err
    assert main(["--config", config_file, "--plan"]) == 0
    assert "7" in capsys.readouterr().out and not (tmp_path / "out" / MANIFEST).exists()
