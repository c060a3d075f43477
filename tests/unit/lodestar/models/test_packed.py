"""Texts laid end to end against the same texts padded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModel, AutoModelForMaskedLM, MPNetConfig, MPNetModel, PreTrainedModel

from lodestar.config.schema import Pooling
from lodestar.errors import ModelError
from lodestar.models import packed
from lodestar.models.compile import layers_of
from lodestar.models.last_layer import compute_cls_only
from lodestar.models.packed import NAME, enable_packed, packed_hidden, pool_packed, text_index, text_positions
from lodestar.models.pooling import pool
from lodestar.models.pooling_config import POOLINGS
from tests import tiny

LENGTHS = [40, 7, 7, 7, 1, 2, 33, 9]  # a run of equal ones, one token alone, and more than ModernBERT's window


def encoder(family: str, folder: Path, *, dropout: float = 0.0, packed: bool = True) -> PreTrainedModel:
    """In fp32, in evaluation mode; on causal decoders too."""
    path = (
        tiny.decoder(folder / family) if family == "qwen2" else tiny.encoder(folder / family, family, dropout=dropout)
    )
    model = AutoModel.from_pretrained(path, use_cache=False) if family == "qwen2" else AutoModel.from_pretrained(path)
    if packed:
        enable_packed(model)
    return model.eval()


def packed_texts(lengths: list[int], seed: int = 0) -> tuple[Tensor, Tensor]:
    """(T,) ids that are no special tokens, and (N + 1,) offsets."""
    generator = torch.Generator().manual_seed(seed)
    ids_T = torch.randint(5, 60, (sum(lengths),), generator=generator)
    return ids_T, torch.tensor([0, *lengths]).cumsum(0)


def padded_hidden(model: PreTrainedModel, ids_T: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """(B, L, D) hidden states of the same texts, padded, and their (B, L) mask."""
    mask_BL = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    ids_BL = torch.full(mask_BL.shape, model.config.pad_token_id or 0)
    ids_BL[mask_BL] = ids_T
    return model(input_ids=ids_BL, attention_mask=mask_BL.long()).last_hidden_state, mask_BL


def gradients(model: PreTrainedModel, hidden_TD: Tensor) -> Tensor:
    """Of all parameters, one after another."""
    weight_TD = torch.randn(hidden_TD.shape, generator=torch.Generator().manual_seed(1))
    model.zero_grad()
    (hidden_TD * weight_TD).sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def distance(x: Tensor, expected: Tensor) -> float:
    """Relative, in the Euclidean norm."""
    x, expected = x.detach().double(), expected.detach().double()
    return float((x - expected).norm() / expected.norm())


@pytest.mark.parametrize("family", [*tiny.FAMILIES, "qwen2"])
def test_hidden_states_and_gradients_are_those_of_padded_texts(family: str, tmp_path: Path) -> None:
    model = encoder(family, tmp_path)
    ids_T, offsets_N1 = packed_texts(LENGTHS)
    padded_BLD, mask_BL = padded_hidden(model, ids_T, LENGTHS)
    expected_TD = padded_BLD[mask_BL]
    expected_grad = gradients(model, expected_TD)
    packed_TD = packed_hidden(model, ids_T, offsets_N1, max_length=max(LENGTHS))
    assert distance(packed_TD, expected_TD) < 1e-6
    assert distance(gradients(model, packed_TD), expected_grad) < 1e-6
    others_TD = packed_hidden(model, ids_T, torch.tensor([0, *LENGTHS[::-1]]).cumsum(0), max_length=max(LENGTHS))
    assert distance(others_TD, expected_TD) > 1e-2
    assert distance(gradients(model, others_TD), expected_grad) > 1e-2


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_text_is_the_same_whatever_its_neighbours(family: str, tmp_path: Path) -> None:
    model = encoder(family, tmp_path)
    ids_T, offsets_N1 = packed_texts([5, 11, 20])
    with torch.no_grad():
        among_others_LD = packed_hidden(model, ids_T, offsets_N1, max_length=20)[5:16]
        alone_LD = packed_hidden(model, ids_T[5:16], torch.tensor([0, 11]), max_length=11)
        as_one_LD = packed_hidden(model, ids_T, torch.tensor([0, 36]), max_length=36)[5:16]
    assert distance(among_others_LD, alone_LD) < 1e-6
    assert distance(as_one_LD, alone_LD) > 1e-2


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_padded_use_and_the_saved_folder_do_not_change(family: str, tmp_path: Path) -> None:
    plain, model = encoder(family, tmp_path, packed=False), encoder(family, tmp_path)
    ids_T, _ = packed_texts(LENGTHS)
    with torch.no_grad():
        expected_BLD, _ = padded_hidden(plain, ids_T, LENGTHS)
        assert padded_hidden(model, ids_T, LENGTHS)[0].equal(expected_BLD)
        ids_BL = ids_T[:40][None]  # without padding, and without a mask
        assert distance(model(input_ids=ids_BL).last_hidden_state, plain(input_ids=ids_BL).last_hidden_state) < 1e-6
    plain.save_pretrained(tmp_path / "plain")
    model.save_pretrained(tmp_path / "packed")
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("plain", "packed")]
    assert configs[0] == configs[1]


def test_a_model_with_a_head_is_enabled_as_a_whole(tmp_path: Path) -> None:
    model = AutoModelForMaskedLM.from_pretrained(tiny.encoder(tmp_path / "bert")).eval()
    enable_packed(model)
    ids_T, offsets_N1 = packed_texts(LENGTHS)
    padded_BLD, mask_BL = padded_hidden(model.base_model, ids_T, LENGTHS)
    packed_TD = packed_hidden(model.base_model, ids_T, offsets_N1, max_length=max(LENGTHS))
    assert distance(packed_TD, padded_BLD[mask_BL]) < 1e-6


def test_dropout_is_that_of_the_seed(tmp_path: Path) -> None:
    model = encoder("bert", tmp_path, dropout=0.2).train()
    ids_T, offsets_N1 = packed_texts(LENGTHS)

    def run(seed: int) -> tuple[Tensor, Tensor]:
        torch.manual_seed(seed)
        hidden_TD = packed_hidden(model, ids_T, offsets_N1, max_length=max(LENGTHS))
        return hidden_TD.detach(), gradients(model, hidden_TD)

    first, again, other = run(1), run(1), run(2)
    assert all(x.equal(y) for x, y in zip(first, again, strict=True))
    assert distance(other[0], first[0]) > 1e-2 and distance(other[1], first[1]) > 1e-2


def test_activation_checkpointing_gives_the_same_gradients(tmp_path: Path) -> None:
    model = encoder("bert", tmp_path, dropout=0.2).train()
    ids_T, offsets_N1 = packed_texts(LENGTHS)

    def run() -> Tensor:
        torch.manual_seed(1)
        return gradients(model, packed_hidden(model, ids_T, offsets_N1, max_length=max(LENGTHS)))

    expected = run()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert distance(run(), expected) < 1e-6


@pytest.mark.parametrize("pooling", POOLINGS.values())
def test_pooling_is_that_of_padded_texts(pooling: Any) -> None:
    torch.manual_seed(0)
    mask_BL = torch.arange(40) < torch.tensor(LENGTHS)[:, None]
    hidden_BLD = torch.randn(len(LENGTHS), 40, 8, requires_grad=True)
    expected_ND = pool(hidden_BLD, mask_BL, pooling)
    (expected_grad,) = torch.autograd.grad(expected_ND.square().sum(), hidden_BLD)
    offsets_N1 = torch.tensor([0, *LENGTHS]).cumsum(0)
    pooled_ND = pool_packed(hidden_BLD[mask_BL], offsets_N1, pooling)
    assert distance(pooled_ND, expected_ND) < 1e-6
    assert distance(torch.autograd.grad(pooled_ND.square().sum(), hidden_BLD)[0], expected_grad) < 1e-6
    assert distance(pool_packed(hidden_BLD[mask_BL].flip(0), offsets_N1, pooling), expected_ND) > 0.1


def test_positions_start_again_in_each_text() -> None:
    offsets_N1 = torch.tensor([0, 3, 4, 6])
    assert text_index(offsets_N1, 6).tolist() == [0, 0, 0, 1, 2, 2]
    assert text_positions(offsets_N1, 6).tolist() == [0, 1, 2, 0, 0, 1]


class Calls(TorchDispatchMode):
    """Records the operators that are called, and the arguments of flash attention."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.windows: list[tuple[int, int]] = []
        self.longest: list[tuple[int, int]] = []
        """Of the queries and of the keys."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.name())
        if func.name() == "aten::_flash_attention_forward":
            self.windows.append((kwargs["window_size_left"], kwargs["window_size_right"]))
            self.longest.append((args[5], args[6]))
        return func(*args, **kwargs)


def run_without_data(family: str, folder: Path, dtype: torch.dtype, *, cls_only: bool = False) -> Calls:
    """A step of training as on a GPU, on torch's device without data: there is no value that could be waited for."""
    config = encoder(family, folder, dropout=0.1).config
    with torch.device("meta"), Calls() as calls:
        model = AutoModel.from_config(config, attn_implementation=NAME, dtype=dtype).train()
        ids_T, offsets_N1 = torch.ones(sum(LENGTHS), dtype=torch.int64), torch.ones(len(LENGTHS) + 1).long()
        if cls_only:
            compute_cls_only(model)
        hidden_TD = packed_hidden(model, ids_T, offsets_N1, max_length=max(LENGTHS))
        assert len(hidden_TD) == (len(LENGTHS) if cls_only else sum(LENGTHS))
        poolings: list[Pooling] = ["cls"] if cls_only else [*POOLINGS.values()]
        torch.stack([pool_packed(hidden_TD, offsets_N1, pooling).float() for pooling in poolings]).sum().backward()
    return calls


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_gpu_runs_flash_attention_and_waits_for_nothing(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed, "_on_gpu", lambda x: True)
    calls = run_without_data(family, tmp_path, torch.bfloat16)
    assert "aten::_flash_attention_backward" in calls.names
    assert not calls.names & {"aten::_local_scalar_dense", "aten::item", "aten::nonzero"}
    whole, local = (-1, -1), (8, 8)  # of tiny's ModernBERT, whose first layer attends to whole texts
    assert calls.windows == ([whole, local] if family == "modernbert" else [whole, whole])
    with pytest.raises(NotImplementedError, match="no data"):  # lengths are asked for
        run_without_data(family, tmp_path, torch.float32)


