"""The plan of a run: as text, and what it finds before a run would."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from contrastive.cli import main
from contrastive.config import FinetuneRecipe
from contrastive.plan import check, plan
from lodestar.config import loader
from lodestar.config.schema import BatchPlan
from lodestar.errors import LodestarError
from lodestar.planning.plan import batch_in_words
from tests.unit.lodestar.config.test_loader import RECIPE, VALUES


def test_the_batch_in_words() -> None:
    examples = BatchPlan(32768, 48, 171).examples_per_rank
    plan = {"global_size": 32768, "chunks_per_rank": 4, "negatives_per_query": 65535, "rows_per_rank": examples}
    assert batch_in_words(plan) == (
        "global batch: 32,768 = 32 x 683 + 16 x 682 queries; 4 micro-batches a step; 65,535 negatives each"
    )
    plan = {"global_size": 720, "chunks_per_rank": 1, "negatives_per_query": 0, "rows_per_rank": [30] * 24}
    assert batch_in_words(plan) == "global batch: 720 = 24 x 30 texts; 1 micro-batch a step"


SHAPE = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 100, "max_position_embeddings": 128}


@pytest.mark.parametrize(
    ("config", "overrides", "message"),
    [
        ({}, ["loss.matryoshka=[32, 64]"], "loss.matryoshka: 64: not narrower than the embedding, which has 64 ("),
        ({}, ["model.max_length=129"], "model.max_length: 129 tokens but {} knows 128 positions (lower it)"),
        ({}, ["data.passage_max_length=129"], "data.passage_max_length: 129 tokens but {} knows 128 positions ("),
        ({"model_type": "roberta", "pad_token_id": 1}, ["model.max_length=127"], "127 tokens but {} knows 126 "),
        ({"hidden_size": -5}, ["loss.matryoshka=[8]"], "config.json: hidden_size: must be a whole number from 1 to"),
        ({"hidden_size": "x"}, ["loss.matryoshka=[8]"], 'hidden_size: must be a whole number from 1 to 10^9, got "x"'),
        ("{", [], "config.json: not valid JSON (fetch the folder again"),
        ("[" * 100_000, [], "config.json: not valid JSON (fetch the folder again"),
        ({}, ["evaluate.data={}/beir"], "beir: no such folder (name one with corpus.jsonl"),
        ({}, ["evaluate.data={}/data", "evaluate.split=dev"], "no split 'dev' (known: test)"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_told_before_torch_is_loaded(
    config: dict[str, object] | str, overrides: list[str], message: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(config if isinstance(config, str) else json.dumps({**SHAPE, **config}))
    (tmp_path / "data/qrels").mkdir(parents=True)
    (tmp_path / "data/qrels/test.tsv").write_text("query-id\tcorpus-id\tscore\n")
    values = VALUES | {"model": {"encoder": str(tmp_path), "max_length": 64}}
    overrides = [override.replace("{}", str(tmp_path)) for override in overrides]
    with pytest.raises(LodestarError) as caught:
        check(loader.recipe_of(FinetuneRecipe, values, overrides))
    assert message.replace("{}", str(tmp_path)) in str(caught.value)


def test_what_is_found_after_loading_names_the_line_of_its_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "encoder").mkdir()
    (tmp_path / "encoder/config.json").write_text(json.dumps({**SHAPE, "model_type": "bert"}))
    recipe = tmp_path / "r.yaml"
    text = RECIPE.replace("encoder: bert", f"encoder: {tmp_path}/encoder\n  max_length: 64")
    text = text.replace("runs/x", f"{tmp_path}/run")

    def told(text: str, *overrides: str) -> str:
        recipe.write_text(text)
        assert main(["--config", str(recipe), *overrides]) == 2
        return capsys.readouterr().err

    random = text.replace("model:", "model:\n  random_weights: true").replace("data:", "data:\n  query_max_length: 129")
    assert told(random).startswith(f"error: {recipe}:8: data.query_max_length: 129 tokens but ")
    overridden = told(random, "data.query_max_length=200")
    assert overridden.startswith("error: command line: data.query_max_length: 200 tokens but ")
    absent = f"evaluate.data={tmp_path}/absent"
    assert told(text, absent).startswith(f"error: command line: evaluate.data: {tmp_path}/absent: no such folder (")
    tokenizer = told(text.replace("model:", "model:\n  random_weights: true"))
    assert tokenizer.startswith(f"error: {recipe}:3: model.tokenizer: {tmp_path}/encoder: has no tokenizer files")
    (tmp_path / "data/qrels").mkdir(parents=True)  # a mistake in a line of another file keeps its place
    for name in ("corpus.jsonl", "queries.jsonl"):
        (tmp_path / "data" / name).touch()
    judgements = tmp_path / "data/qrels/test.tsv"
    judgements.write_text("query-id\tcorpus-id\tscore\nq\td\tx\n")
    assert told(text, f"evaluate.data={tmp_path}/data").startswith(f"error: {judgements}:2: score: must be a whole")


def test_a_plan_of_broken_folders_is_a_plan_with_warnings(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**SHAPE, "num_hidden_layers": "many"}))
    (tmp_path / "summary.json").write_text("{")
    values = VALUES | {"model": {"encoder": str(tmp_path), "max_length": 64}, "run": {"output_dir": str(tmp_path)}}
    recipe = loader.recipe_of(FinetuneRecipe, values, [f"evaluate.data={tmp_path}/absent"])
    found = plan(recipe, 100_000, None)
    assert found["state"] == "unfinished" and found["negatives_per_query"] == 2047
    lines = "\n".join(found["missing"])
    assert "num_hidden_layers: must be a whole number" in lines and "absent: no such folder" in lines
