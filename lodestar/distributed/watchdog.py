"""Who is still there: ranks that were lost are named, by the collective that fails or, where none does, by a heartbeat.

A watchdog of our own, because limits on collectives do not reach the groups that DeepSpeed makes.
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


class Peer(NamedTuple):
    rank: int
    host: str
    address: str
    port: int

    def answers(self) -> bool:
        """Whether its process runs, and the way to its host is open."""
        try:
            with socket.create_connection((self.address, self.port), timeout=PATIENCE_SECONDS) as asked:
                return asked.recv(1) == b"."
        except OSError:
            return False


@contextmanager
def watchdog(runtime: Runtime, timeout_minutes: float) -> Iterator[None]:
    """Ends this process with one line that names the ranks that are gone, as soon as a collective inside fails, or when
    a neighbour has not answered for so long."""
    if runtime.world_size == 1:
        yield
        return
    with socket.create_server(("", 0), backlog=runtime.world_size) as here:
        peers = gather_objects(Peer(runtime.rank, socket.gethostname(), own_address(), here.getsockname()[1]))
        done = threading.Event()
        threading.Thread(target=_answer_heartbeats, args=(here, done), daemon=True).start()
        heard = all(gather_objects(peers[(runtime.rank + 1) % len(peers)].answers()))
        if heard:  # else a firewall lies between them: nothing can be told
            limit = 60 * timeout_minutes
            threading.Thread(target=_check_neighbour, args=(peers, runtime.rank, done, limit), daemon=True).start()
        try:
            yield
        except RuntimeError as error:
            if not is_broken(error):
                raise
            raise _lost(peers if heard else peers[runtime.rank : runtime.rank + 1], runtime.rank) from error
        finally:
            done.set()


def _answer_heartbeats(here: socket.socket, done: threading.Event) -> None:
    """Say that this process runs; the kernel alone would take calls for one that was stopped."""
    while not done.is_set():
        with suppress(OSError), here.accept()[0] as asked:
            asked.sendall(b".")


def _check_neighbour(peers: list[Peer], rank: int, done: threading.Event, limit: float) -> None:
    """Ask the next rank now and then; a chain of neighbours covers all of them."""
    neighbour = peers[(rank + 1) % len(peers)]
    heard = time.monotonic()
    while not done.wait(min(60.0, limit / 3)):
        if neighbour.answers():
            heard = time.monotonic()
        elif time.monotonic() - heard > limit and not done.wait(PATIENCE_SECONDS) and not neighbour.answers():
            # the collective had the time to tell it itself
            error = _lost(peers, rank)
            if error.print_on_this_rank:
                print(f"error: {error}", file=sys.stderr, flush=True)
            os._exit(error.exit_code)


def _lost(peers: list[Peer], rank: int) -> PeerLostError:
    """By those of `peers` that can be asked."""
    with ThreadPoolExecutor(32) as pool:
        there = list(pool.map(lambda peer: peer.rank == rank or peer.answers(), peers))
    me = next(peer for peer in peers if peer.rank == rank)
    here = [peer for peer, answers in zip(peers, there, strict=True) if answers]
    gone = [f"{peer.rank} ({peer.host}, {peer.address})" for peer in peers if peer not in here]
    unknown = "all ranks answer" if len(peers) > 1 else "ranks cannot be asked through a firewall"
    what = f"lost rank{'s' * (len(gone) > 1)} {', '.join(gone)}" if gone else f"a collective failed, but {unknown}"
    return PeerLostError(
        f"rank {rank} ({me.host}, {me.address}): {what} (see what ended there; the same command goes on)",
        print_on_this_rank=rank == min(peer.rank for peer in here if peer.address == me.address),
    )
