"""Model folders that are damaged or foreign, hold pickle or code: one line with a remedy, before torch is loaded."""

from __future__ import annotations

import json
import os
import pickle
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, BertConfig, BertModel

from lodestar.config.schema import ModelConfig
from lodestar.errors import LodestarError, ModelError
from lodestar.models.config_checks import is_known_model_type, known_model_types
from lodestar.models.folder_checks import check_model
from lodestar.models.load import load_encoder, load_tokenizer
from lodestar.models.weight_files import check_finite, convert_command, read_headers
from retrieval.embedding.cli import main as encode_main
from retrieval.embedding.embedder import Embedder
from retrieval.embedding.model_folder import check_folder
from retrieval.evaluation.cli import main as evaluate_main
from retrieval.export.cli import export_main, merge_main
from retrieval.mining.cli import main as mine_main
from retrieval.search.cli import index_main, search_main
from tests import processes, tiny

Damage = Callable[[Path], object]
WEIGHTS, WORDS = "model.safetensors", "embeddings.word_embeddings.weight"


@pytest.fixture
def folder(model_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(model_folder, tmp_path / "model")


def text(name: str, content: str | bytes) -> Damage:
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def values(name: str, **new: Any) -> Damage:
    """The file with other values; None takes one out."""

    def spoil(folder: Path) -> None:
        content = {**json.loads((folder / name).read_text()), **new}
        (folder / name).write_text(json.dumps({key: value for key, value in content.items() if value != "absent"}))

    return spoil


def module(**new: str) -> Damage:
    def spoil(folder: Path) -> None:
        modules = json.loads((folder / "modules.json").read_text())
        modules[1] |= new
        (folder / "modules.json").write_text(json.dumps(modules))

    return spoil


def tensors(edit: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    def spoil(folder: Path) -> None:
        content = load_file(folder / WEIGHTS)
        edit(content)
        save_file(content, folder / WEIGHTS, {"format": "pt"})

    return spoil


def element(value: float) -> Damage:
    return tensors(lambda content: content[WORDS][3].fill_(value))


def header(edit: Callable[[dict[str, Any]], object]) -> Damage:
    """The weights with another header, of the length that it says."""

    def spoil(folder: Path) -> None:
        content = (folder / WEIGHTS).read_bytes()
        length = int.from_bytes(content[:8], "little")
        entries = json.loads(content[8 : 8 + length])
        edit(entries)
        new = json.dumps(entries).encode()
        (folder / WEIGHTS).write_bytes(len(new).to_bytes(8, "little") + new + content[8 + length :])

    return spoil


def offsets(start: int, end: int) -> Damage:
    return header(lambda entries: entries[WORDS].update(data_offsets=[start, end]))


def in_weights(edit: Callable[[bytes], bytes]) -> Damage:
    return lambda folder: (folder / WEIGHTS).write_bytes(edit((folder / WEIGHTS).read_bytes()))


def shards(edit: Callable[[dict[str, Any], Path], object], unlink: bool = False) -> Damage:
    """Two files of weights and their index, which is damaged, or left out."""

    def spoil(folder: Path) -> None:
        content = load_file(folder / WEIGHTS)
        (folder / WEIGHTS).unlink()
        names = {i: f"model-{i + 1:05}-of-00002.safetensors" for i in range(2)}
        weight_map = {name: names[i % 2] for i, name in enumerate(sorted(content))}
        for file in names.values():
            part = {name: content[name] for name in content if weight_map[name] == file}
            save_file(part, folder / file, {"format": "pt"})
        index: dict[str, Any] = {"metadata": {}, "weight_map": weight_map}
        edit(index, folder)
        if not unlink:
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return spoil


def instead(name: str, create: Callable[[Path], object]) -> Damage:
    def spoil(folder: Path) -> None:
        (folder / name).unlink()
        create(folder / name)

    return spoil


def word_count(count: int) -> Damage:
    """A tokenizer of another vocabulary."""

    def spoil(folder: Path) -> None:
        tokenizer = json.loads((folder / "tokenizer.json").read_text())
        words = tokenizer["model"]["vocab"]
        for i in range(len(words), count):
            words[f"new{i}"] = i
        if count < len(words):
            tokenizer["model"]["vocab"] = {word: i for word, i in words.items() if i < count}
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))

    return spoil


