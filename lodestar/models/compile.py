"""Compiling the layers of an encoder, one by one, for texts of any length. Loads without torch."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING

from lodestar.errors import ConfigError

if TYPE_CHECKING:
    from torch import device, nn


def check_compiler() -> None:
    """ConfigError where torch would find no C++ compiler, without which it compiles nothing for a CPU."""
    names = (os.environ.get("CXX") or "g++", "g++", "clang++")
    if not any(shutil.which(name) for name in names):
        raise ConfigError(
            "model.compile: a CPU needs a C++ compiler, and none was found (install g++, or set it to false)"
        )


def compile_layers(encoder: nn.Module, device: device) -> None:
    """Compile each layer of a transformers encoder in place, for batches of any size and length; names stay.

    The first calls take a minute or more. Raises ConfigError on a CPU without a compiler.
    """
    import torch

    if device.type == "cpu":
        check_compiler()
    # Compiled apart are: with and without gradients, training or not, one text or many, and each kind of layer.
    torch._dynamo.config.recompile_limit = 64
    for layer in layers_of(encoder):
        layer.compile(dynamic=True)


def layers_of(encoder: nn.Module) -> nn.ModuleList:
    """The transformer layers: of all lists of modules the one with most parameters."""
    from torch import nn

    lists = [module for module in encoder.modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise ConfigError(f"model.compile: {type(encoder).__name__} has no list of layers (set it to false)")
    return max(lists, key=lambda layers: sum(parameter.numel() for parameter in layers.parameters()))
