"""Recipes: strict, typed as a reader expects, and every error with its place."""

from __future__ import annotations

from pathlib import Path

import pytest

from contrastive.config import FinetuneRecipe
from lodestar.config import loader
from lodestar.config.schema import BatchConfig, BatchPlan, ScheduleConfig
from lodestar.errors import ConfigError
from retrieval.export.config import MergeRecipe
from retromae.config import PretrainRecipe

RECIPE = """run:
  output_dir: runs/x
model:
  encoder: bert
data:
  train: [a.jsonl]
batch:
  global_size: 1_024
optim:
  lr: 1e-5
schedule:
  steps: 10
"""


def load(tmp_path: Path, text: str = RECIPE, *overrides: str) -> FinetuneRecipe:
    path = tmp_path / "finetune.yaml"
    path.write_text(text, encoding="utf-8")
    return loader.load(FinetuneRecipe, path, overrides)


def test_numbers_are_read_as_every_user_expects(tmp_path: Path) -> None:
    recipe = load(tmp_path)
    assert recipe.optim.lr == 1e-5 and recipe.batch.global_size == 1024
    assert load(tmp_path, RECIPE, "run.name=on", "optim.lr=.5").run.name == "on"


@pytest.mark.parametrize("text", ["Represent this: ", "为这个句子生成表示：", " a # b", "- x", "*", "a: {b"])
def test_an_override_may_be_any_text(text: str, tmp_path: Path) -> None:
    assert load(tmp_path, RECIPE, f"data.query_instruction={text}").data.query_instruction == text
    assert load(tmp_path, RECIPE, f"data.query_instruction='{text}'").data.query_instruction == text


def test_what_is_dumped_is_loaded_back_equal(tmp_path: Path) -> None:
    recipe = load(tmp_path, RECIPE, "data.query_instruction=为这个句子: ", "evaluate.data=x", "loss.matryoshka=[64]")
    assert load(tmp_path, loader.dump(recipe)) == recipe


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("lr: 1e-5", "lr: 1e-5\n  lr: 2e-5"), "finetune.yaml:11: optim.lr: already set on line 10 (keep one"),
        (("lr: 1e-5", "lr: -1"), "finetune.yaml:10: optim.lr: must be greater than 0, got -1 (raise it)"),
        (("lr: 1e-5", "lr: fast"), "finetune.yaml:10: optim.lr: must be a number, got \"fast\""),
        (("lr: 1e-5", "lr: 1\n  learning: 1"), "finetune.yaml:11: optim.learning: unknown key (known here: name, lr,"),
        (("lr: 1e-5", "lr: 1e-5\nlos:\n  temperature: 1"), "finetune.yaml:11: los: unknown key (did you mean 'loss'?)"),
        (("  encoder: bert", "  encodr: bert"), "finetune.yaml:4: model.encodr: unknown key (did you mean 'encoder'?)"),
        (("  encoder: bert", "  max_length: 16"), "finetune.yaml:3: model.encoder: not set (it has no default"),
        (("steps: 10", "steps: 10\n  epochs: 1"), "finetune.yaml:11: schedule: needs exactly one of epochs and steps"),
        (("lr: 1e-5", "lr: 1e-5\n  name: muon"), "finetune.yaml:9: optim.clip_norm: muon does not clip"),
        (("run:", "run: ["), "finetune.yaml:3: recipe: not valid YAML"),
        ((RECIPE, "- 1"), "finetune.yaml:1: recipe: must be a mapping of sections, got a list ("),
    ],
)  # fmt: skip
def test_an_error_has_file_line_field_and_remedy(change: tuple[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, RECIPE.replace(*change))
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lr=-1", "command line: optim.lr: must be greater than 0, got -1 (raise it)"),
        ("optim.lrr=1", "command line: optim.lrr: unknown key (did you mean 'lr'?)"),
        ("optim", "command line: optim: not an override (write KEY=VALUE, as optim.lr=1e-5)"),
        ("optim.lr.x=1", "command line: optim.lr.x: lr is not a section (write optim.lr=VALUE)"),
    ],
)
def test_an_error_in_an_override_names_the_command_line(override: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, RECIPE, override)
    assert str(caught.value) == message