def test_a_gpu_asks_for_cls_alone_in_the_last_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "_on_gpu", lambda x: True)
    calls = run_without_data("bert", tmp_path, torch.bfloat16, cls_only=True)
    assert calls.longest == [(max(LENGTHS), max(LENGTHS)), (1, max(LENGTHS))]
    assert not calls.names & {"aten::_local_scalar_dense", "aten::item", "aten::nonzero"}


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_layer_is_compiled_once_for_all_lengths(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "_on_gpu", lambda x: True)
    config = encoder(family, tmp_path, dropout=0.1).config
    counter = CompileCounter()
    torch._dynamo.reset()
    with torch.device("meta"):
        model = AutoModel.from_config(config, attn_implementation=NAME, dtype=torch.bfloat16).train()
        for layer in layers_of(model):
            layer.compile(backend=counter, dynamic=True, fullgraph=True)
        for tokens, texts, longest in ((30, 4, 9), (41, 5, 12), (55, 7, 40)):
            ids_T, offsets_N1 = torch.ones(tokens, dtype=torch.int64), torch.ones(texts + 1).long()
            packed_hidden(model, ids_T, offsets_N1, max_length=longest).sum().backward()
    assert counter.frame_count == (2 if family == "modernbert" else 1)  # its layers are of two kinds


def test_a_family_with_attention_of_its_own_is_refused_in_one_line() -> None:
    config = MPNetConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64
    )
    with pytest.raises(
        ModelError, match=r"^model.attention: packed: MPNetModel cannot read texts laid end to end \(.*"
    ):
        enable_packed(MPNetModel(config))