BERT: Any = {"hidden_size": 32, "num_attention_heads": 4, "vocab_size": 98}
DAMAGES: dict[str, tuple[Damage, str]] = {
    "config broken": (text("config.json", "{"), "config.json: not valid JSON"),
    "config a list": (text("config.json", "[1]"), r"config.json: must be an object, got \[1\]"),
    "config null": (text("config.json", "null"), "config.json: must be an object, got null"),
    "config empty": (text("config.json", ""), "config.json: not valid JSON"),
    "config Latin-1": (text("config.json", b'{"a": "\xe9"}'), "config.json: not valid JSON"),
    "config nested deep": (text("config.json", "[" * 100_000), "config.json: not valid JSON"),
    "config of 5,000 digits": (text("config.json", '{"a": %s}' % ("9" * 5000)), "config.json: not valid JSON"),
    "config absent": (lambda folder: (folder / "config.json").unlink(), "no config.json there"),
    "config a FIFO": (instead("config.json", os.mkfifo), "config.json: is a FIFO, not a file"),
    "config a dangling link": (instead("config.json", lambda p: p.symlink_to("none")), "config.json: is a link to"),
    "config a folder": (instead("config.json", Path.mkdir), "config.json: is a folder, not a file"),
    "size negative": (values("config.json", hidden_size=-32), "hidden_size: must be a whole number from 1"),
    "size zero": (values("config.json", num_attention_heads=0), "num_attention_heads: must be a whole number from 1"),
    "size textual": (values("config.json", num_hidden_layers="2"), 'num_hidden_layers: must be .*, got "2"'),
    "size a fraction": (values("config.json", intermediate_size=64.5), "intermediate_size: must be a whole number"),
    "size huge": (values("config.json", vocab_size=10**12), "vocab_size: must be a whole number from 1 to"),
    "size a list": (values("config.json", max_position_embeddings=[64]), "max_position_embeddings: must be a whole"),
    "size true": (values("config.json", type_vocab_size=True), "type_vocab_size: must be .*, got true"),
    "another width": (values("config.json", hidden_size=64), "hidden_size: is 64, but .* has shape"),
    "another vocabulary": (values("config.json", vocab_size=100_000), "vocab_size: is 100,000, but .* has shape"),
    "more layers": (values("config.json", num_hidden_layers=4000), "is 4,000, but its weights hold 2 layers"),
    "heads do not divide": (values("config.json", num_attention_heads=5), "5 heads do not divide a width of 32"),
    "dropout of 1": (values("config.json", hidden_dropout_prob=1), "hidden_dropout_prob: must be a number from 0 to"),
    "epsilon textual": (values("config.json", layer_norm_eps="small"), "layer_norm_eps: must be a number between"),
    "epsilon NaN": (values("config.json", layer_norm_eps=float("nan")), "layer_norm_eps: must be a number between"),
    "padding outside": (values("config.json", pad_token_id=5000), "pad_token_id: 5000: the vocabulary has 98 tokens"),
    "model_type unknown": (values("config.json", model_type="brt"), r"transformers knows no such model \(did you mean"),
    "model_type absent": (values("config.json", model_type="absent"), "model_type: must be text, as bert, got null"),
    "model_type a list": (values("config.json", model_type=["bert"]), "model_type: must be text, as bert"),
    "activation unknown": (values("config.json", hidden_act="none"), "model: cannot be opened: "),
    "weights cut": (in_weights(lambda content: content[:1000]), f"{WEIGHTS}: is damaged"),
    "weights cut by a byte": (in_weights(lambda content: content[:-1]), f"{WEIGHTS}: is damaged"),
    "weights longer": (in_weights(lambda content: content + b"x"), f"{WEIGHTS}: is damaged"),
    "weights empty": (text(WEIGHTS, b""), f"{WEIGHTS}: is empty"),
    "header length nonsense": (in_weights(lambda content: b"\xff" * 8 + content[8:]), f"{WEIGHTS}: is damaged"),
    "header not JSON": (in_weights(lambda content: content[:8] + b"!" + content[9:]), f"{WEIGHTS}: is damaged"),
    "header a list": (text(WEIGHTS, (4).to_bytes(8, "little") + b"[1] "), f"{WEIGHTS}: is damaged"),
    "header without tensors": (text(WEIGHTS, (4).to_bytes(8, "little") + b"{}  "), f"{WEIGHTS}: holds no tensor"),
    "offsets beyond the end": (offsets(0, 10**15), f"{WEIGHTS}: is damaged"),
    "offsets overlap": (offsets(128, 128 + 98 * 32 * 4), f"{WEIGHTS}: is damaged"),
    "offsets negative": (offsets(-5, 4), f"{WEIGHTS}: is damaged"),
    "dtype unknown": (header(lambda entries: entries[WORDS].update(dtype="X7")), f"{WEIGHTS}: is damaged"),
    "dtype of integers": (header(lambda entries: entries[WORDS].update(dtype="I32")), f"{WORDS}: has dtype I32"),
    "weights of text": (text(WEIGHTS, "version https://git-lfs.github.com/spec/v1\n"), f"{WEIGHTS}: is damaged"),
    "weights a FIFO": (instead(WEIGHTS, os.mkfifo), f"{WEIGHTS}: is a FIFO, not a file"),
    "weights a dangling link": (instead(WEIGHTS, lambda p: p.symlink_to("none")), f"{WEIGHTS}: is a link to nothing"),
    "weights absent": (lambda folder: (folder / WEIGHTS).unlink(), "has no weights"),
    "NaN": (element(float("nan")), f"{WEIGHTS}: {WORDS}: holds NaN"),
    "infinity": (element(float("-inf")), f"{WEIGHTS}: {WORDS}: holds infinite values"),
    "a tensor is missing": (tensors(lambda c: c.pop("encoder.layer.1.output.dense.bias")), "not in its files"),
    "a shard is missing": (shards(lambda _, f: (f / "model-00002-of-00002.safetensors").unlink()), "00002.*: no such"),
    "the index names none": (shards(lambda index, _: index.pop("weight_map")), "index.json: weight_map: must name"),
    "the index names numbers": (shards(lambda index, _: index["weight_map"].update(a=1)), "index.json: weight_map"),
    "the index leads away": (shards(lambda index, _: index["weight_map"].update(a="../x.safetensors")), "json: ../x"),
    "the index names others": (
        shards(lambda index, _: index["weight_map"].update(a="model-00001-of-00002.safetensors")), "json: a: is not in"
    ),
    "no index": (shards(lambda index, folder: None, unlink=True), "is neither model.safetensors nor in an index"),
    "tokenizer broken": (text("tokenizer.json", "{"), "tokenizer.json: not valid JSON"),
    "tokenizer a list": (text("tokenizer.json", "[]"), "tokenizer.json: must be an object"),
    "tokenizer of another shape": (text("tokenizer.json", '{"model": {}}'), "tokenizer.json: is no tokenizer"),
    "tokenizer without a model": (values("tokenizer.json", model=None), "tokenizer.json: is no tokenizer"),
    "tokenizer_config a list": (text("tokenizer_config.json", "[]"), "tokenizer_config.json: must be an object"),
    "tokenizer of more words": (word_count(500), "has 500 tokens, but the encoder embeds 98 of them"),
    "tokenizer of fewer words": (word_count(60), "has 60 tokens, but the encoder embeds 98: another"),
    "modules broken": (text("modules.json", "["), "modules.json: not valid JSON"),
    "modules an object": (text("modules.json", "{}"), "modules.json: must be a list"),
    "modules empty": (text("modules.json", "[]"), "modules.json: names no module"),
    "modules of numbers": (text("modules.json", "[1, 2]"), "modules.json: each module must have a type and a path"),
    "a module elsewhere": (module(path="../plain"), "modules.json: path: ../plain: no such folder"),
    "a module that is not there": (module(path="7_Pooling"), "modules.json: path: 7_Pooling: no such folder"),
    "a module of other code": (module(type="my_module.Mine"), "modules.json: type: my_module.Mine: code that"),
    "an unknown module": (module(type="sentence_transformers.models.None"), "model: cannot be opened: "),
    "pooling broken": (text("1_Pooling/config.json", "{"), "1_Pooling/config.json: not valid JSON"),
    "pooling a list": (text("1_Pooling/config.json", "[]"), "1_Pooling/config.json: must be an object"),
    "pooling unknown": (values("1_Pooling/config.json", pooling_mode="best"), "pooling_mode: must be one of cls,"),
    "pooling a number": (values("1_Pooling/config.json", pooling_mode=1), "pooling_mode: must be one of cls,"),
    "pooling of another width": (values("1_Pooling/config.json", embedding_dimension=7), "is 7, but the encoder's"),
    "prompts a list": (values("config_sentence_transformers.json", prompts=["a"]), "prompts: must be texts by role"),
    "prompts of numbers": (values("config_sentence_transformers.json", prompts={"query": 1}), "prompts: must be texts"),
    "settings broken": (text("config_sentence_transformers.json", "{"), "transformers.json: not valid JSON"),
    "length textual": (values("sentence_bert_config.json", max_seq_length="x"), "max_seq_length: must be a"),
}  # fmt: skip


