"""Who is still there: when a collective fails, the ranks that were lost are named."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple

from chassis.collectives import gather_objects, is_broken
from chassis.errors import PeerLostError
from chassis.runtime import Runtime, own_address

PATIENCE_SECONDS = 5.0


class Peer(NamedTuple):
    rank: int
    host: str
    address: str
    port: int

    def answers(self) -> bool:
        """Whether its process, and the way to its host, are there."""
        try:
            socket.create_connection((self.address, self.port), timeout=PATIENCE_SECONDS).close()
        except OSError:
            return False
        return True


@contextmanager
def roll_call(runtime: Runtime) -> Iterator[None]:
    """Turns the failure of a collective inside into one line that names the ranks that do not answer any more."""
    if runtime.world_size == 1:
        yield
        return
    # The kernel answers for a process that is busy, and stops when it ends.
    with socket.create_server(("", 0), backlog=runtime.world_size) as here:
        peers = gather_objects(Peer(runtime.rank, socket.gethostname(), own_address(), here.getsockname()[1]))
        try:
            yield
        except RuntimeError as error:
            if not is_broken(error):
                raise
            raise _lost(peers, runtime.rank) from error


def _lost(peers: list[Peer], rank: int) -> PeerLostError:
    with ThreadPoolExecutor(32) as pool:
        there = list(pool.map(lambda peer: peer.rank == rank or peer.answers(), peers))
    me, here = peers[rank], [peer for peer, answers in zip(peers, there, strict=True) if answers]
    gone = [f"{peer.rank} ({peer.host}, {peer.address})" for peer in peers if peer not in here]
    what = (
        f"lost rank{'s' * (len(gone) > 1)} {', '.join(gone)}" if gone else "a collective failed, but all ranks answer"
    )
    return PeerLostError(
        f"rank {rank} ({me.host}, {me.address}): {what} (see what ended there; the same command goes on)",
        first_here=rank == min(peer.rank for peer in here if peer.address == me.address),
    )
