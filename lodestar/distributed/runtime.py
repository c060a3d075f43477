"""Who this process is among how many, and the opening and closing of the process group.

The only file that reads the launcher's environment: torchrun, deepspeed, srun, or none of them. Loads without torch,
so that mistakes in a recipe are told at once and by one rank alone.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from lodestar.errors import ConfigError, LaunchError

if TYPE_CHECKING:
    import torch

_LAUNCHERS = {
    "torchrun or deepspeed": ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    "srun": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
}


@dataclass(frozen=True)
class Placement:
    """This process's place: `rank` of `world_size`, the `local_rank`-th of its node."""

    rank: int
    world_size: int
    local_rank: int

    @classmethod
    def from_env(cls, env: Mapping[str, str] = os.environ) -> Placement:
        """torchrun and deepspeed set RANK, WORLD_SIZE, LOCAL_RANK; srun SLURM_PROCID, ...; with none we are alone."""
        for launcher, names in _LAUNCHERS.items():
            absent = [name for name in names if name not in env]
            if launcher == "srun" and "SLURM_STEP_ID" not in env:
                continue  # inside a batch script SLURM's variables describe the job, not this process
            if not absent:
                return cls(*(int(env[name]) for name in names))
            if len(absent) < len(names):
                raise LaunchError(
                    f"environment: {', '.join(absent)}: not set (start under {launcher}, or unset the rest)"
                )
        return cls(rank=0, world_size=1, local_rank=0)


@dataclass(frozen=True)
class Runtime:
    """A process that has joined its group; every value the rest of the program needs to know of its surroundings."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def own_devices(self) -> list[str]:
        """This rank's part of the GPUs of its node, for work that needs no group; the CPU where there are none."""
        import torch

        if self.device.type != "cuda":
            return ["cpu"]
        step = int(os.environ.get("LOCAL_WORLD_SIZE", 1 if self.world_size == 1 else torch.cuda.device_count()))
        return [f"cuda:{i}" for i in range(self.local_rank, torch.cuda.device_count(), step)]

    def multiplies_bf16(self) -> bool:
        """Whether this device has units for bf16 matrix products; a CPU without them emulates each, far slower."""
        import torch

        if self.device.type != "cpu":
            return True
        has_units = any(on and "bf16" in name for name, on in torch.cpu.get_capabilities().items())
        return has_units and torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()

    def memory_bytes(self) -> int:
        """Of this rank's device; without a GPU, this rank's share of the machine's."""
        import torch

        if self.device.type == "cuda":
            return torch.cuda.get_device_properties(self.device).total_memory
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // self.world_size


def choose_device(local_rank: int) -> torch.device:
    import torch

    if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu":
        here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", local_rank + 1)), torch.cuda.device_count()
        if here > gpus:
            raise LaunchError(
                f"environment: {here} processes on a node that shows {gpus} GPUs (start as many as there are GPUs)",
                print_on_this_rank=local_rank
                == gpus,  # where the launcher sets no LOCAL_WORLD_SIZE, only those beyond know it
            )
        return torch.device("cuda", local_rank)
    return torch.device("cpu")


def check_device(name: str, field: str) -> None:
    """ConfigError for a device that torch or this machine does not have."""
    import torch

    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"{field}: {name!r}: unknown kind of device (write cuda:0 or cpu)") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"{field}: {name}: this machine has {torch.cuda.device_count()} GPUs (name one of them)")


@contextmanager
def joined(placement: Placement, *, timeout_minutes: float = 30.0, init_method: str | None = None) -> Iterator[Runtime]:
    """Open the process group on this rank's device, and close it at the end whatever happens.

    A group is opened for a single process too, because DeepSpeed asks for one.
    """
    import torch
    import torch.distributed as dist

    device = choose_device(placement.local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    elif placement.world_size > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // placement.world_size))  # else ranks fight over cores
    torch.set_flush_denormal(True)  # sharp softmax gradients are full of denormals: 60 times slower products on CPUs
    _complete_environment(placement)
    dist.init_process_group(
        # gloo beside NCCL carries the few numbers that ranks agree on
        backend="cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        rank=placement.rank,
        world_size=placement.world_size,
        timeout=timedelta(minutes=timeout_minutes),
        init_method=init_method or _rendezvous(placement),
    )
    try:
        yield Runtime(placement.rank, placement.world_size, placement.local_rank, device)
    finally:
        dist.destroy_process_group()


def prepare_deepspeed() -> None:
    """Before DeepSpeed is imported on a machine without a GPU: no compiler, no MPI.

    Its CPU backend would compile a shared-memory op at start (25 to 150 s, and fails where there is no compiler), and
    its Muon compiles kernels at import; both have plain equivalents.
    """
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def own_address() -> str:
    """This host's address as the first node would see it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((os.environ.get("MASTER_ADDR", "127.0.0.1"), 9))  # sends nothing
            return probe.getsockname()[0]
        except OSError:
            return "127.0.0.1"


def quiet_libraries() -> None:
    """Before torch is imported: no warnings of its C++ side, which no filter of Python's reaches."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def local_environment() -> Mapping[str, str]:
    """The environment, for those few callers that hand parts of it to a library."""
    return os.environ


def _complete_environment(placement: Placement) -> None:
    """Libraries look for these names themselves; under srun or alone nobody has set them."""
    ours = {"RANK": placement.rank, "WORLD_SIZE": placement.world_size, "LOCAL_RANK": placement.local_rank}
    for name, value in ours.items():
        os.environ.setdefault(name, str(value))


def _rendezvous(placement: Placement) -> str:
    """Where the ranks of this run meet."""
    if placement.world_size == 1:
        return "tcp://127.0.0.1:0"  # a single process meets nobody, and a port of its own is never taken
    host = os.environ.get("MASTER_ADDR") or os.environ.get("SLURM_LAUNCH_NODE_IPADDR")
    if host is None:
        raise LaunchError("environment: MASTER_ADDR: not set (export the first node's address, and MASTER_PORT)")
    port = os.environ.get("MASTER_PORT") or str(29500 + int(os.environ.get("SLURM_JOB_ID", "0")) % 1000)
    os.environ.setdefault("MASTER_ADDR", host)
    os.environ.setdefault("MASTER_PORT", port)
    return "env://"
