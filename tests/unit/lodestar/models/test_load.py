"""Every tensor of an encoder comes from the file, or it is an error, and its tokenizer fits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer, GPT2Config, GPT2Model

from lodestar.config.schema import ModelConfig
from lodestar.errors import ModelError
from lodestar.models.load import load_encoder, load_tokenizer
from retromae.backbone import parts_of
from tests import tiny


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny.encoder(tmp_path / "bert", "bert")


def load(folder: Path, auto_class: object = AutoModelForMaskedLM, **options: object) -> str:
    model = ModelConfig(encoder=str(folder), max_length=32, **options)  # type: ignore[arg-type]
    return str(load_encoder(model, auto_class, seed=1, random_head=model.random_head))


def change(folder: Path, name: str, new: str | None, tensor: torch.Tensor | None = None) -> None:
    """Rename a tensor of the file, drop it, or put another in its place."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    old = tensors.pop(name)
    if new is not None:
        tensors[new] = old if tensor is None else tensor
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForMaskedLM])
def test_all_tensors_are_counted_by_value(family: str, auto_class: type, tmp_path: Path) -> None:
    report = load(tiny.encoder(tmp_path / family, family), auto_class)
    from_file, of, total = report.split()[:3]
    assert of == "of" and from_file == total


def test_a_file_with_or_without_the_base_models_prefix_is_loaded(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    save_file({n.removeprefix("bert."): t for n, t in tensors.items() if n.startswith("bert.")}, path)
    assert load(folder, AutoModel).startswith("37 of 37")


NAME = "bert.encoder.layer.1.attention.self.query.weight"


@pytest.mark.parametrize(
    ("new", "tensor", "message"),
    [
        (None, None, "41 of 42 tensors: .* is missing"),
        ("bert.encoder.layer.1.attention.self.q.weight", None, "41 of 42 tensors: .* is missing"),
        (NAME, torch.zeros(32, 16), r"41 of 42 tensors: .* has shape \[32, 16\], not \[32, 32\]"),
    ],
)
def test_a_missing_renamed_or_reshaped_tensor_is_an_error(
    new: str | None, tensor: torch.Tensor | None, message: str, folder: Path
) -> None:
    change(folder, NAME, new, tensor)
    with pytest.raises(ModelError, match=message):
        load(folder)


def test_every_key_under_a_foreign_prefix_is_an_error(folder: Path) -> None:
    path = folder / "model.safetensors"
    save_file({f"model.{name}": tensor for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="0 of 42 tensors"):
        load(folder)


def test_a_head_may_be_random_only_if_the_recipe_says_so(folder: Path) -> None:
    change(folder, "cls.predictions.transform.dense.weight", None)
    with pytest.raises(ModelError, match=r"random_head: true"):
        load(folder)
    assert load(folder, random_head=True).startswith("41 of 42")
    change(folder, NAME, None)
    with pytest.raises(ModelError, match="saved to"):
        load(folder, random_head=True)


def test_random_weights_are_reported_and_depend_on_the_seed_alone(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model\.random_weights: true"):
        load(folder)
    assert load(folder, random_weights=True).startswith("0 of 42")
    model = ModelConfig(encoder=str(folder), max_length=32, random_weights=True)
    first, again, other = (load_encoder(model, AutoModel, seed=seed).model for seed in (1, 1, 2))
    pairs = list(zip(first.parameters(), again.parameters(), other.parameters(), strict=True))
    assert all(a.equal(b) for a, b, _ in pairs) and any(not a.equal(c) for a, _, c in pairs)


def test_what_cannot_be_opened_is_one_line(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nowhere: no such folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(ModelError, match="neither a folder nor a model"):
        load(Path("nobody/nothing"))
    with pytest.raises(ModelError, match=r"max_length: 65 tokens but .* knows 64 positions"):
        load_encoder(ModelConfig(encoder=str(folder), max_length=65), AutoModel, seed=1)
    (folder / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ModelError, match=r"model.encoder: .*model\.safetensors: is damaged") as caught:
        load(folder)
    assert "\n" not in str(caught.value)
    with pytest.raises(ModelError, match=r"model\.tokenizer"):
        load_tokenizer(ModelConfig(encoder=str(folder), tokenizer=str(tmp_path)))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_parts_together_are_the_model(family: str, tmp_path: Path) -> None:
    """Head and vocabulary on the base model's output give the model's own logits."""
    model = AutoModelForMaskedLM.from_pretrained(tiny.encoder(tmp_path / family, family)).eval()
    parts = parts_of(model)
    ids = torch.randint(5, model.config.vocab_size, (2, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        hidden = parts.base(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
        logits = parts.vocabulary(parts.head(hidden))
        torch.testing.assert_close(logits, model(ids).logits)
    assert (parts.positions is None) == (family == "modernbert")


# --- the tokenizer fits, [CLS] attends to the text ------------------------------------------


def tokenizer_of(folder: Path, **options: object) -> object:
    return load_tokenizer(ModelConfig(encoder=str(folder), max_length=32, **options))  # type: ignore[arg-type]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_encoders_own_tokenizer_fits(family: str, tmp_path: Path) -> None:
    own = tiny.encoder(tmp_path / family, family)
    assert tokenizer_of(own).padding_side == "right"  # type: ignore[attr-defined]
    tiny.tokenizer(family).save_pretrained(tmp_path / "tokenizer")
    tokenizer_of(own, tokenizer=str(tmp_path / "tokenizer"))


def test_a_folder_without_tokenizer_files_is_an_error(folder: Path) -> None:
    for path in folder.glob("*token*"):
        path.unlink()
    with pytest.raises(ModelError, match=r"model\.tokenizer: .*no tokenizer files"):
        tokenizer_of(folder)


def test_a_tokenizer_with_special_tokens_only_is_an_error(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    with pytest.raises(ModelError, match="no token but special ones"):
        tokenizer_of(folder)


def test_a_tokenizer_of_another_family_or_vocabulary_is_an_error(folder: Path, tmp_path: Path) -> None:
    other = tiny.encoder(tmp_path / "modernbert", "modernbert")
    with pytest.raises(ModelError, match=r"has 330 tokens, but the encoder embeds \d+ of them"):  # was an IndexError
        tokenizer_of(folder, tokenizer=str(other))
    with pytest.raises(ModelError, match="another vocabulary"):
        tokenizer_of(other, tokenizer=str(folder))
    shuffled = tmp_path / "shuffled"
    shutil.copytree(folder, shuffled)
    file = shuffled / "tokenizer.json"
    values = json.loads(file.read_text())
    vocabulary = values["model"]["vocab"]
    vocabulary["shuffle"], vocabulary["tensor"] = vocabulary["tensor"], vocabulary["shuffle"]
    file.write_text(json.dumps(values))
    with pytest.raises(ModelError, match="other numbers"):
        tokenizer_of(folder, tokenizer=str(shuffled))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "pad_token_id": 0}))
    with pytest.raises(ModelError, match=r"pads with token 1, but .* with 0: of another family"):
        tokenizer_of(folder)


def test_a_tokenizer_that_puts_no_cls_before_a_text_is_an_error(folder: Path) -> None:
    file = folder / "tokenizer.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "post_processor": None}))
    with pytest.raises(ModelError, match=r"puts no \[CLS\] before a text"):
        tokenizer_of(folder)


@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForMaskedLM])
def test_a_causal_decoder_is_an_error(auto_class: type, folder: Path, tmp_path: Path) -> None:
    """By its kind, and by its configuration."""
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 40, "n_positions": 64}
    GPT2Model(GPT2Config(**sizes)).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ModelError, match=r"causal decoder|cannot be opened by AutoModelForMaskedLM"):
        load(tmp_path / "gpt2", auto_class)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "is_decoder": True}))
    with pytest.raises(ModelError, match="is a causal decoder"):
        load(folder, auto_class)


