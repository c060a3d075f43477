"""Compiled layers: the same numbers, at any length, and the same names."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModel

from contrastive.config import FinetuneRecipe
from contrastive.plan import plan
from lodestar.config import loader
from lodestar.config.schema import ModelConfig
from lodestar.distributed.runtime import Placement, joined
from lodestar.distributed.testing import run_world
from lodestar.errors import ConfigError
from lodestar.models.compile import check_compiler, compile_layers, layers_of
from lodestar.models.load import load_encoder
from lodestar.models.packed import enable_packed, packed_hidden
from tests import tiny
from tests.distributed import steps
from tests.unit.lodestar.config.test_loader import VALUES

CPU = torch.device("cpu")
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")


def encoder(folder: Path, family: str = "bert", **options: Any) -> nn.Module:
    path = folder / family
    if not path.exists():
        tiny.encoder(path, family, **options)
    return load_encoder(ModelConfig(encoder=str(path), max_length=32), AutoModel, seed=0).model


def output(model: nn.Module, texts: int, length: int, seed: int = 0) -> Tensor:
    ids_BL = torch.randint(5, 60, (texts, length), generator=torch.Generator().manual_seed(length))
    mask_BL = torch.ones_like(ids_BL)
    mask_BL[0, length // 2 :] = 0
    torch.manual_seed(seed)
    return model(input_ids=ids_BL, attention_mask=mask_BL).last_hidden_state


def packed_output(model: nn.Module, texts: int, length: int, seed: int = 0) -> Tensor:
    ids_T = torch.randint(5, 60, (texts * length - 1,), generator=torch.Generator().manual_seed(length))
    offsets_N1 = torch.tensor([*range(0, len(ids_T), length), len(ids_T)])  # the last text is shorter
    torch.manual_seed(seed)
    return packed_hidden(model, ids_T, offsets_N1, max_length=length)


def gradient(model: nn.Module, hidden_BLD: Tensor) -> Tensor:
    target_BLD = torch.randn(hidden_BLD.shape, generator=torch.Generator().manual_seed(1))
    grads = torch.autograd.grad((hidden_BLD * target_BLD).sum(), [*model.parameters()], allow_unused=True)
    return torch.cat([grad.flatten() for grad in grads if grad is not None])


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_compiled_layers_give_the_same_numbers_at_any_length(family: str, tmp_path: Path) -> None:
    plain, compiled = encoder(tmp_path, family), encoder(tmp_path, family)
    compile_layers(compiled, CPU)
    assert [name for name, _ in compiled.named_parameters()] == [name for name, _ in plain.named_parameters()]
    for texts, length in ((3, 7), (5, 12), (2, 31), (4, 8)):
        if (texts, length) == (2, 31):
            before = graphs()
        ours, theirs = output(compiled, texts, length), output(plain, texts, length)
        for a, b in ((ours, theirs), (gradient(compiled, ours), gradient(plain, theirs))):
            assert (a - b).norm() < 1e-5 * b.norm()
    assert graphs() == before > 0  # no length was compiled for itself


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("attention", ["padded", "packed"])
def test_dropout_is_the_same_with_and_without_gradients(attention: str, tmp_path: Path) -> None:
    model: Any = encoder(tmp_path, dropout=0.1, layers=1).train()
    if attention == "packed":
        enable_packed(model)
    compile_layers(model, CPU)
    read = packed_output if attention == "packed" else output
    with_graph = read(model, 3, 9, seed=1)
    with torch.no_grad():
        torch.testing.assert_close(read(model, 3, 9, seed=1), with_graph, rtol=1e-5, atol=1e-6)
        assert (read(model, 3, 9, seed=2) - with_graph).abs().max() > 0.01
    assert gradient(model, with_graph).isfinite().all()


@pytest.mark.slow
@needs_compiler
def test_a_compiled_encoder_is_saved_as_any_other(tmp_path: Path) -> None:
    plain, compiled = encoder(tmp_path), encoder(tmp_path)
    compile_layers(compiled, CPU)
    compiled.save_pretrained(tmp_path / "saved")  # type: ignore[operator]
    again = AutoModel.from_pretrained(tmp_path / "saved")
    assert torch.equal(output(again.eval(), 2, 9), output(plain.eval(), 2, 9))


@pytest.mark.slow
@needs_compiler
def test_a_step_with_compiled_layers_is_the_same_under_either_engine(tmp_path: Path) -> None:
    steps.recipe("finetune", tmp_path)
    for ranks, engine in ((1, "ddp"), (2, "zero2")):
        plain, compiled = (
            run_world(steps.step, ranks, "finetune", tmp_path, f"model.compile={value}", *steps.ENGINES[engine])[0]
            for value in ("false", "layers")
        )
        assert 0 < steps.distance(compiled, plain) < 1e-5


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
@pytest.mark.parametrize("value", ["layers", "false"])
def test_both_stages_compile_the_layers_that_the_recipe_names(stage: str, value: str, tmp_path: Path) -> None:
    with joined(Placement(0, 1, 0)):
        task, _ = steps.built_task(steps.recipe(stage, tmp_path, f"model.compile={value}"), 0, 1)
    encoder: Any = task.module.encoder
    is_compiled = [layer._compiled_call_impl is not None for layer in layers_of(encoder)]
    assert is_compiled == [value == "layers"] * len(is_compiled)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_layers_of_each_family_are_found(family: str, tmp_path: Path) -> None:
    layers = layers_of(encoder(tmp_path, family, layers=3))
    assert len(layers) == 3 and len({type(layer) for layer in layers}) == 1
    with pytest.raises(ConfigError, match=r"model\.compile: Linear has no list of layers"):
        layers_of(nn.Linear(2, 2))


def test_a_cpu_without_a_compiler_is_an_error_and_a_warning_of_the_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"model.compile: a CPU needs a C\+\+ compiler"):
        check_compiler()
    model = encoder(tmp_path)
    with pytest.raises(ConfigError, match=r"a C\+\+ compiler"):
        compile_layers(model, CPU)
    for value, lines in (("layers", 1), ("false", 0)):
        made = plan(loader.recipe_of(FinetuneRecipe, VALUES, [f"model.compile={value}"]), 1, None)
        assert sum(line.startswith("model.compile: ") for line in made["missing"]) == lines
