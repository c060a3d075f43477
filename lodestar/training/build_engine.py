"""The engine that a recipe names."""

from __future__ import annotations

from torch import nn

from lodestar.config.schema import EngineConfig, OptimConfig, Precision
from lodestar.devices import set_tf32
from lodestar.distributed.collectives import gather_objects
from lodestar.distributed.runtime import Runtime
from lodestar.errors import ConfigError
from lodestar.training.ddp import DdpEngine
from lodestar.training.engine import Engine
from lodestar.training.zero import ZeroEngine


def build(
    module: nn.Module, runtime: Runtime, engine: EngineConfig, optim: OptimConfig, precision: Precision
) -> Engine:
    """The engine of the recipe around `module`, which has its initial weights; ConfigError for fp16 on a CPU."""
    if precision == "fp16" and runtime.device.type == "cpu":
        raise ConfigError("precision: fp16 needs a GPU (use fp32 or bf16 here)")
    module.to(runtime.device)
    set_tf32(precision == "tf32")  # here, because a backward runs outside the forward's autocast
    # All ranks or none: updates that differ by bf16's rounding would make the weights of ranks diverge.
    muon_fp32 = optim.name == "muon" and not all(gather_objects(runtime.multiplies_bf16()))
    if engine.kind == "ddp":
        return DdpEngine(module, runtime, optim, precision, muon_fp32)
    return ZeroEngine(module, runtime, engine, optim, precision, muon_fp32)
