"""The last layer computed for [CLS] only: the same vectors and gradients, of less work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModel, BertConfig, BertModel, RobertaConfig, RobertaModel

from lodestar.data.padding import TextShape
from lodestar.distributed.runtime import Placement, joined
from lodestar.models import last_layer
from lodestar.models.compile import layers_of
from lodestar.models.cpu_dropout import use_cpu_dropout
from lodestar.models.hidden_states import hidden_states
from lodestar.models.last_layer import FAMILIES, compute_cls_only
from lodestar.models.packed import enable_packed
from tests import tiny
from tests.distributed import steps

LENGTHS_B = torch.tensor([9, 3, 1, 7])


def encoder(family: str, folder: Path, dropout: float = 0.0) -> Any:
    if family == "roberta":
        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
        torch.manual_seed(3)
        model: Any = RobertaModel(RobertaConfig(vocab_size=99, **sizes))
    else:
        model = AutoModel.from_pretrained(tiny.encoder(folder / family, family, dropout=dropout))
    enable_packed(model)
    return model.eval()


def read(model: Any, attention: str) -> Tensor:
    """Its last hidden states: (B, L, D) of padded texts, (T, D) of packed ones."""
    generator = torch.Generator().manual_seed(0)
    ids_T = torch.randint(5, 60, (int(LENGTHS_B.sum()),), generator=generator)
    if attention == "packed":
        return hidden_states(model, ids_T, LENGTHS_B, TextShape(9, has_padding=False))
    mask_BL = torch.arange(9) < LENGTHS_B[:, None]
    ids_BL = torch.ones(mask_BL.shape, dtype=torch.long).masked_scatter(mask_BL, ids_T)
    return hidden_states(model, ids_BL, LENGTHS_B)


def gradients(model: nn.Module, first_BD: Tensor) -> dict[str, Tensor]:
    target_BD = torch.randn(first_BD.shape, generator=torch.Generator().manual_seed(1), dtype=first_BD.dtype)
    model.zero_grad()
    (first_BD * target_BD).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("attention", ["padded", "packed"])
@pytest.mark.parametrize(("family", "whole"), [*((family, True) for family in FAMILIES), ("bert", False)])
def test_the_first_hidden_states_and_all_gradients_are_the_same(
    family: str, whole: bool, attention: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(last_layer, "_is_whole", lambda linear: whole)
    model = encoder(family, tmp_path).double()
    hidden = read(model, attention)
    first_BD = hidden[:, 0] if attention == "padded" else hidden[LENGTHS_B.cumsum(0) - LENGTHS_B]
    expected = gradients(model, first_BD)
    undo = compute_cls_only(model)
    calls: list[nn.Module] = []
    model.encoder.layer[-1].attention.self.key.register_forward_hook(lambda module, *_: calls.append(module))
    cls = read(model, attention)
    assert len(calls) == (not whole)
    assert cls.shape[:-1] == ((4, 1) if attention == "padded" else (4,))
    cls_BD = cls[:, 0] if attention == "padded" else cls
    torch.testing.assert_close(cls_BD, first_BD)
    actual = gradients(model, cls_BD)
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, msg=name)
    assert undo
    undo()
    undo()  # another thread's
    assert read(model, attention).equal(hidden)


def test_other_families_and_other_code_stay_as_they_are(tmp_path: Path) -> None:
    class RemoteCodeBert(BertModel):
        """Code that an encoder's folder brings."""

    bert = encoder("bert", tmp_path)
    in_chunks = BertConfig(**{**bert.config.to_dict(), "chunk_size_feed_forward": 2})
    for model in (encoder("modernbert", tmp_path), RemoteCodeBert(bert.config), BertModel(in_chunks)):
        assert compute_cls_only(model) is None
    assert compute_cls_only(bert)


@pytest.mark.parametrize("attention", ["padded", "packed"])
def test_dropout_is_replayed(attention: str, tmp_path: Path) -> None:
    model = encoder("bert", tmp_path, dropout=0.1).train()
    compute_cls_only(model)
    torch.manual_seed(1)
    with_graph = read(model, attention)
    torch.manual_seed(1)
    with torch.no_grad():
        assert read(model, attention).equal(with_graph) and not read(model, attention).equal(with_graph)


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_dropout_is_the_same_with_and_without_keys_and_values(
    precision: torch.dtype | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dropout the attention's weights do not sum to 1, nor do those of the values' bias."""
    model = encoder("bert", tmp_path, dropout=0.3).train()
    for name, parameter in model.named_parameters():
        if name.endswith("value.bias"):
            nn.init.normal_(parameter)
    if precision is None:
        model.double()
    use_cpu_dropout(model)
    compute_cls_only(model)
    results: list[tuple[Tensor, dict[str, Tensor]]] = []
    for whole in (True, False):
        monkeypatch.setattr(last_layer, "_is_whole", lambda linear, whole=whole: whole)
        torch.manual_seed(1)
        with torch.autocast("cpu", precision, enabled=precision is not None):
            cls_BD = read(model, "packed")
        results.append((cls_BD.detach(), gradients(model, cls_BD)))
    (cls_BD, actual), (expected_BD, expected) = results
    share = 1e-10 if precision is None else 0.05
    assert (cls_BD - expected_BD).norm() <= share * expected_BD.norm()
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        if not name.endswith("key.bias"):  # zero, but for rounding
            assert (actual[name] - gradient).norm() <= share * gradient.norm(), name


@pytest.mark.parametrize(
    ("pooling", "attention", "compiled"),
    [("cls", "padded", "false"), ("cls", "packed", "false"), ("mean", "packed", "false"), ("cls", "packed", "layers")],
)
def test_fine_tuning_computes_what_its_pooling_reads(
    pooling: str, attention: str, compiled: str, tmp_path: Path
) -> None:
    overrides = (f"model.pooling={pooling}", f"model.attention={attention}", f"model.compile={compiled}")
    with joined(Placement(0, 1, 0)):
        task, _ = steps.built_task(steps.recipe("finetune", tmp_path, *overrides), 0, 1)
    ids_T = torch.arange(5, 25)
    inputs = (ids_T, torch.tensor([8, 12]), TextShape(12, has_padding=False))
    if attention == "padded":
        inputs = (ids_T[:16].view(2, 8), torch.tensor([8, 8]), TextShape(8, has_padding=False))
    tokens = len(ids_T) if attention == "packed" else 16
    for layer in layers_of(task.module.encoder):
        layer._compiled_call_impl = None  # as it would compute if a compiler were at hand
    counts = tiny.tokens_of_last_layer(task.module.encoder)
    task.module(*inputs)
    assert counts == [2 if (pooling, compiled) == ("cls", "false") else tokens]


def test_layers_that_are_computed_again_take_the_texts_of_their_own_pass(tmp_path: Path) -> None:
    """Two micro-batches whose graphs are kept, under activation checkpointing."""
    by_pass: list[dict[str, Tensor]] = []
    for checkpointing in (False, True):
        model = encoder("bert", tmp_path).train()
        compute_cls_only(model)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        ids_T = torch.arange(5, 25)
        passes = [
            hidden_states(model, ids_T, torch.tensor(lengths), TextShape(12, has_padding=False))
            for lengths in ([8, 12], [11, 9])
        ]
        by_pass.append(gradients(model, torch.cat(passes)))
    for name, gradient in by_pass[0].items():
        torch.testing.assert_close(by_pass[1][name], gradient, rtol=1e-5, atol=1e-7, msg=name)