def one_line(error: LodestarError, folder: Path) -> str:
    message = str(error)
    assert message.startswith(f"model: {folder}") and "\n" not in message and message.endswith(")"), message
    return message


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_folder_is_one_line_that_names_the_file(name: str, folder: Path) -> None:
    spoil, complaint = DAMAGES[name]
    spoil(folder)
    with pytest.raises(ModelError, match=complaint) as caught:
        Embedder(folder, ["cpu"])
    one_line(caught.value, folder)


def test_the_folders_before_the_damage_pass(folder: Path) -> None:
    check_folder(folder, finite=True)
    shards(lambda index, folder: None)(folder)
    check_folder(folder, finite=True)
    assert Embedder(folder, ["cpu"]).width == 32


@pytest.mark.parametrize("create", [Path.touch, os.mkfifo, lambda path: path.symlink_to("none"), lambda path: None])
def test_what_is_no_folder_is_one_line(create: Callable[[Path], object], tmp_path: Path) -> None:
    create(tmp_path / "model")
    with pytest.raises(ModelError, match=r"is a file|is a FIFO|is a link to nothing|no such folder") as caught:
        Embedder(tmp_path / "model", ["cpu"])
    one_line(caught.value, tmp_path / "model")
    with pytest.raises(ModelError, match=r"^model.encoder: .*\)$"):
        check_model(ModelConfig(encoder=str(tmp_path / "model")))


