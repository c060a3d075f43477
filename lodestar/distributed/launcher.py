"""What a rank does when its launcher, or what reads its output, is gone."""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

POLL_SECONDS = 1.0
_PROGRAMS = {"torchrun", "deepspeed", "accelerate"}
_MODULES = {
    "torch.distributed.run",
    "torch.distributed.launch",
    "deepspeed.launcher.launch",
    "deepspeed.launcher.runner",
}


def stop_without_launcher(*, started_by_launcher: bool) -> None:
    """From now on this process gets SIGTERM once its launcher has ended, so that it saves and stops as if told to.

    A launcher that is killed, or ended by a signal that it does not handle, leaves its ranks: they would train on,
    and the job that is started again would find the run folder in use.

    started_by_launcher   says the environment, also where the launcher ended before this call
    """
    launchers = _launchers()
    orphaned = started_by_launcher and (_parent_is_init(launchers[-1]) if launchers else os.getppid() == 1)
    if launchers or orphaned:
        threading.Thread(target=_watch, args=(launchers, orphaned), daemon=True).start()


def _launchers() -> list[psutil.Process]:
    """The ancestors of this process up to the outermost launcher: deepspeed has one more on each node."""
    ancestors = psutil.Process().parents()
    positions = [i for i, process in enumerate(ancestors) if _is_launcher(process)]
    return ancestors[: positions[-1] + 1] if positions else []


def _is_launcher(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        words = process.cmdline()[:4]  # python, its options, the launcher; what follows is the user's
        return any(Path(word).name in _PROGRAMS or word in _MODULES for word in words)
    return False


def _parent_is_init(launcher: psutil.Process) -> bool:
    """Whether this is the launcher that deepspeed starts on each node, without the one that started it."""
    with suppress(psutil.Error):
        return "deepspeed.launcher.launch" in launcher.cmdline()[:4] and launcher.ppid() == 1
    return True


def _watch(launchers: list[psutil.Process], orphaned: bool) -> None:
    while not orphaned:
        time.sleep(POLL_SECONDS)
        orphaned = not all(_runs(launcher) for launcher in launchers)
    os.kill(os.getpid(), signal.SIGTERM)


def _runs(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


class LastingOutput:
    """A standard stream whose lines go nowhere once what reads them is gone.

    Ctrl-C ends `tee` of `torchrun ... | tee log` too: a rank must not fail at its next line, before it has saved.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, action: Callable[[], object]) -> None:
        try:
            action()
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):  # EIO: the terminal is gone
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


@contextmanager
def lasting_output() -> Iterator[None]:
    """What is printed inside may lose its reader."""
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (LastingOutput(stream) for stream in streams)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = streams