def test_all_errors_are_reported_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, RECIPE, "optim.lr=-1", "batch.global_size=0")
    assert len(str(caught.value).splitlines()) == 2


def test_a_recipe_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere.yaml:1: recipe: no such file \(name a YAML file"):
        loader.load(PretrainRecipe, tmp_path / "nowhere.yaml")


VALUES = {
    "run": {"output_dir": Path("runs/x")},
    "model": {"encoder": "bert"},
    "data": {"train": ("a.jsonl",)},
    "batch": BatchConfig(global_size=1024),
    "optim": {"lr": 1e-5},
    "schedule": {"steps": 10},
}
"""As RECIPE, with what Python has and YAML does not: paths, tuples, sections."""


def test_a_recipe_is_taken_as_values_as_an_object_or_as_a_file(tmp_path: Path) -> None:
    expected, changed = load(tmp_path), load(tmp_path, RECIPE, "optim.lr=2e-5")
    for source in (VALUES, expected, str(tmp_path / "finetune.yaml"), tmp_path / "finetune.yaml"):
        assert loader.recipe_of(FinetuneRecipe, source) == expected
        assert loader.recipe_of(FinetuneRecipe, source, ["optim.lr=2e-5"]) == changed
    assert VALUES["optim"] == {"lr": 1e-5} and expected.optim.lr == 1e-5


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"optim": {"lr": -1}}, "recipe: optim.lr: must be greater than 0, got -1 (raise it)"),
        ({"optim": {"lr": 1, "lrr": 1}}, "recipe: optim.lrr: unknown key (did you mean 'lr'?)"),
        ({"optm": {}}, "recipe: optm: unknown key (did you mean 'optim'?)"),
        ({"run": {}}, "recipe: run.output_dir: not set (it has no default: add it)"),
        ({"optim": {"lr": 1, "betas": [0.9, 2]}}, "recipe: optim.betas.1: must be less than 1, got 2 (lower it)"),
        ({"schedule": {}}, "recipe: schedule: needs exactly one of epochs and steps (set one of the two)"),
        ({"batch": 3}, "recipe: batch: must be a section, got 3 (write its keys below it, indented)"),
    ],
)
def test_a_mistake_in_values_is_told_with_its_field(change: dict[str, object], complaint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        loader.recipe_of(FinetuneRecipe, VALUES | change)
    assert str(caught.value) == complaint
    with pytest.raises(ConfigError, match=r"command line: optim.lrr: unknown key"):
        loader.recipe_of(FinetuneRecipe, VALUES, ["optim.lrr=1"])


def test_a_mistake_of_the_recipe_as_a_whole_is_told_without_a_field() -> None:
    with pytest.raises(ConfigError) as caught:
        loader.recipe_of(MergeRecipe, {"models": [{"path": "a"}], "output": "b"})
    assert str(caught.value) == "recipe: models: a merge takes two or more (add one)"


@pytest.mark.parametrize(("rows", "size"), [(32_768, 48), (720, 24), (19, 4), (3, 5), (1, 1)])
def test_the_ranks_parts_make_exactly_the_global_batch(rows: int, size: int) -> None:
    plan = BatchPlan(rows, size, micro_size=4)
    examples = [example for rank in range(size) for example in plan.examples(rank)]
    assert examples == list(range(rows)) and max(plan.examples_per_rank) - min(plan.examples_per_rank) <= 1
    assert plan.num_micro_batches() == -(-max(plan.examples_per_rank) // 4)


def test_a_schedule_by_epochs_counts_whole_batches() -> None:
    assert ScheduleConfig(epochs=2.0).total_steps(rows=100, global_size=30) == 6
    assert ScheduleConfig(steps=7).total_steps(rows=1, global_size=30) == 7
    assert ScheduleConfig(steps=7, warmup_ratio=0.3).warmup_steps(7) == 2
