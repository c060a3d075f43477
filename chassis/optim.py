"""Which parameters are trained how: weight decay on matrices alone, Muon for those of the hidden layers if asked.

Muon: Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks".
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from chassis.schema import Optim

Group = dict[str, Any]


def by_muon(model: nn.Module) -> set[str]:
    """Names of the matrices of hidden layers: neither embeddings nor anything that touches the vocabulary."""
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    widest = max((m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)), default=0)
    return {
        name
        for name, p in model.named_parameters()
        if p.ndim == 2 and p.requires_grad and id(p) not in embeddings and widest not in p.shape
    }


def groups(model: nn.Module, optim: Optim) -> list[Group]:
    """Parameter groups, each with its `peak_lr`; `use_muon` tells Muon's from AdamW's."""
    muon = by_muon(model) if optim.name == "muon" else set()
    sorted_out: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            # matrices decay; biases and the gains of norms do not
            sorted_out.setdefault((name in muon, parameter.ndim >= 2), []).append(parameter)
    return [
        {
            "params": parameters,
            "use_muon": use_muon,
            "peak_lr": optim.muon_lr if use_muon else optim.lr,
            "lr": optim.muon_lr if use_muon else optim.lr,
            "weight_decay": optim.weight_decay if decay else 0.0,
        }
        for (use_muon, decay), parameters in sorted_out.items()
    ]


def adamw(parameter_groups: list[Group], optim: Optim) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        [{k: v for k, v in group.items() if k != "use_muon"} for group in parameter_groups],
        lr=optim.lr,
        betas=optim.betas,
        eps=optim.eps,
        fused=True,
    )


def muon(parameter_groups: list[Group], optim: Optim) -> torch.optim.Optimizer:
    return torch.optim.Muon(
        [{k: v for k, v in group.items() if k != "use_muon"} for group in parameter_groups],
        lr=optim.muon_lr,
        momentum=optim.muon_momentum,
        nesterov=True,
    )
