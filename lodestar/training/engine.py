"""What runs a model on the hardware: forward, backward of a local loss, one optimizer step over all ranks.

A stage returns its local loss, summed over ranks the loss of the global batch; the engine sums gradients over ranks.
Both engines average, so both multiply it by the world size first; no other file does.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lodestar.errors import CheckpointError

_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class StepReport:
    """Scalars of one optimizer step, still on the device."""

    grad_norm: Tensor
    """Norm of the gradient of the whole global batch, before clipping."""
    skipped: Tensor
    """1 where the gradient was not finite and nothing was changed, else 0."""


@dataclass(frozen=True)
class Resumed:
    """What an engine needs of a checkpoint."""

    weights: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    updates: int
    """Steps that were not skipped."""
    values: Mapping[str, float]


class Engine(Protocol):
    module: nn.Module

    def run(self, *inputs: Any, last: bool) -> Any:
        """The model's forward; `last`: the backward of this one is the step's last."""
        ...

    def backward(self, local_loss: Tensor, *, last: bool) -> None:
        """Add the gradient of this rank's local loss; the last one sums over ranks."""
        ...

    def step(self, lr_factor: float) -> StepReport:
        """Update with each group's peak learning rate times `lr_factor`."""
        ...

    def weights(self) -> dict[str, Tensor]:
        """Whole fp32 parameters by name, on the CPU; every rank must call."""
        ...

    def optimizer_state(self) -> dict[str, Tensor]:
        """Whole optimizer states as `PARAMETER:KEY`, on the CPU, the same for any engine; every rank must call."""
        ...

    def values(self) -> dict[str, float]:
        """The few numbers besides tensors that the next step depends on."""
        ...

    def resume(self, checkpoint: Resumed) -> None:
        """Take over states that any engine at any world size wrote; the weights are in the module already."""
        ...


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """Matrix products in half precision on fp32 weights, so that gradients of many micro-batches add up in fp32."""
    return torch.autocast(device.type, _HALF[precision]) if precision in _HALF else nullcontext()


class Autocast(nn.Module):
    """Enters autocast inside the forward, where no engine's own settings can switch it off again."""

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
            f"checkpoint.resume: no {key} of {name} in it: it was written by another optimizer or model "
            "(restore the recipe, or start afresh with checkpoint.resume=none)"
        )
    return state[f"{name}:{key}"]