def test_a_tokenizer_for_last_token_pooling_ends_each_text_once(tmp_path: Path) -> None:
    """Whatever it adds by itself, after truncation too, and so does the saved one."""
    folder = tiny.decoder(tmp_path / "decoder")
    file = folder / "tokenizer.json"
    values = json.loads(file.read_text())
    first, end, letter = (values["model"]["vocab"][token] for token in ("[CLS]", "[SEP]", "a"))
    pieces = {token: {"id": token, "ids": [i], "tokens": [token]} for token, i in (("[CLS]", first), ("[SEP]", end))}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    before, behind = ({"SpecialToken": {"id": token, "type_id": 0}} for token in pieces)

    def template(*single: object) -> dict[str, object]:
        return {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": pieces}

    for post_processor, ids in (
        (values["post_processor"], [letter, end]),
        (None, [letter, end]),
        (template(before, text), [first, letter, end]),
        (template(before, text, behind), [first, letter, end]),
        (template(text, behind), [letter, end]),
    ):
        file.write_text(json.dumps({**values, "post_processor": post_processor}))
        loaded: Any = load_tokenizer(ModelConfig(encoder=str(folder), max_length=32), "last_token")
        loaded.save_pretrained(tmp_path / "saved")
        for tokenizer in (loaded, AutoTokenizer.from_pretrained(tmp_path / "saved")):
            assert tokenizer("a")["input_ids"] == ids and tokenizer.pad_token is not None
            truncated = tokenizer("a a a a a a a a", truncation=True, max_length=6)["input_ids"]
            assert len(truncated) == 6 and truncated[-1] == end != truncated[-2]


def test_a_tokenizer_that_cannot_end_a_text_is_an_error(tmp_path: Path) -> None:
    folder = tiny.decoder(tmp_path / "decoder")
    file = folder / "tokenizer_config.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps({**values, "eos_token": None, "tokenizer_class": "PreTrainedTokenizerFast"}))
    with pytest.raises(ModelError, match="cannot end texts with an eos_token"):
        load_tokenizer(ModelConfig(encoder=str(folder), max_length=32), "last_token")


def test_a_causal_decoder_opens_for_last_token_pooling_alone(tmp_path: Path) -> None:
    """A decoder that its configuration makes bidirectional opens for every pooling."""
    causal, both = tiny.decoder(tmp_path / "causal"), tiny.decoder(tmp_path / "both", is_causal=False)
    for folder, pooling in ((causal, "last_token"), (both, "last_token"), (both, "mean")):
        model = ModelConfig(encoder=str(folder), max_length=32)
        assert str(load_encoder(model, AutoModel, seed=1, pooling=pooling)).startswith("26 of 26")  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="is a causal decoder"):
        load(causal, AutoModel)


def test_the_models_of_other_families_are_not_imported(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There are hundreds, and transformers' mappings import all of them where their keys are listed."""

    def keys(self: object) -> None:
        raise AssertionError("imports all models")

    monkeypatch.setattr(type(AutoModel._model_mapping), "keys", keys)
    assert load(folder, AutoModel).startswith("37 of 37")
