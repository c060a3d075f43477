"""Named tensors in one buffer: they travel from a loader's worker to the device as one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

_ALIGNMENT = 16  # bytes; at least the size of any element


@dataclass(frozen=True)
class FlatTensors:
    """Tensors by name, read as views of one uint8 buffer."""

    buffer: Tensor
    places: Mapping[str, tuple[int, torch.dtype, tuple[int, ...]]]
    """Offset in bytes, type and shape of each."""

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> FlatTensors:
        """Copies of the tensors, which must be on the CPU."""
        places: dict[str, tuple[int, torch.dtype, tuple[int, ...]]] = {}
        size = 0
        for name, tensor in tensors.items():
            places[name] = size, tensor.dtype, tuple(tensor.shape)
            size += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        flat = cls(torch.empty(size, dtype=torch.uint8), places)
        for name, tensor in tensors.items():
            flat[name].copy_(tensor)
        return flat

    def __getitem__(self, name: str) -> Tensor:
        offset, dtype, shape = self.places[name]
        size = math.prod(shape) * dtype.itemsize
        return self.buffer[offset : offset + size].view(dtype).view(shape)

    def to(self, device: torch.device) -> FlatTensors:
        """On a device; the host does not wait if the buffer is pinned."""
        return replace(self, buffer=self.buffer.to(device, non_blocking=True))

    def pin_memory(self) -> FlatTensors:
        return replace(self, buffer=self.buffer.pin_memory())
