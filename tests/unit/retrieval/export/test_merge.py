"""The weighted mean of models: its arithmetic, what stays the first's, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from torch import Tensor
from transformers import AutoModel

from lodestar.config.loader import load
from lodestar.errors import ConfigError, ModelError
from retrieval.embedding.embedder import Embedder
from retrieval.export.cli import merge_main
from retrieval.export.config import MergeRecipe
from retrieval.export.merge import merge
from tests import tiny

WEIGHTS = "model.safetensors"
WORD, POSITIONS, POOLER = "embeddings.word_embeddings.weight", "embeddings.position_ids", "pooler.dense.weight"
TEXTS = tiny.texts(12, seed=5)


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("originals")
    plain = tiny.trained(root / "model", root / "plain")
    folders = [shutil.copytree(plain, root / name) for name in "abc"]
    for i, folder in enumerate(folders):
        torch.manual_seed(i)
        tensors = load_file(folder / WEIGHTS)
        tensors = {name: tensor + 0.1 * torch.randn_like(tensor) for name, tensor in tensors.items()}
        tensors[POSITIONS] = torch.arange(64)[None] + i  # older folders hold integers that count positions
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return folders


@pytest.fixture
def models(originals: Sequence[Path], tmp_path: Path) -> list[Path]:
    """Three of one architecture, which a test may spoil."""
    return [shutil.copytree(folder, tmp_path / folder.name) for folder in originals]


def change(folder: Path, edit: Callable[[dict[str, Tensor]], object], file: str = WEIGHTS) -> None:
    tensors = load_file(folder / file)
    edit(tensors)
    save_file(tensors, folder / file, metadata={"format": "pt"})


def test_all_the_weight_on_one_model_gives_its_embeddings_exactly(models: list[Path], tmp_path: Path) -> None:
    for i, weights in enumerate([(3.0, 0.0), (0.0, 3.0)]):
        merge(models[:2], weights, tmp_path / f"merged{i}")
        merged = Embedder(tmp_path / f"merged{i}").encode_queries(TEXTS)
        expected = [Embedder(folder).encode_queries(TEXTS) for folder in models[:2]]
        np.testing.assert_array_equal(merged, expected[i])
        assert not np.allclose(merged, expected[1 - i], atol=1e-3)


def test_tensors_are_the_weighted_mean_but_integers_and_the_pooler_are_the_firsts(
    models: list[Path], tmp_path: Path
) -> None:
    merge(models, [2, 1, 1], tmp_path / "merged")
    a, b, c = (load_file(folder / WEIGHTS) for folder in models)
    merged = load_file(tmp_path / "merged" / WEIGHTS)
    assert merged.keys() == a.keys()
    for name, tensor in merged.items():
        own = name in (POSITIONS, "pooler.dense.bias", POOLER)
        by_hand = a[name] if own else 0.5 * a[name] + 0.25 * b[name] + 0.25 * c[name]
        torch.testing.assert_close(tensor, by_hand, rtol=1e-6, atol=1e-7)
        assert own or not torch.allclose(tensor, (a[name] + b[name] + c[name]) / 3, atol=1e-3)


def test_it_opens_with_pooling_prompts_and_a_card_that_says_what_was_merged(models: list[Path], tmp_path: Path) -> None:
    merge(models[:2], [1, 1], tmp_path / "merged")
    merge(models[:2], [1, 3], tmp_path / "prompted", prompts={"query": "ask "})
    opened, prompted = (SentenceTransformer(str(tmp_path / name), device="cpu") for name in ("merged", "prompted"))
    assert [type(module).__name__ for module in opened] == ["Transformer", "Pooling", "Normalize"]
    assert opened[1].pooling_mode == "cls" and opened.max_seq_length == 32
    assert opened.prompts == {"query": "search ", "document": ""} and prompted.prompts["query"] == "ask "
    assert AutoModel.from_pretrained(tmp_path / "merged").config.hidden_size == 32
    card = (tmp_path / "prompted/README.md").read_text()
    assert f"| {models[0]} | 0.25 |\n| {models[1]} | 0.75 |" in card


def test_shards_and_half_precision_are_those_of_the_first(models: list[Path], tmp_path: Path) -> None:
    tensors = {
        name: tensor.half() if tensor.is_floating_point() else tensor
        for name, tensor in read_weights(models[0]).items()
    }
    names = sorted(tensors)
    for i, part in enumerate((names[::2], names[1::2])):
        save_file({n: tensors[n] for n in part}, models[0] / f"model-{i + 1:05}-of-00002.safetensors", {"format": "pt"})
    where = {name: f"model-{i % 2 + 1:05}-of-00002.safetensors" for i, name in enumerate(names)}
    (models[0] / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (models[0] / WEIGHTS).unlink()
    merge(models[:2], [1, 1], tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / where[WORD])[WORD]
    mean = (tensors[WORD].double() + read_weights(models[1])[WORD].double()) / 2
    assert torch.equal(merged, mean.half()) and not (tmp_path / "merged" / WEIGHTS).exists()
    assert torch.equal(AutoModel.from_pretrained(tmp_path / "merged").get_input_embeddings().weight, merged.float())


def read_weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / WEIGHTS)


def drop(name: str) -> Callable[[Path], None]:
    return lambda folder: change(folder, lambda tensors: tensors.pop(name))


def put(name: str, value: Callable[[Tensor], Tensor]) -> Callable[[Path], None]:
    return lambda folder: change(folder, lambda tensors: tensors.update({name: value(tensors[name])}))


def config(file: str, **values: object) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        path = folder / file
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return spoil


def other_word(folder: Path) -> None:
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["zebra"] = vocabulary.pop("z")
    path.write_text(json.dumps(tokenizer))


def other_ends(folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "post_processor": None}))


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (put(WORD, lambda tensor: tensor[:-1].clone()), rf"b: {WORD}: is F32 \[97, 32\], but F32 \[98, 32\] in "),
        (put(WORD, lambda tensor: tensor.to(torch.int8)), rf"b/{WEIGHTS}: {WORD}: has dtype I8"),
        (drop(WORD), rf"b: {WORD}: is missing, but in .*/a "),
        (lambda folder: drop(WORD)(folder.parent / "a"), rf"a: {WORD}: is missing, but in .*/b "),
        (other_word, "b: vocabulary: 'z': is None, but "),
        (config("config.json", num_attention_heads=8), "b: num_attention_heads: is 8, but 4 in "),
        (config("1_Pooling/config.json", pooling_mode="mean"), r"b: pooling: is \['mean'\], but \['cls'\] in "),
        (config("1_Pooling/config.json", pooling_mode="lasttoken"), r"b: pooling: is \['lasttoken'\], but "),
        (other_ends, r"b: token ids of 'a': is "),
        (put(WORD, lambda tensor: tensor.index_fill(0, torch.tensor(3), torch.nan)), f"b/{WEIGHTS}: {WORD}: holds NaN"),
        (lambda folder: (folder / "modules.json").unlink(), "b: no modules.json there"),
        (
            lambda folder: (folder / WEIGHTS).write_bytes(b"x" * 100),
            f"b/{WEIGHTS}: is damaged: its header does not fit its 100 bytes",
        ),
        (lambda folder: (folder / WEIGHTS).unlink(), r"b: has no weights: holds no \*.safetensors"),
        (lambda folder: (folder / "config.json").write_text("{"), "b/config.json: not valid JSON"),
    ],
)
def test_what_differs_is_named_and_nothing_is_written(
    spoil: Callable[[Path], None], complaint: str, models: list[Path], tmp_path: Path
) -> None:
    spoil(models[1])
    with pytest.raises(ModelError, match=complaint) as raised:
        merge(models[:2], [1, 1], tmp_path / "merged")
    assert "\n" not in str(raised.value) and not (tmp_path / "merged").exists()


def test_what_changes_no_embedding_may_differ(models: list[Path], tmp_path: Path) -> None:
    config("config.json", architectures=["BertForMaskedLM"], hidden_dropout_prob=0.3, use_cache=False)(models[1])
    legacy = {"word_embedding_dimension": 32, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    (models[1] / "1_Pooling/config.json").write_text(json.dumps(legacy))
    drop(POSITIONS)(models[1])
    drop(POOLER)(models[1])
    merge(models[:2], [1, 1], tmp_path / "merged")
    assert torch.equal(read_weights(tmp_path / "merged")[POOLER], read_weights(models[0])[POOLER])


def test_the_command_plans_without_writing_then_merges_once(
    models: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "merged"
    recipe = tmp_path / "merge.yaml"
    recipe.write_text(f"models:\n- {{path: {models[0]}}}\n- {{path: {models[1]}, weight: 3}}\noutput: {output}\n")
    assert merge_main(["--config", str(recipe), "--plan", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["models"] == f"0.25 x {models[0]} + 0.75 x {models[1]}" and not output.exists()
    assert planned["averaged_tensors"] + 3 == planned["averaged_tensors"] + planned["copied_tensors"]
    assert merge_main(["--config", str(recipe)]) == 0
    assert (output / WEIGHTS).is_file()
    for overrides, complaint in (
        ([], "already exists"),
        (["models=[{path: a}]"], "models: a merge takes two or more"),
        (["models=[{path: a, weight: 0}, {path: b, weight: 0}]"], "every weight is 0"),
        (["models=[{path: a, weight: -1}, {path: b}]"], "models.0.weight: must be at least 0, got -1 (raise it)"),
        (["models=[{path: a}, {path: b}]", "output=new"], "a: no such folder"),
    ):
        assert merge_main(["--config", str(recipe), *overrides]) == 2
        message = capsys.readouterr().err
        assert message.startswith("error: ") and complaint in message and message.count("\n") == 1


def test_the_recipe_of_the_repository_loads() -> None:
    recipe = load(MergeRecipe, Path(__file__).parents[4] / "configs/merge/two.yaml")
    assert [model.weight for model in recipe.models] == [0.5, 0.5] and recipe.prompts is None


def test_an_existing_output_is_not_replaced(models: list[Path]) -> None:
    with pytest.raises(ConfigError, match="already exists"):
        merge(models[:2], [1, 1], models[2])
