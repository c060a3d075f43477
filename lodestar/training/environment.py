"""What a run ran on, for environment.json."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from lodestar.distributed.runtime import Runtime
from lodestar.distributed.session import versions
from lodestar.secrets import hidden_arguments


def environment(runtime: Runtime, output_dir: str) -> dict[str, Any]:
    """Versions, hardware, world size and commit, to reproduce the run."""
    packages = ("torch", "transformers", "deepspeed", "datasets", "accelerate", "sentence-transformers", "tokenizers")
    device = torch.cuda.get_device_name(runtime.device) if runtime.device.type == "cuda" else platform.processor()
    return {
        "python": platform.python_version(),
        "packages": versions(packages),
        "platform": platform.platform(),
        "device": device or platform.machine(),
        "world_size": runtime.world_size,
        "threads": torch.get_num_threads(),
        "git_commit": _commit(),
        "command": hidden_arguments(sys.argv),
        "output_dir": output_dir,
    }


def _commit() -> str | None:
    folder = Path(__file__).resolve().parent
    try:
        process = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return process.stdout.strip()
