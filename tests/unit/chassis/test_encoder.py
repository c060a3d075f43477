"""Every tensor of an encoder comes from the file, or it is an error."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForMaskedLM

from chassis.encoder import load_encoder, load_tokenizer, parts_of
from chassis.errors import ModelError
from chassis.schema import Model
from tests import tiny


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny.encoder(tmp_path / "bert", "bert")


def load(folder: Path, auto_class: object = AutoModelForMaskedLM, **more: object) -> str:
    model = Model(encoder=str(folder), max_length=32, **more)  # type: ignore[arg-type]
    return str(load_encoder(model, auto_class, seed=1, random_head=model.random_head))


def change(folder: Path, name: str, new: str | None, tensor: torch.Tensor | None = None) -> None:
    """Rename a tensor of the file, drop it, or put another in its place."""
    path = folder / "model.safetensors"
    held = load_file(path)
    old = held.pop(name)
    if new is not None:
        held[new] = old if tensor is None else tensor
    save_file(held, path, metadata={"format": "pt"})


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForMaskedLM])
def test_all_tensors_are_counted_by_value(family: str, auto_class: type, tmp_path: Path) -> None:
    said = load(tiny.encoder(tmp_path / family, family), auto_class)
    from_file, of, total = said.split()[:3]
    assert of == "of" and from_file == total


def test_a_file_with_or_without_the_base_models_prefix_serves(folder: Path) -> None:
    path = folder / "model.safetensors"
    held = load_file(path)
    save_file({n.removeprefix("bert."): t for n, t in held.items() if n.startswith("bert.")}, path)
    assert load(folder, AutoModel).startswith("37 of 37")


NAME = "bert.encoder.layer.1.attention.self.query.weight"


@pytest.mark.parametrize(
    ("new", "tensor", "said"),
    [
        (None, None, "41 of 42 tensors: .* is missing"),
        ("bert.encoder.layer.1.attention.self.q.weight", None, "41 of 42 tensors: .* is missing"),
        (NAME, torch.zeros(32, 16), r"41 of 42 tensors: .* has shape \[32, 16\], not \[32, 32\]"),
    ],
)
def test_a_missing_renamed_or_reshaped_tensor_is_an_error(
    new: str | None, tensor: torch.Tensor | None, said: str, folder: Path
) -> None:
    change(folder, NAME, new, tensor)
    with pytest.raises(ModelError, match=said):
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


def test_random_weights_are_said_to_be_random_and_depend_on_the_seed_alone(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model\.random_weights: true"):
        load(folder)
    assert load(folder, random_weights=True).startswith("0 of 42")
    model = Model(encoder=str(folder), max_length=32, random_weights=True)
    first, again, other = (load_encoder(model, AutoModel, seed=seed).model for seed in (1, 1, 2))
    pairs = list(zip(first.parameters(), again.parameters(), other.parameters(), strict=True))
    assert all(a.equal(b) for a, b, _ in pairs) and any(not a.equal(c) for a, _, c in pairs)


def test_what_cannot_be_opened_is_one_line(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="neither a folder nor a model"):
        load(tmp_path / "nowhere")
    with pytest.raises(ModelError, match=r"max_length: 65 tokens but .* knows 64 positions"):
        load_encoder(Model(encoder=str(folder), max_length=65), AutoModel, seed=1)
    (folder / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ModelError, match="cannot be opened") as caught:
        load(folder)
    assert "\n" not in str(caught.value)
    with pytest.raises(ModelError, match=r"model\.tokenizer"):
        load_tokenizer(Model(encoder=str(folder), tokenizer=str(tmp_path)))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_parts_put_together_are_the_model(family: str, tmp_path: Path) -> None:
    """Head and vocabulary on the base model's output give the model's own logits."""
    model = AutoModelForMaskedLM.from_pretrained(tiny.encoder(tmp_path / family, family)).eval()
    parts = parts_of(model)
    ids = torch.randint(5, model.config.vocab_size, (2, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        hidden = parts.base(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
        logits = parts.vocabulary(parts.head(hidden))
        torch.testing.assert_close(logits, model(ids).logits)
    assert (parts.positions is None) == (family == "modernbert")
