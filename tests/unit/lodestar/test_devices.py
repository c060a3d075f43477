"""TF32 and what must not be computed in it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from contrastive.loss import contrastive_local_loss, distillation_local_loss
from lodestar.config.schema import EngineConfig, OptimConfig
from lodestar.devices import set_tf32, tf32
from lodestar.distributed.runtime import Placement, joined
from lodestar.training.build_engine import build
from lodestar.training.engine import autocast
from retrieval.embedding.exact_search import search
from tests import processes, tiny

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    """Before each test too: other libraries set it."""
    set_tf32(False)
    yield
    set_tf32(False)


class Products(TorchDispatchMode):
    """Records the precision in which a GPU would compute each product of fp32 matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.precisions: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in ("mm", "addmm", "addmm_", "bmm"):
            self.precisions.append(torch.backends.cuda.matmul.fp32_precision)
        return func(*args, **(kwargs or {}))


def is_tf32() -> bool:
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def test_tf32_holds_inside_and_what_was_before_holds_after() -> None:
    with tf32(True):
        assert is_tf32() and torch.backends.cuda.matmul.allow_tf32
        with tf32(False):
            assert not is_tf32() and not torch.backends.cuda.matmul.allow_tf32
        assert is_tf32()
    assert not is_tf32()


def test_older_settings_of_torch_say_the_same() -> None:
    """In a process of its own: torch refuses to tell once any library has used the newer ones."""
    code = "import torch; from lodestar.devices import set_tf32\n"
    code += "for on in (True, False): set_tf32(on); print(torch.get_float32_matmul_precision())"
    done = processes.run([sys.executable, "-c", code], limit_s=60)
    assert done.stdout.split() == ["high", "highest"], done.stderr


def test_scores_are_exact_in_a_run_in_tf32() -> None:
    set_tf32(True)
    x, rows = F.normalize(torch.randn(8, 4), dim=1).requires_grad_(), torch.eye(4)
    with Products() as products:
        contrastive_local_loss(x, x, x, tiny.distinct_texts(8, 8), temperature=0.1, weight=1.0).value.backward()
        distillation_local_loss(x, x[:, None], torch.ones(8, 1), temperature=0.1, weight=1.0).backward()
        search(rows, rows, 2)
    assert set(products.precisions) == {"ieee"} and len(products.precisions) >= 4
    with Products() as products:  # negative control
        (rows @ rows).sum()
    assert products.precisions == ["tf32"]


@pytest.mark.parametrize("precision", ["tf32", "fp32", "bf16"])
def test_forward_and_backward_of_the_model_are_in_the_precision_of_the_recipe(precision: Any) -> None:
    set_tf32(precision != "tf32")  # what the environment says does not matter
    model, x = torch.nn.Linear(4, 4, bias=False), torch.eye(4).requires_grad_()
    with joined(Placement(0, 1, 0)) as runtime, Products() as products:
        engine = build(model, runtime, EngineConfig(), OptimConfig(lr=1e-3), precision)
        engine.backward(engine.run(x, last=True).sum(), last=True)
    assert products.precisions == ["tf32" if precision == "tf32" else "ieee"] * 3


def test_evaluation_is_in_the_precision_of_the_recipe() -> None:
    with Products() as products, torch.no_grad():
        with autocast(CPU, "tf32"):
            torch.eye(4) @ torch.eye(4)
        with tf32(True), autocast(CPU, "fp32"):
            torch.eye(4) @ torch.eye(4)
    assert products.precisions == ["tf32", "ieee"]
