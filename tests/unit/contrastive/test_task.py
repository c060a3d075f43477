"""From a recipe to a task: whose instructions precede the texts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import tiny
from tests.distributed import steps


def queries(folder: Path, *overrides: str) -> set[str]:
    """The first words of all queries of a step."""
    task, _ = steps.built_task(steps.recipe("finetune", folder, "batch.micro_size=19", *overrides), 0, 1)
    batch = next(task.batches(0))
    texts = [ids_L.tolist() for i in range(batch.num_micro_batches) for ids_L in batch.inputs(i)[0]]
    tokenizer = tiny.tokenizer("bert")
    of_queries = [texts[place] for place in batch.tensors["query_place_G"].tolist()]
    return {tokenizer.decode(ids, skip_special_tokens=True).split()[0] for ids in of_queries}


def test_the_encoders_own_prompt_precedes_queries_unless_the_recipe_has_another(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps.recipe("finetune", tmp_path)  # makes the encoder
    assert len(queries(tmp_path)) > 1 and "instruction" not in capsys.readouterr().err
    (tmp_path / "bert/config_sentence_transformers.json").write_text(json.dumps({"prompts": {"query": "search "}}))
    assert queries(tmp_path) == {"search"}
    assert "data.query_instruction: 'search '" in capsys.readouterr().err
    assert queries(tmp_path, "data.query_instruction=graph ") == {"graph"}
    assert len(queries(tmp_path, "data.query_instruction=''")) > 1
