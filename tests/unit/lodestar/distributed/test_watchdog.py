"""Who is named when ranks are lost, and who is not."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest

from lodestar.distributed.watchdog import Peer, _answer_heartbeats, _lost


@pytest.fixture
def answering() -> Iterator[int]:
    """A port at which a rank says that it is there."""
    done = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as here:
        threading.Thread(target=_answer_heartbeats, args=(here, done), daemon=True).start()
        yield here.getsockname()[1]
        done.set()


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as here:
        return here.getsockname()[1]


def peer(rank: int, port: int) -> Peer:
    return Peer(rank, "here", "127.0.0.1", port)


def test_only_those_that_do_not_answer_are_named(answering: int):
    ranks = [peer(0, closed_port()), peer(1, answering), peer(2, answering), peer(3, closed_port())]
    found = _lost(ranks, 2)
    assert "rank 2 (here, 127.0.0.1): lost ranks 0 (here, 127.0.0.1), 3 (here" in str(found)
    assert found.print_on_this_rank is False and _lost(ranks, 1).print_on_this_rank is True  # once on each host
    assert "all ranks answer" in str(_lost(ranks[1:3], 1))


def test_nobody_is_accused_where_nobody_can_be_asked():
    found = _lost([peer(3, closed_port())], 3)
    assert "lost" not in str(found) and "firewall" in str(found) and found.print_on_this_rank is True
