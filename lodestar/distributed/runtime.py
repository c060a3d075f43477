"""Rank, world size and device of this process, and the process group.

The only file that reads the launcher's environment: torchrun, deepspeed, srun, or none of them. Loads without torch, so
that errors in a recipe are printed at once, by one rank.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from lodestar.distributed.launcher import stop_without_launcher
from lodestar.distributed.rendezvous import meet, require_address
from lodestar.errors import LaunchError

if TYPE_CHECKING:
    import torch
    from torch import distributed as dist

_LAUNCHERS = {
    "torchrun or deepspeed": ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    "srun": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
}

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # from malloc.h


@dataclass(frozen=True)
class Placement:
    """Rank of this process among `world_size`, and among those of its node."""

    rank: int
    world_size: int
    local_rank: int
    located: Callable[[str], str] = str
    """An error's text with the place in the recipe of the key with which it begins, for what other ranks print."""

    @classmethod
    def from_env(cls, env: Mapping[str, str] = os.environ) -> Placement:
        """From RANK, WORLD_SIZE, LOCAL_RANK (torchrun, deepspeed) or srun's variables; without them a single process.

        Raises LaunchError where a launcher's variables are incomplete or contradict each other.
        """
        for launcher, names in _LAUNCHERS.items():
            absent = [name for name in names if name not in env]
            if launcher == "srun" and "SLURM_STEP_ID" not in env:
                continue  # in a batch script SLURM's variables describe the job, not this process
            if not absent:
                return cls._checked(env, *names)
            if len(absent) < len(names):
                raise LaunchError(
                    f"environment: {', '.join(absent)}: not set (start under {launcher}, or unset the rest)"
                )
        return cls(rank=0, world_size=1, local_rank=0)

    @classmethod
    def _checked(cls, env: Mapping[str, str], rank: str, world_size: str, local_rank: str) -> Placement:
        """From the variables of these names."""
        size = _number(env, world_size, least=1)
        return cls(_number(env, rank, below=size), size, _number(env, local_rank, below=size))

    def address(self, env: Mapping[str, str] = os.environ) -> tuple[str, int]:
        """Host and port of the store at which ranks meet; LaunchError where they cannot meet there."""
        host = env.get("MASTER_ADDR") or env.get("SLURM_LAUNCH_NODE_IPADDR")
        # One process of each node prints, as each may have an environment of its own.
        prints = self.rank == 0 or self.local_rank == 0
        try:
            if host is None:
                raise LaunchError(
                    "environment: MASTER_ADDR: not set (export the first node's address, and MASTER_PORT)"
                )
            job = env.get("SLURM_JOB_ID", "0")
            port = env.get("MASTER_PORT") or str(29500 + (int(job) if job.isdigit() else 0) % 1000)
            return host, require_address(host, port, serves=self.rank == 0 and not _launcher_serves(env))
        except LaunchError as error:
            error.print_on_this_rank = prints
            raise

    def prepare(self) -> None:
        """Before torch is loaded: LaunchError where ranks cannot meet; and end with the launcher from here on."""
        stop_without_launcher(started_by_launcher="TORCHELASTIC_RUN_ID" in os.environ or "CROSS_SIZE" in os.environ)
        if not self.is_alone():
            self.address()

    def is_alone(self, env: Mapping[str, str] = os.environ) -> bool:
        """Whether no other process needs to find this one, a launcher's included."""
        return self.world_size == 1 and not _launcher_serves(env)


def _number(env: Mapping[str, str], name: str, *, least: int = 0, below: int = 10**6) -> int:
    text = env[name].strip()
    if text.isascii() and text.isdigit() and least <= int(text[:9]) < below:
        return int(text)
    limits = f"from {least} to {below - 1}" if below < 10**6 else f"of at least {least}"
    problem = f"environment: {name}: {text[:40]!r} is not a number {limits}"
    raise LaunchError(f"{problem} (start under torchrun, deepspeed or srun, or unset it)")


def _launcher_serves(env: Mapping[str, str]) -> bool:
    """Whether torchrun has the store, not rank 0."""
    return env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


@dataclass(frozen=True)
class Runtime:
    """A process that has joined its group: rank, world size and device."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes and prints."""
        return self.rank == 0

    def own_devices(self) -> list[str]:
        """This rank's part of the GPUs of its node, for work without collectives; the CPU where there are none."""
        import torch

        if self.device.type != "cuda":
            return ["cpu"]
        num_gpus = torch.cuda.device_count()
        num_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1 if self.world_size == 1 else num_gpus))
        return [f"cuda:{i}" for i in range(self.local_rank, num_gpus, num_ranks)]

    def multiplies_bf16(self) -> bool:
        """Whether this device has units for bf16 matrix products; a CPU without them emulates them, far slower."""
        import torch

        if self.device.type != "cpu":
            return True
        has_units = any(value and "bf16" in name for name, value in torch.cpu.get_capabilities().items())
        return has_units and torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()

    def memory_bytes(self) -> int:
        """Memory of this rank's device; without a GPU, the machine's memory divided by the world size."""
        import torch

        if self.device.type == "cuda":
            return torch.cuda.get_device_properties(self.device).total_memory
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // self.world_size


