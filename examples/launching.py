"""How the demos run Lodestar's commands: under launchers, on this terminal, stopped in good order by Ctrl-C."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from lodestar.errors import LodestarError

RANKS = 2
STOPPED = 3
"""Exit code of a training run that was asked to stop, after it has saved a checkpoint."""
ENVIRONMENT = {
    "DS_ACCELERATOR": "cpu",
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",  # nothing is downloaded
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",  # of reading a file of 4 MB
    "TRANSFORMERS_VERBOSITY": "error",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",  # processes tokenize side by side already
    # Keep the pages of large tensors also where a command joins no group, as search.
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 34),
}


class CommandFailed(LodestarError):
    """A command of a demo failed, and has said why."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def deepspeed(command: str, *arguments: str) -> list[str]:
    """A command of launch/ under deepspeed; a port of its own, because deepspeed's default one may be taken."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [beside_python("deepspeed"), "--num_accelerators", str(RANKS), "--master_port", str(port)]
    return [*launcher, "--log_level", "error", f"launch/{command}.py", *arguments]


def torchrun(command: str, *arguments: str) -> list[str]:
    launcher = [beside_python("torchrun"), "--standalone", "--nproc-per-node", str(RANKS)]
    return [*launcher, f"launch/{command}.py", *arguments]


def beside_python(program: str) -> str:
    """This environment's program, also where the environment is not activated."""
    return os.path.relpath(Path(sys.executable).with_name(program))


def python() -> str:
    return os.path.relpath(sys.executable) if Path(sys.executable).is_relative_to(Path.cwd()) else "python"


def call(command: Sequence[str], what: str) -> None:
    """Run to the end on this terminal; raises CommandFailed, or KeyboardInterrupt once it has stopped in good order.

    The command gets a session of its own: Ctrl-C must reach the ranks, which save and stop, and not their launcher,
    which would kill them.
    """
    print("$", shlex.join(python() if part == sys.executable else part for part in command), flush=True)
    process = subprocess.Popen(command, env=os.environ | ENVIRONMENT, start_new_session=True)
    interrupted = False
    while True:
        try:
            code = process.wait()
            break
        except KeyboardInterrupt:
            if interrupted:
                os.killpg(process.pid, signal.SIGKILL)  # asked twice
            else:
                stop(process.pid)
            interrupted = True
    if interrupted or code == STOPPED:
        raise KeyboardInterrupt
    if code:
        raise CommandFailed(f"{what} failed with exit code {code} (its last lines above say why)", code)


def stop(process_id: int) -> None:
    """SIGTERM to the ranks below a launcher, that is to the first processes with a RANK; else to all of the session."""
    import psutil

    children = psutil.Process(process_id).children(recursive=True)
    placed = {child.pid: child for child in children if "RANK" in child.environ()}
    ranks = [child for child in placed.values() if child.ppid() not in placed]
    if not ranks:
        os.killpg(process_id, signal.SIGTERM)
    for rank in ranks:
        rank.terminate()