@pytest.mark.parametrize("name", ["", " ", "a\0b", "a/b/c", "~/model", "../model", "./model"])
def test_a_path_is_not_taken_for_a_name_of_the_hub(name: str) -> None:
    with pytest.raises(ModelError, match=r"no such folder") as caught:
        check_folder(name)
    assert str(caught.value).isprintable()


def command_lines(model: Path, tmp_path: Path) -> list[tuple[Callable[[list[str]], int], list[str]]]:
    """Each command that opens a model."""
    texts = str(tiny.pretrain_file(tmp_path / "texts.jsonl"))
    examples = str(tiny.finetune_file(tmp_path / "examples.jsonl"))
    good = {"path": str(tiny.trained(tmp_path / "good", tmp_path / "plain"))}
    recipes: list[tuple[Callable[[list[str]], int], dict[str, Any]]] = [
        (encode_main, {"model": str(model), "texts": [texts], "output": {"dir": str(tmp_path / "out")}}),
        (evaluate_main, {"models": [str(model)], "evaluate": {"data": str(tiny.beir_folder(tmp_path / "beir"))}}),
        (mine_main, {"model": str(model), "data": [examples], "output": str(tmp_path / "mined.jsonl")}),
        (index_main, {"model": str(model), "corpus": texts, "store": {"kind": "faiss", "path": str(tmp_path / "db")}}),
        (export_main, {"model": str(model), "output": str(tmp_path / "onnx")}),
        (merge_main, {"models": [{"path": str(model)}, good], "output": str(tmp_path / "merged")}),
    ]
    lines: list[tuple[Callable[[list[str]], int], list[str]]] = []
    for i, (main, recipe) in enumerate(recipes):
        (tmp_path / f"{i}.yaml").write_text(json.dumps(recipe))
        lines.append((main, ["--config", str(tmp_path / f"{i}.yaml")]))
    return [*lines, (search_main, ["--model", str(model), "--corpus", str(tmp_path / "beir"), "a query"])]


