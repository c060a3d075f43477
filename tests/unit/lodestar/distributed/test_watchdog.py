"""Which ranks are named as lost."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest

from lodestar.distributed.watchdog import Peer, _answer_heartbeats, _lost


@pytest.fixture
def answering() -> Iterator[int]:
    """A port at which a rank answers heartbeats."""
    done = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=_answer_heartbeats, args=(server, done), daemon=True).start()
        yield server.getsockname()[1]
        done.set()


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def peer(rank: int, port: int) -> Peer:
    return Peer(rank, "here", "127.0.0.1", port)


def test_only_those_that_do_not_answer_are_named(answering: int):
    ranks = [peer(0, closed_port()), peer(1, answering), peer(2, answering), peer(3, closed_port())]
    error = _lost(ranks, 2)
    assert "rank 2 (here, 127.0.0.1): lost ranks 0 (here, 127.0.0.1), 3 (here" in str(error)
    assert error.print_on_this_rank is False and _lost(ranks, 1).print_on_this_rank is True  # once on each host
    assert "all ranks answer" in str(_lost(ranks[1:3], 1))


def test_no_rank_is_named_where_none_can_be_asked():
    error = _lost([peer(3, closed_port())], 3)
    assert "lost" not in str(error) and "firewall" in str(error) and error.print_on_this_rank is True
