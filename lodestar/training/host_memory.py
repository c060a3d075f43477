"""Host memory for copies of an engine's tensors, kept from one checkpoint to the next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


class HostMemory:
    """Blocks of fp32 host memory, one for each group of tensors; pinned where the tensors are on a GPU.

    A later copy of a group overwrites the earlier one.
    """

    def __init__(self) -> None:
        self._blocks: dict[str, Tensor] = {}

    def allocate(self, group: str, shapes: Mapping[str, torch.Size], device: torch.device) -> dict[str, Tensor]:
        """Tensors of these shapes in the group's block, by name; `device` is that of the tensors to be copied."""
        sizes = [shape.numel() for shape in shapes.values()]
        block = self._blocks.get(group)
        if block is None or len(block) != sum(sizes):
            block = torch.empty(sum(sizes), dtype=torch.float32, pin_memory=device.type == "cuda")
            self._blocks[group] = block
        pieces = block.split(sizes)
        return {name: piece.view(shape) for (name, shape), piece in zip(shapes.items(), pieces, strict=True)}

    def copy(self, group: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies of the tensors, by name; done when it returns."""
        if not tensors:
            return {}
        device = next(iter(tensors.values())).device
        copies = self.allocate(group, {name: tensor.shape for name, tensor in tensors.items()}, device)
        copy_all(list(copies.values()), list(tensors.values()))
        return copies


def copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy tensors of one device to host memory: queued together, and waited for once."""
    torch._foreach_copy_(list(targets), [source.detach() for source in sources], non_blocking=True)
    if sources and sources[0].device.type == "cuda":
        torch.cuda.current_stream(sources[0].device).synchronize()
