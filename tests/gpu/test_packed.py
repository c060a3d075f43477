"""Flash attention over texts laid end to end, which only a GPU has."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModel, PreTrainedModel

from lodestar.models.last_layer import compute_cls_only
from lodestar.models.packed import enable_packed, packed_hidden
from tests import tiny

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]

LENGTHS = [40, 7, 7, 1, 2, 33]  # longer than ModernBERT's window


def results(model: PreTrainedModel, device: str, dtype: torch.dtype, offsets_N1: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states and the gradient of all parameters, in fp32 on the CPU."""
    ids_T = torch.randint(5, 60, (sum(LENGTHS),), generator=torch.Generator().manual_seed(0)).to(device)
    model.to(device, dtype).zero_grad()
    hidden_TD = packed_hidden(model, ids_T, offsets_N1.to(device), max_length=max(LENGTHS))
    weight_TD = torch.randn(hidden_TD.shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    (hidden_TD * weight_TD).sum().backward()
    grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return hidden_TD.detach().cpu().float(), torch.cat(grads).cpu().float()


def distance(x: Tensor, expected: Tensor) -> float:
    return float((x - expected).norm() / expected.norm())


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 0.1), ("float16", 0.02)])
def test_packed_texts_on_a_gpu_are_those_on_a_cpu(family: str, dtype: str, tolerance: float, tmp_path: Path) -> None:
    model = AutoModel.from_pretrained(tiny.encoder(tmp_path / "model", family, width=64)).eval()
    enable_packed(model)
    offsets_N1 = torch.tensor([0, *LENGTHS]).cumsum(0)
    expected = results(model, "cpu", torch.float32, offsets_N1)
    actual = results(model, "cuda", getattr(torch, dtype), offsets_N1)
    reversed_N1 = torch.tensor([0, *LENGTHS[::-1]]).cumsum(0)
    other = results(model, "cuda", getattr(torch, dtype), reversed_N1)
    for x, y, z in zip(actual, expected, other, strict=True):
        assert distance(x, y) < tolerance < distance(z, y)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 0.1)])
def test_cls_alone_on_a_gpu_is_that_of_whole_layers(dtype: str, tolerance: float, tmp_path: Path) -> None:
    model = AutoModel.from_pretrained(tiny.encoder(tmp_path / "model", "bert", width=64)).eval()
    enable_packed(model)
    model.to("cuda", getattr(torch, dtype))
    offsets_N1 = torch.tensor([0, *LENGTHS]).cumsum(0).cuda()
    ids_T = torch.randint(5, 60, (sum(LENGTHS),)).cuda()
    whole_TD = packed_hidden(model, ids_T, offsets_N1, max_length=max(LENGTHS))
    compute_cls_only(model)
    cls_ND = packed_hidden(model, ids_T, offsets_N1, max_length=max(LENGTHS))
    assert distance(cls_ND, whole_TD[offsets_N1[:-1]]) < tolerance < distance(cls_ND, whole_TD[offsets_N1[1:] - 1])


def test_flash_attention_waits_for_nothing_and_drops_out_by_the_seed(tmp_path: Path) -> None:
    model = AutoModel.from_pretrained(tiny.encoder(tmp_path / "model", "bert", width=64, dropout=0.2)).train()
    enable_packed(model)
    offsets_N1 = torch.tensor([0, *LENGTHS]).cumsum(0).cuda()
    ids_T = torch.randint(5, 60, (sum(LENGTHS),)).cuda()
    model.to("cuda", torch.bfloat16)

    def run(seed: int) -> Tensor:
        torch.manual_seed(seed)
        hidden_TD = packed_hidden(model, ids_T, offsets_N1, max_length=max(LENGTHS))
        hidden_TD.float().square().sum().backward()
        return hidden_TD.detach()

    first = run(1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = run(1)
        with torch.no_grad():
            torch.manual_seed(1)
            without_graph = packed_hidden(model, ids_T, offsets_N1, max_length=max(LENGTHS))
        other = run(2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert again.equal(first) and without_graph.equal(first) and not other.equal(first)
