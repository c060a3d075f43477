"""Hard negatives against plain loops, and what must never be one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lodestar.config import loader
from lodestar.data.training_examples import check_row
from lodestar.distributed.runtime import Runtime
from lodestar.distributed.testing import run_world
from lodestar.errors import DataError
from retrieval.embedding.config import EncodeConfig
from retrieval.embedding.embedder import Embedder
from retrieval.embedding.shards import read_embeddings
from retrieval.mining.cli import main
from retrieval.mining.config import MineRecipe
from retrieval.mining.hard_negatives import mine
from retrieval.mining.shard_search import read_vectors
from retrieval.mining.texts import write_texts
from tests import tiny

pytest.importorskip("faiss", reason="faiss is not installed (the extra mine)")

TEXTS = tiny.texts(120, seed=21, longest=9)  # none is cut: equal beginnings would tie


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("mine")
    tiny.trained(root / "model", root / "plain")
    rows = [{"query": TEXTS[i], "pos": [TEXTS[30 + i]], "neg": [TEXTS[60 + i]]} for i in range(30)]
    rows[3]["pos"] = [TEXTS[33], TEXTS[34], TEXTS[3]]  # another row's answer, and the query itself
    rows.append(
        {"query": TEXTS[0], "pos": [TEXTS[99]], "neg": [TEXTS[100]], "prompt": "find "}
    )  # the query of the first row
    tiny.write_jsonl(root / "train.jsonl", rows)
    tiny.write_jsonl(root / "corpus.jsonl", [{"_id": str(i), "text": f" {text}"} for i, text in enumerate(TEXTS[40:])])
    return root


def recipe(folder: Path, out: Path, *overrides: str) -> MineRecipe:
    path = out.parent / "mine.yaml"
    values: dict[str, Any] = {"model": f"{folder}/model", "data": [f"{folder}/train.jsonl"], "output": str(out)}
    values |= {"mine": {"negatives": 4, "first_rank": 0, "last_rank": 20}, "encode": {"shard_rows": 16}}
    path.write_text(json.dumps(values))
    return loader.load(MineRecipe, path, overrides)


def mined(mine_recipe: MineRecipe) -> list[dict[str, Any]]:
    mine(mine_recipe, Runtime(0, 1, 0, torch.device("cpu")))
    return [json.loads(line) for line in Path(mine_recipe.output).read_text().splitlines()]


def plain(folder: Path, mine_recipe: MineRecipe) -> list[list[str]]:
    """By loops: the nearest that are neither answers of the question, nor its own text, nor above the margin."""
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    if mine_recipe.corpus:
        pool = [json.loads(line)["text"].strip() for line in (folder / "corpus.jsonl").read_text().splitlines()]
    else:
        pool = list(dict.fromkeys(text for row in rows for text in (*row["pos"], *row["neg"])))
    embedder = Embedder(folder / "model")
    negatives = []
    for row in rows:
        answers = {text for other in rows if other["query"] == row["query"] for text in other["pos"]}
        query_D = embedder.encode_queries([row["query"]])[0]
        score = dict(zip(pool, embedder.encode_documents(pool) @ query_D, strict=True))
        lowest = min(embedder.encode_documents(row["pos"]) @ query_D)
        ranked = sorted((text for text in pool if text not in answers | {row["query"]}), key=lambda t: -score[t])
        window = ranked[mine_recipe.mine.first_rank : mine_recipe.mine.last_rank]
        if mine_recipe.mine.margin is not None:
            window = [text for text in window if score[text] <= lowest - mine_recipe.mine.margin]
        if mine_recipe.mine.relative_margin is not None:
            window = [text for text in window if score[text] <= mine_recipe.mine.relative_margin * lowest]
        negatives.append(window[: mine_recipe.mine.negatives])
    return negatives


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("mine.first_rank=3", "mine.last_rank=9", "mine.negatives=10"),
        ("mine.margin=0.05",),
        ("mine.relative_margin=0.99", "corpus=CORPUS", "mine.last_rank=100"),
        ("corpus=CORPUS", "mine.last_rank=500", "mine.negatives=500"),
    ],
    ids=str,
)
def test_negatives_are_those_of_plain_loops(overrides: tuple[str, ...], folder: Path, tmp_path: Path) -> None:
    overrides = tuple(text.replace("CORPUS", f"[{folder}/corpus.jsonl]") for text in overrides)
    mine_recipe = recipe(folder, tmp_path / "out.jsonl", "mine.pick=top", *overrides)
    rows, expected = mined(mine_recipe), plain(folder, mine_recipe)
    assert [[text.strip() for text in row["neg"]] for row in rows] == expected
    assert any(expected) and [row["pos"] for row in rows][3] == [TEXTS[33], TEXTS[34], TEXTS[3]]


def test_a_query_with_many_answers_is_searched_as_deep_as_it_needs(folder: Path, tmp_path: Path) -> None:
    """70 answers, all of them nearer than the negatives, are more than the usual room beside the window."""
    (tmp_path / "model").symlink_to(folder / "model")
    rows = [{"query": TEXTS[0], "pos": TEXTS[:70], "neg": []}]
    rows.append({"query": TEXTS[1], "pos": [TEXTS[80]], "neg": TEXTS[70:]})
    tiny.write_jsonl(tmp_path / "train.jsonl", rows)
    mine_recipe = recipe(tmp_path, tmp_path / "out.jsonl", "mine.pick=top")
    assert [row["neg"] for row in mined(mine_recipe)] == plain(tmp_path, mine_recipe)
    assert all(len(row["neg"]) == 4 for row in mined(mine_recipe))


def test_scores_are_the_models_and_stage_2_can_read_the_rows(folder: Path, tmp_path: Path) -> None:
    rows, embedder = mined(recipe(folder, tmp_path / "out.jsonl")), Embedder(folder / "model")
    for number, row in enumerate(rows):
        assert check_row(str(number), row) is not None
        query_D = embedder.encode_queries([row["query"]])[0]
        for name in ("pos", "neg"):
            np.testing.assert_allclose(row[f"{name}_scores"], embedder.encode_documents(row[name]) @ query_D, atol=1e-5)
    assert rows[-1]["prompt"] == "find " and "prompt" not in rows[0]
    assert all(len(row["neg"]) == len(set(row["neg"])) == 4 for row in rows)


def test_an_answer_or_an_equal_text_is_never_a_negative(folder: Path, tmp_path: Path) -> None:
    everything = recipe(folder, tmp_path / "out.jsonl", "mine.last_rank=500", "mine.negatives=500")
    rows = mined(everything)
    for row in rows:
        answers = {text for other in rows if other["query"] == row["query"] for text in other["pos"]}
        assert not set(row["neg"]) & (answers | {row["query"]})
    assert TEXTS[99] in rows[1]["neg"] and TEXTS[99] not in rows[0]["neg"]  # it answers row 0's query


def test_random_negatives_come_from_the_window_and_differ_by_seed_alone(folder: Path, tmp_path: Path) -> None:
    first, again, other = (
        [row["neg"] for row in mined(recipe(folder, tmp_path / f"{i}.jsonl", f"mine.seed={seed}"))]
        for i, seed in enumerate((1, 1, 2))
    )
    window = plain(folder, recipe(folder, tmp_path / "w.jsonl", "mine.negatives=20"))
    assert first == again != other
    assert all(set(chosen) <= set(whole) for chosen, whole in zip(first, window, strict=True))


def _rank(rank: int, size: int, mine_recipe: Any) -> None:
    mine(mine_recipe, Runtime(rank, size, rank, torch.device("cpu")))


def test_blocks_ranks_and_interruptions_change_nothing(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = mined(recipe(folder, tmp_path / "whole.jsonl"))
    mine_recipe = recipe(folder, tmp_path / "ranks.jsonl", "mine.block_rows=7")
    run_world(_rank, 2, mine_recipe)
    ranks = [json.loads(line) for line in Path(mine_recipe.output).read_text().splitlines()]
    parts = sorted(mine_recipe.work.rglob("part-*"))
    assert len(parts) == 5
    parts[2].unlink()
    written = parts[1].stat().st_mtime_ns
    again = mined(mine_recipe)
    assert parts[1].stat().st_mtime_ns == written
    for other in (ranks, again):
        assert [row["neg"] for row in other] == [row["neg"] for row in whole]
    assert "31 examples with 4.0 negatives each, 0 with fewer" in capsys.readouterr().out


def test_a_cross_encoder_gives_its_own_scores(folder: Path, tmp_path: Path) -> None:
    from sentence_transformers import CrossEncoder
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(0)
    cross = AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(folder / "plain", num_labels=1))
    cross.save_pretrained(tmp_path / "cross")
    AutoTokenizer.from_pretrained(folder / "plain").save_pretrained(tmp_path / "cross")
    rows = mined(recipe(folder, tmp_path / "out.jsonl", f"cross_encoder={tmp_path}/cross"))
    model = CrossEncoder(str(tmp_path / "cross"), device="cpu")
    after_sigmoid = model.predict([(rows[0]["query"], text) for text in (*rows[0]["pos"], *rows[0]["neg"])])
    expected = np.log(after_sigmoid / (1 - after_sigmoid))
    np.testing.assert_allclose([*rows[0]["pos_scores"], *rows[0]["neg_scores"]], expected, atol=1e-5)


def test_the_current_folder_decides_nothing(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine_recipe = recipe(folder, tmp_path / "out.jsonl")
    for number in range(2):
        start = tmp_path / f"start-{number}"
        start.mkdir()
        (start / "a.json").write_text(str(number))
        monkeypatch.chdir(start)
        mined(mine_recipe)
    assert len(list(mine_recipe.work.glob("*/mined-*"))) == 1


def test_ranks_share_a_file_that_is_smaller_than_a_block(folder: Path, tmp_path: Path) -> None:
    mine_recipe = recipe(folder, tmp_path / "out.jsonl")
    assert mine_recipe.mine.block_rows > 31
    run_world(_rank, 2, mine_recipe)
    assert len(list(mine_recipe.work.glob("*/mined-*/part-*"))) == 2
    ranks = [json.loads(line) for line in Path(mine_recipe.output).read_text().splitlines()]
    alone = mined(recipe(folder, tmp_path / "alone.jsonl"))
    assert [row["neg"] for row in ranks] == [row["neg"] for row in alone]  # scores may differ by rounding


def test_prompts_of_a_recipe_replace_the_models_own(folder: Path, tmp_path: Path) -> None:
    rows = mined(recipe(folder, tmp_path / "out.jsonl", "prompts.query=the vector of "))
    embedder = Embedder(folder / "model", prompts={"query": "the vector of "})
    expected = embedder.encode_documents(rows[0]["neg"]) @ embedder.encode_queries(rows[0]["query"])
    np.testing.assert_allclose(rows[0]["neg_scores"], expected, atol=1e-5)


def test_vectors_of_a_block_hold_no_shard(folder: Path, tmp_path: Path) -> None:
    mine_recipe = recipe(folder, tmp_path / "out.jsonl")
    mined(mine_recipe)
    (queries,) = mine_recipe.work.glob("*/queries")
    whole = np.concatenate([vectors_ND for _, vectors_ND in read_embeddings(queries)])
    block_ND = read_vectors(queries, 14, 4)  # of two shards of 16
    np.testing.assert_array_equal(block_ND, whole[14:18])
    assert block_ND.base is None


def test_the_name_of_the_work_folder_tells_what_decides_its_content(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    for name in "ab":
        (tmp_path / f"d/{name}.jsonl").write_text((folder / "train.jsonl").read_text())
    both = recipe(folder, tmp_path / "out.jsonl", f"data=[{tmp_path}/d]")
    one = recipe(folder, tmp_path / "out.jsonl", f"data=[{tmp_path}/d/a.jsonl]", f"corpus=[{tmp_path}/d/b.jsonl]")
    in_bf16 = both.model_copy(update={"encode": EncodeConfig(precision="bf16")})
    assert write_texts(both).folder != write_texts(in_bf16).folder
    with pytest.raises(DataError, match="text: must be a text"):
        write_texts(one)


def test_a_mistake_is_one_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe(folder, tmp_path / "out.jsonl")
    config_file = str(tmp_path / "mine.yaml")
    assert main(["--config", config_file, "mine.last_rank=0"]) == 2
    assert main(["--config", config_file, "mine.first_rank=30"]) == 2
    assert "last_rank must lie above first_rank, got 20 and 30" in capsys.readouterr().err
    assert main(["--config", config_file, "data=[nowhere.jsonl]"]) == 2
    assert "error: command line: data: nowhere.jsonl: no such file" in capsys.readouterr().err
    assert main(["--config", config_file, f"cross_encoder={tmp_path}"]) == 2
    assert "error: command line: cross_encoder: " in capsys.readouterr().err
    assert main(["--config", config_file, "--plan"]) == 0


def test_what_an_earlier_run_left_is_used_only_where_it_is_as_it_was_written(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = recipe(folder, tmp_path / "out.jsonl", "mine.block_rows=8")
    expected = mined(options)
    kept = [path for path in options.work.rglob("*") if path.is_file() and not path.name.startswith(".")]
    (texts,) = {path for path in kept if path.name == "texts.json"}
    parts = sorted(path for path in kept if path.name.startswith("part-"))
    assert len(parts) > 2
    for damaged in (parts[1], texts, texts.parent / "corpus.jsonl", texts.parent / "hashes.npy"):
        times = {path: path.stat().st_mtime_ns for path in parts}
        content = bytearray(damaged.read_bytes())
        content[len(content) // 2] ^= 1
        damaged.write_bytes(content)
        capsys.readouterr()
        assert mined(options) == expected
        (told,) = [line for line in capsys.readouterr().err.splitlines() if "nothing to do" in line]
        assert told.startswith(f"warning: {damaged}: damaged: ")
        assert {path for path in parts if path.stat().st_mtime_ns != times[path]} == {damaged} & set(parts)
