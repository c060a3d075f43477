"""The watchdog: ends a run whose ranks were lost, and names them, when a collective fails or a heartbeat stops.

It exists because time-outs of collectives do not apply to the groups that DeepSpeed makes.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import NamedTuple

from lodestar.distributed.collectives import gather_objects, is_broken
from lodestar.distributed.runtime import Runtime, own_address
from lodestar.errors import PeerLostError

PATIENCE_SECONDS = 5.0
"""Time-out of one heartbeat."""


class Peer(NamedTuple):
    """A rank, and where it answers heartbeats."""

    rank: int
    host: str
    address: str
    port: int

    def answers(self) -> bool:
        """Whether its process runs and its host can be reached."""
        try:
            with socket.create_connection((self.address, self.port), timeout=PATIENCE_SECONDS) as connection:
                return connection.recv(1) == b"."
        except OSError:
            return False


@contextmanager
def watchdog(runtime: Runtime, timeout_minutes: float) -> Iterator[None]:
    """Ends this process with one line that names the lost ranks, when a collective inside fails or the next rank has
    not answered for `timeout_minutes`.

    Raises PeerLostError for a failed collective; a heartbeat that stops ends the process at once.
    """
    if runtime.world_size == 1:
        yield
        return
    with socket.create_server(("", 0), backlog=runtime.world_size) as server:
        peers = gather_objects(Peer(runtime.rank, socket.gethostname(), own_address(), server.getsockname()[1]))
        done = threading.Event()
        threading.Thread(target=_answer_heartbeats, args=(server, done), daemon=True).start()
        all_answer = all(gather_objects(peers[(runtime.rank + 1) % len(peers)].answers()))
        if all_answer:  # else a firewall blocks heartbeats
            limit = 60 * timeout_minutes
            threading.Thread(target=_check_neighbour, args=(peers, runtime.rank, done, limit), daemon=True).start()
        try:
            yield
        except RuntimeError as error:
            if not is_broken(error):
                raise
            raise _lost(peers if all_answer else peers[runtime.rank : runtime.rank + 1], runtime.rank) from error
        finally:
            done.set()


def _answer_heartbeats(server: socket.socket, done: threading.Event) -> None:
    """Answer with a byte: the kernel alone accepts connections for a stopped process too."""
    while not done.is_set():
        with suppress(OSError), server.accept()[0] as connection:
            connection.sendall(b".")


def _check_neighbour(peers: list[Peer], rank: int, done: threading.Event, limit: float) -> None:
    """Ask the next rank from time to time; as each rank does, all ranks are checked."""
    neighbour = peers[(rank + 1) % len(peers)]
    last_answer = time.monotonic()
    while not done.wait(min(60.0, limit / 3)):
        if neighbour.answers():
            last_answer = time.monotonic()
        elif time.monotonic() - last_answer > limit and not done.wait(PATIENCE_SECONDS) and not neighbour.answers():
            # in those seconds a failing collective would have ended this process
            error = _lost(peers, rank)
            if error.print_on_this_rank:
                print(f"error: {error}", file=sys.stderr, flush=True)
            os._exit(error.exit_code)


def _lost(peers: list[Peer], rank: int) -> PeerLostError:
    """The error of `rank` that names those of `peers` that do not answer."""
    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(lambda peer: peer.rank == rank or peer.answers(), peers))
    this = next(peer for peer in peers if peer.rank == rank)
    alive = [peer for peer, answer in zip(peers, answers, strict=True) if answer]
    lost = [f"{peer.rank} ({peer.host}, {peer.address})" for peer in peers if peer not in alive]
    unknown = "all ranks answer" if len(peers) > 1 else "a firewall blocks heartbeats"
    what = f"lost rank{'s' * (len(lost) > 1)} {', '.join(lost)}" if lost else f"a collective failed, but {unknown}"
    return PeerLostError(
        f"rank {rank} ({this.host}, {this.address}): {what} (see why it ended there; the same command resumes the run)",
        print_on_this_rank=rank == min(peer.rank for peer in alive if peer.address == this.address),
    )