def test_every_command_reads_the_folder_first(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = command_lines(folder, tmp_path)
    values("config.json", num_attention_heads=5)(folder)
    capsys.readouterr()
    keys = ["model", "models", "model", "model", "model", "models"]
    places = [*(f"{tmp_path}/{i}.yaml:1: {key}" for i, key in enumerate(keys)), "command line: --model"]
    for (main, arguments), place in zip(lines, places, strict=True):
        assert main(arguments) == 2, main
        message = capsys.readouterr().err
        expected = f"error: {place}: {folder}/config.json: num_attention_heads: 5 heads do not divide a width of 32 ("
        assert message.startswith(expected) and message.count("\n") == 1, message


def test_a_width_beyond_the_models_is_an_error(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(LodestarError, match=r"width: 33: .*model gives only 32 dimensions"):
        Embedder(folder, ["cpu"], width=33)
    (encode, arguments), _, _, (index, others), *_ = command_lines(folder, tmp_path)
    assert encode([*arguments, "output.width=33"]) == index([*others, "encode.width=33"]) == 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), None])
def test_numbers_that_are_not_finite_are_found_in_each_dtype(
    dtype: torch.dtype, value: float | None, tmp_path: Path
) -> None:
    tensor = torch.full((3, 5), torch.finfo(dtype).max, dtype=dtype)
    tensor[0] = -tensor[0]
    if value is not None:
        tensor[2, 4] = value
    save_file({"odd": torch.zeros(1, dtype=torch.uint8), "a.weight": tensor}, tmp_path / "a.safetensors")
    if value is None:
        check_finite(read_headers(tmp_path / "a.safetensors"))
        return
    with pytest.raises(ModelError, match=r"a.weight: holds " + ("NaN" if np.isnan(value) else "infinite values")):
        check_finite(read_headers(tmp_path / "a.safetensors"))


def test_the_kinds_of_models_are_transformers_own() -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    assert set(tiny.FAMILIES) | {"qwen2", "deberta-v2", "distilbert", "mpnet", "nomic_bert"} <= known_model_types()
    assert len(set(CONFIG_MAPPING_NAMES) - known_model_types()) < 10
    assert all(is_known_model_type(kind) for kind in ("bert", "deberta-v2", "data2vec-text", "qwen2"))
    assert not any(is_known_model_type(kind) for kind in ("brt", "", "*", "**", "/", "../models/bert", "deberta_v2"))


# --- pickle ----------------------------------------------------------------------------------


