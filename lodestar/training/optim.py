"""Parameter groups and optimizers: weight decay on matrices only; Muon, if chosen, for matrices of hidden layers.

Muon: Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks".
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from lodestar.config.schema import OptimConfig

Group = dict[str, Any]
"""A parameter group of a torch optimizer."""
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of Muon's iteration, the same in torch and DeepSpeed."""


def by_muon(model: nn.Module) -> set[str]:
    """Names of the matrices of hidden layers: without embeddings and matrices with a side of the vocabulary's size."""
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    widest = max((m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)), default=0)
    return {
        name
        for name, p in model.named_parameters()
        if p.ndim == 2 and p.requires_grad and id(p) not in embeddings and widest not in p.shape
    }


def groups(model: nn.Module, optim: OptimConfig) -> list[Group]:
    """Parameter groups, each with `peak_lr` and, for its optimizer, `use_muon`."""
    muon = by_muon(model) if optim.name == "muon" else set()
    by_kind: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            # matrices decay; biases and the gains of norms do not
            by_kind.setdefault((name in muon, parameter.ndim >= 2), []).append(parameter)
    return [
        {
            "params": parameters,
            "use_muon": use_muon,
            "peak_lr": optim.muon_lr if use_muon else optim.lr,
            "lr": optim.muon_lr if use_muon else optim.lr,
            "weight_decay": optim.weight_decay if decay else 0.0,
        }
        for (use_muon, decay), parameters in by_kind.items()
    ]


def adamw(parameter_groups: list[Group], optim: OptimConfig) -> torch.optim.Optimizer:
    """AdamW: Loshchilov and Hutter 2019, "Decoupled weight decay regularization"."""
    return torch.optim.AdamW(
        [{k: v for k, v in group.items() if k != "use_muon"} for group in parameter_groups],
        lr=optim.lr,
        betas=optim.betas,
        eps=optim.eps,
        fused=True,
    )


def muon(parameter_groups: list[Group], optim: OptimConfig) -> torch.optim.Optimizer:
    """torch's Muon."""
    return torch.optim.Muon(
        [{k: v for k, v in group.items() if k != "use_muon"} for group in parameter_groups],
        lr=optim.muon_lr,
        momentum=optim.muon_momentum,
        nesterov=True,
    )


def newton_schulz(gradient: Tensor, steps: int = 5, eps: float = 1e-7) -> Tensor:
    """(N, M) -> (N, M) with singular values near 1, in the gradient's own precision.

    torch and DeepSpeed run the same iteration in bf16, whatever the type of the gradient.
    """
    a, b, c = NEWTON_SCHULZ
    tall = gradient.shape[0] > gradient.shape[1]
    x = gradient.T if tall else gradient
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


@contextmanager
def muon_in_fp32(enabled: bool) -> Iterator[None]:
    """Inside, torch's and DeepSpeed's Muon iterate in fp32 if `enabled`.

    CPUs without bf16 units need many times as long for a product in bf16. Neither library has an option for it, so
    their functions are replaced.
    """
    replaced: list[tuple[ModuleType, str, Any]] = []
    for module, name, function in _IN_FP32:
        if enabled and module in sys.modules:
            replaced.append((sys.modules[module], name, getattr(sys.modules[module], name)))
            setattr(sys.modules[module], name, function)
    try:
        yield
    finally:
        for module, name, function in replaced:
            setattr(module, name, function)


class _WithoutHalfPrecision:
    """Stands for DeepSpeed's accelerator, which every version of it asks for the type of the iteration."""

    def is_bf16_supported(self) -> bool:
        return False

    def is_fp16_supported(self) -> bool:
        return False


_IN_FP32 = (
    ("torch.optim._muon", "_zeropower_via_newtonschulz", lambda grad, abc, steps, eps: newton_schulz(grad, steps, eps)),
    ("deepspeed.runtime.zero.muon.original_muon", "get_accelerator", _WithoutHalfPrecision),
)
