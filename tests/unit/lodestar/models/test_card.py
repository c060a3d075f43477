"""The model card: what it quotes cannot become markup."""

from __future__ import annotations

import html
from pathlib import Path

from contrastive.config import FinetuneRecipe
from lodestar.config import loader
from lodestar.models.save import model_card
from retrieval.export.merge import _model_card
from tests.unit.lodestar.config.test_loader import VALUES


def test_texts_of_the_recipe_and_results_are_escaped_and_can_be_read_back() -> None:
    instruction = "</pre>\n```\n<script>alert(1)</script> & more: "
    data = {"train": ["<img src=x onerror=alert(1)>.jsonl"], "query_instruction": instruction}
    recipe = loader.recipe_of(FinetuneRecipe, VALUES | {"data": data})
    card = model_card("A model", recipe, {"evaluation": "<b>beir</b>", "steps": 3}, "cls")
    assert not any(tag in card for tag in ("<script", "<img", "<b>")) and card.count("</pre>") == 2
    assert html.unescape(card.rpartition("<pre>\n")[2].removesuffix("</pre>\n")) == loader.dump(recipe)


def test_names_of_merged_models_stay_in_their_cell() -> None:
    card = _model_card([Path("<script>a|b`c")], [1.0])
    assert "<script" not in card and card.count("|") == 9