def choose_device(local_rank: int) -> torch.device:
    """The GPU of this rank, or the CPU; LaunchError where a node has more processes than GPUs."""
    import torch

    if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu":
        num_processes, num_gpus = int(os.environ.get("LOCAL_WORLD_SIZE", local_rank + 1)), torch.cuda.device_count()
        if num_processes > num_gpus:
            raise LaunchError(
                f"environment: {num_processes} processes on a node with {num_gpus} visible GPUs (start one per GPU)",
                # Without LOCAL_WORLD_SIZE only the ranks without a GPU know: the first of them prints.
                print_on_this_rank=local_rank == num_gpus,
            )
        return torch.device("cuda", local_rank)
    return torch.device("cpu")


@contextmanager
def joined(placement: Placement, *, timeout_minutes: float = 30.0, init_method: str | None = None) -> Iterator[Runtime]:
    """Join the process group on this rank's device, and leave it at the end, also after an error.

    A single process has a group too, because DeepSpeed needs one.
    """
    import torch
    import torch.distributed as dist

    device = choose_device(placement.local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        # Without it DeepSpeed, which accelerate imports to save a model, warns.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        keep_pages()
        if placement.world_size > 1 and "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // placement.world_size))  # else ranks compete for cores
    torch.set_flush_denormal(True)  # softmax gradients have many denormals, which make products on CPUs 60 times slower
    _complete_environment(placement)
    timeout = timedelta(minutes=timeout_minutes)
    with _interruptible(placement):
        dist.init_process_group(
            # gloo beside NCCL is for the few numbers on the CPU
            backend="cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            rank=placement.rank,
            world_size=placement.world_size,
            timeout=timeout,
            init_method=init_method,
            store=None if init_method else _store(placement, timeout),
        )
    try:
        yield Runtime(placement.rank, placement.world_size, placement.local_rank, device)
    finally:
        dist.destroy_process_group()


def prepare_deepspeed() -> None:
    """Keep DeepSpeed from compiling for a CPU; call it in a process group, before DeepSpeed is imported.

    Its CPU backend would compile a shared-memory op at start (25 to 150 s; it fails without a compiler), and its Muon
    compiles kernels at import. Both have equivalents that need no compiler.
    """
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
        import deepspeed.ops

        # All that DeepSpeed looks up; to fill it itself, it would run the compiler at each start.
        deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}  # type: ignore[attr-defined]


def keep_pages() -> None:
    """Keep the pages of large tensors that are freed, for those that follow; the process never gets smaller.

    glibc gives them back to the kernel, and each step would wait for all of them again, a page fault for 4 KiB.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def own_address() -> str:
    """This host's address, as the first node sees it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp_socket:
        try:
            udp_socket.connect((os.environ.get("MASTER_ADDR", "127.0.0.1"), 9))  # sends nothing
            return udp_socket.getsockname()[0]
        except OSError:
            return "127.0.0.1"


def quiet_libraries() -> None:
    """Silence warnings of torch's C++ code, which Python's filters do not reach; call it before torch is imported."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def local_environment() -> Mapping[str, str]:
    """The environment, for callers that pass parts of it to a library."""
    return os.environ


def _complete_environment(placement: Placement) -> None:
    """Set the names that libraries read themselves, where the launcher has not: under srun, or without one."""
    values = {"RANK": placement.rank, "WORLD_SIZE": placement.world_size, "LOCAL_RANK": placement.local_rank}
    for name, value in values.items():
        os.environ.setdefault(name, str(value))


def _store(placement: Placement, timeout: timedelta) -> dist.Store:
    """The store of a process group whose ranks have all come; LaunchError where they do not."""
    from torch.distributed import HashStore

    if placement.is_alone():
        return HashStore()
    host, port = placement.address()
    os.environ.setdefault("MASTER_ADDR", host)
    os.environ.setdefault("MASTER_PORT", str(port))
    try:
        return meet(
            host,
            port,
            rank=placement.rank,
            world_size=placement.world_size,
            serves=placement.rank == 0 and not _launcher_serves(os.environ),
            attempt=os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"),
            timeout_seconds=timeout.total_seconds(),
        )
    except LaunchError as error:
        error.print_on_this_rank = placement.rank == 0 or placement.local_rank == 0
        raise


@contextmanager
def _interruptible(placement: Placement) -> Iterator[None]:
    """Ctrl-C ends a process that waits for others inside of a library, where Python would not see it."""
    if placement.world_size == 1 or threading.current_thread() is not threading.main_thread():
        yield
        return
    previous_handler = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous_handler)
