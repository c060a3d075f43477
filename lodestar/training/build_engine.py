"""The engine that a recipe names."""

from __future__ import annotations

from torch import nn

from lodestar.config.schema import EngineConfig, OptimConfig, Precision
from lodestar.distributed.collectives import gather_objects
from lodestar.distributed.runtime import Runtime
from lodestar.errors import ConfigError
from lodestar.training.ddp import DdpEngine
from lodestar.training.engine import Engine
from lodestar.training.zero import ZeroEngine


def build(
    module: nn.Module, runtime: Runtime, section: EngineConfig, optim: OptimConfig, precision: Precision
) -> Engine:
    """The engine of the recipe around `module`, whose weights are already those to start from."""
    if precision == "fp16" and runtime.device.type == "cpu":
        raise ConfigError("precision: fp16 needs a GPU (use fp32 or bf16 here)")
    module.to(runtime.device)
    # All ranks or none: an update that differs by bf16's rounding would let their weights drift apart.
    muon_fp32 = optim.name == "muon" and not all(gather_objects(runtime.multiplies_bf16()))
    if section.kind == "ddp":
        return DdpEngine(module, runtime, optim, precision, muon_fp32)
    return ZeroEngine(module, runtime, section, optim, precision, muon_fp32)
