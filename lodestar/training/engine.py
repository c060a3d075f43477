"""The protocol of engines: forward, backward of a local loss, optimizer step over all ranks.

A stage returns its local loss; summed over ranks it is the loss of the global batch. Engines sum gradients over ranks:
their libraries average, so they multiply the local loss by the world size, and no other file does.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lodestar.devices import tf32
from lodestar.errors import CheckpointError
from lodestar.training.host_memory import HostMemory

_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class StepReport:
    """Scalars of one optimizer step, still on the device."""

    grad_norm: Tensor
    """Norm of the gradient of the whole global batch, before clipping."""
    skipped: Tensor
    """1 if the gradient was not finite and the weights did not change, else 0."""


@dataclass(frozen=True)
class ResumeState:
    """The part of a checkpoint that an engine needs."""

    weights: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    updates: int
    """Steps that were not skipped."""
    values: Mapping[str, float]
    """Of `Engine.values`."""


class Engine(Protocol):
    """Runs a model on the hardware; `DdpEngine` and `ZeroEngine`."""

    module: nn.Module

    def run(self, *inputs: Any, last: bool) -> Any:
        """The model's forward; `last`: its backward is the last one of the step."""
        ...

    def backward(self, local_loss: Tensor, *, last: bool) -> None:
        """Add the gradient of this rank's local loss; the last one sums over ranks."""
        ...

    def step(self, lr_factor: float) -> StepReport:
        """Update with each group's peak learning rate times `lr_factor`."""
        ...

    def weights(self, memory: HostMemory | None = None) -> dict[str, Tensor]:
        """On rank 0, copies of the unsharded fp32 parameters by name, on the CPU; every rank must call it.

        memory   where the copies are; none: in memory of their own
        """
        ...

    def optimizer_state(self, memory: HostMemory | None = None) -> dict[str, Tensor]:
        """On rank 0, copies of the unsharded optimizer states as `PARAMETER:KEY`, on the CPU, equal for all engines;
        every rank must call it.
        """
        ...

    def values(self) -> dict[str, float]:
        """The numbers, besides tensors, on which the next step depends: the loss scale."""
        ...

    def resume(self, checkpoint: ResumeState) -> None:
        """Load states that any engine at any world size wrote; the module has the weights already."""
        ...


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """Matrix products in the recipe's precision on fp32 weights; gradients of micro-batches are added in fp32."""
    return torch.autocast(device.type, _HALF[precision]) if precision in _HALF else tf32(precision == "tf32")


class Autocast(nn.Module):
    """Enters autocast inside the forward, where an engine's settings cannot disable it."""

    def __init__(self, module: nn.Module, device: torch.device, precision: str) -> None:
        super().__init__()
        self.inner, self.device, self.precision = module, device, precision

    def forward(self, *inputs: Any) -> Any:
        with autocast(self.device, self.precision):
            return self.inner(*inputs)


def state_tensor(name: str, key: str, state: Mapping[str, Tensor]) -> Tensor:
    """The state `key` of parameter `name`; CheckpointError where there is none."""
    if f"{name}:{key}" not in state:
        raise CheckpointError(
            f"checkpoint.resume: no {key} of {name} in it: written by another optimizer or model "
            "(restore the recipe, or start afresh with checkpoint.resume=none)"
        )
    return state[f"{name}:{key}"]
