"""Linear layers by oneDNN: nn.Linear's values and gradients."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModel

from lodestar.config.schema import ModelConfig
from lodestar.models import cpu_linear
from lodestar.models.cpu_linear import Linear, has_onednn, use_cpu_linear
from lodestar.models.hidden_states import prepare
from tests import tiny

ONEDNN = "mkldnn::_linear_pointwise"
pytestmark = pytest.mark.skipif(not has_onednn(), reason="torch is built without oneDNN")


@pytest.fixture(autouse=True)
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if every product were large."""
    monkeypatch.setattr(cpu_linear, "MIN_PRODUCTS", 0)


def operators(module: nn.Module, x: Tensor) -> set[str]:
    with torch.profiler.profile() as profile:
        module(x).sum().backward()
    return {event.key for event in profile.key_averages()}


def replaced(*, bias: bool = True) -> tuple[nn.Module, nn.Module]:
    """Two layers of equal weights: nn.Linear, and one by oneDNN."""
    torch.manual_seed(0)
    whole = nn.Sequential(nn.Linear(24, 40, bias=bias))
    other = nn.Sequential(nn.Linear(24, 40, bias=bias))
    other.load_state_dict(whole.state_dict())
    parameters = [*other.parameters()]
    use_cpu_linear(other)
    assert type(other[0]) is Linear and all(a is b for a, b in zip(parameters, other.parameters(), strict=True))
    return whole, other


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7, 24), (2, 5, 24), (24,)])
def test_values_and_gradients_are_those_of_torch(shape: tuple[int, ...], bias: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    x, target = torch.randn(shape, generator=generator), torch.randn(*shape[:-1], 40, generator=generator)
    results: list[list[Tensor]] = []
    for module in replaced(bias=bias):
        leaf = x.clone().requires_grad_()
        out = module(leaf)
        (out * target).sum().backward()
        results.append([out, *(p.grad for p in (leaf, *module.parameters()) if p.grad is not None)])
    assert len(results[0]) == 3 + bias
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_frozen_weights_get_no_gradient() -> None:
    _, module = replaced()
    module.requires_grad_(False)
    x = torch.randn(3, 24, requires_grad=True)
    module(x).sum().backward()
    assert x.grad is not None and all(p.grad is None for p in module.parameters())


def test_it_takes_large_products_in_fp32_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    _, module = replaced()
    x = torch.randn(3, 24)
    assert ONEDNN in operators(module, x)
    with torch.inference_mode():
        torch.testing.assert_close(module(x), nn.Linear.forward(module[0], x))  # type: ignore[index]
    with torch.autocast("cpu", torch.bfloat16):
        assert module(x).dtype == torch.bfloat16
    with torch.backends.mkldnn.flags(enabled=False):
        assert ONEDNN not in operators(module, x)
    monkeypatch.setattr(cpu_linear, "MIN_PRODUCTS", 3 * 24 * 40 + 1)
    assert ONEDNN not in operators(module, x)
    monkeypatch.setattr(cpu_linear, "MIN_PRODUCTS", 0)
    assert ONEDNN not in operators(module.double(), x.double())


@pytest.mark.parametrize(("compiled", "used"), [(False, True), ("layers", False)])
def test_an_encoder_that_is_not_compiled_is_prepared_with_it(compiled: bool | str, used: bool, tmp_path: Path) -> None:
    tiny.encoder(tmp_path, "bert", layers=1, width=16)
    encoder = AutoModel.from_pretrained(tmp_path, add_pooling_layer=False)
    names = [*encoder.state_dict()]
    values = {"encoder": str(tmp_path), "compile": compiled}
    prepare(encoder, ModelConfig.model_validate(values), torch.device("cpu"))
    assert any(type(module) is Linear for module in encoder.modules()) == used
    assert [*encoder.state_dict()] == names