def as_pickle(folder: Path, content: object = None) -> Path:
    state = load_file(folder / WEIGHTS) if content is None else content
    torch.save(state, folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    return folder


def encoder_of(folder: Path, **options: Any) -> str:
    model = ModelConfig(encoder=str(folder), max_length=32, **options)
    check_model(model)
    load_tokenizer(model)
    return str(load_encoder(model, AutoModel, seed=1))


class Evil:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


def test_pickle_is_refused_with_the_command_that_converts_it(folder: Path) -> None:
    expected = Embedder(folder, ["cpu"]).encode_queries(["a rank"])
    as_pickle(folder)
    for use in (lambda: Embedder(folder, ["cpu"]), lambda: encoder_of(folder)):
        with pytest.raises(
            ModelError, match=r"pytorch_model.bin: is pickle, which can run code \(convert it: "
        ) as caught:
            use()
        assert convert_command(folder) in str(caught.value)
    command = [
        part.replace("python", sys.executable) if i == 0 else part
        for i, part in enumerate(shlex.split(convert_command(folder)))
    ]
    processes.run(command, limit_s=60).check_returncode()
    assert (Embedder(folder, ["cpu"]).encode_queries(["a rank"]) == expected).all()


def test_pickle_opens_as_weights_alone_where_the_recipe_allows_it(folder: Path, tmp_path: Path) -> None:
    as_pickle(folder)
    assert encoder_of(folder, allow_pickle=True).startswith("37 of 37")
    file = tmp_path / "touched"
    for content in ({"a": Evil(file)}, [1], {"a": 1}):
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(content))
        with pytest.raises(
            ModelError, match=r"^model.encoder: .*pytorch_model.bin: is damaged, or holds more than"
        ) as caught:
            encoder_of(folder, allow_pickle=True)
        assert "\n" not in str(caught.value) and not file.exists()


# --- code ------------------------------------------------------------------------------------


def with_code(folder: Path, file: Path) -> Path:
    """An encoder of its own kind, a BERT whose code writes a file when it is imported."""
    (folder / "mine.py").write_text(
        "from pathlib import Path\nfrom transformers import BertConfig, BertModel\n"
        f"Path({str(file)!r}).touch()\n"
        "class MyConfig(BertConfig):\n    model_type = 'mine'\n"
        "class MyModel(BertModel):\n    config_class = MyConfig\n"
    )
    values("config.json", model_type="mine", auto_map={"AutoConfig": "mine.MyConfig", "AutoModel": "mine.MyModel"})(
        folder
    )
    return folder


def test_code_of_a_folder_runs_only_where_the_recipe_allows_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    file = tmp_path / "touched"
    with_code(folder, file)
    for use in (lambda: Embedder(folder, ["cpu"]), lambda: encoder_of(folder)):
        with pytest.raises(
            ModelError, match=r"config.json: auto_map: the folder brings its own code, which is not run \("
        ):
            use()
    values("config.json", model_type="bert")(folder)  # transformers knows that one, but the folder means another
    with pytest.raises(ModelError, match=r"auto_map"):
        encoder_of(folder)
    values("config.json", model_type="mine", auto_map="absent")(folder)
    with pytest.raises(ModelError, match=r"transformers knows no such model"):
        encoder_of(folder)
    module(type="mine.MyModel", path="")(folder)
    with pytest.raises(ModelError, match=r"mine.MyModel: code that sentence-transformers does not bring"):
        Embedder(folder, ["cpu"])
    assert not file.exists()
    with_code(folder, file)
    assert encoder_of(folder, trust_remote_code=True).split(" of ")[0] > "36" and file.exists()


def test_a_tokenizers_code_does_not_run_either(folder: Path, tmp_path: Path) -> None:
    (folder / "mine.py").write_text(f"from pathlib import Path\nPath({str(tmp_path / 'touched')!r}).touch()\n")
    values("tokenizer_config.json", auto_map={"AutoTokenizer": ["mine.Mine", None]}, tokenizer_class="Mine")(folder)
    with pytest.raises(ModelError, match=r"auto_map"):
        Embedder(folder, ["cpu"])
    assert not (tmp_path / "touched").exists()


def test_a_model_of_other_numbers_is_not_taken_for_this_one(tmp_path: Path) -> None:
    """A wider BERT of random weights, whose folder got another's config.json."""
    wide = tiny.encoder(tmp_path / "wide", width=64)
    shutil.copy(tiny.encoder(tmp_path / "narrow") / "config.json", wide)
    with pytest.raises(ModelError, match=r"hidden_size: is 32, but .* has shape"):
        check_model(ModelConfig(encoder=str(wide), max_length=32))
    BertModel(BertConfig(**BERT, num_hidden_layers=1, intermediate_size=64)).save_pretrained(tmp_path / "bare")
    with pytest.raises(ModelError, match=r"^model.tokenizer: .*has no tokenizer files"):
        check_model(ModelConfig(encoder=str(tmp_path / "bare")))
