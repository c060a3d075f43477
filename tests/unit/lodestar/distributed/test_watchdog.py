"""What ranks say of themselves, and which are named as lost or late."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from lodestar.distributed import watchdog
from lodestar.distributed.watchdog import COMPUTING, LOADING, SAVING, Peer, _explain, _Watch

TOKEN = "0123456789abcdef"


def peer(rank: int, port: int, host: str = "here") -> Peer:
    return Peer(rank, host, "127.0.0.1", port, os.getpid(), 0.0, TOKEN)


@pytest.fixture
def answering() -> Iterator[Peer]:
    """A rank that answers heartbeats, after step 3."""
    watchdog.enter(SAVING, 3)
    with socket.create_server(("127.0.0.1", 0)) as server:
        this = peer(0, server.getsockname()[1])
        watch = _Watch([this, peer(1, 1)], 0, 60.0, None)
        threading.Thread(target=watch.answer, args=(server,), daemon=True).start()
        yield this


def test_a_rank_says_its_step_and_phase_to_those_who_know_its_token(answering: Peer) -> None:
    answer = answering.ask()
    assert answer is not None and answer["at"] == f"step 3, {SAVING}" and answer["step"] == 3
    for text in (b"", b"?\n", b"[]\n", json.dumps({"token": "x", "end": {}}).encode() + b"\n"):
        with socket.create_connection((answering.address, answering.port)) as connection:
            connection.sendall(text)
            connection.shutdown(socket.SHUT_WR)
            assert connection.recv(99) == b""
    assert answering.ask() is not None and answering.hangs()
    with socket.create_server(("127.0.0.1", 0)) as server:
        closed = peer(1, server.getsockname()[1])
        assert closed.ask() is None and closed.hangs()  # it accepts, as a stopped process does
    assert closed.ask() is None and not closed.hangs()


def at(step: int, phase: str, next_rank: str | None = None) -> dict[str, object]:
    return {"at": f"step {step}, {phase}", "step": step, "next": next_rank}


def test_the_error_names_lost_ranks_with_what_the_rank_before_saw() -> None:
    ranks = [peer(rank, 1, f"node{rank // 2}") for rank in range(4)]
    answers = [None, at(7, COMPUTING), at(7, COMPUTING, f"step 7, {LOADING}"), None]
    told = _explain(ranks[2], dict(zip(ranks, answers, strict=True)), None)
    lost = "0 (node0, 127.0.0.1), 3 (node1, 127.0.0.1; last seen at step 7, loading the batch)"
    assert told.startswith(f"rank 2 (node1, 127.0.0.1): lost ranks {lost} (see why")
    assert told.endswith("the same command resumes the run)")


def test_the_error_names_ranks_that_are_behind() -> None:
    ranks = [peer(0, 1), peer(1, 1)]
    told = _explain(ranks[0], {ranks[0]: at(7, COMPUTING), ranks[1]: at(7, LOADING)}, Path("run/stacks"))
    assert "rank 1 (here, 127.0.0.1) hangs at step 7, loading the batch (stacks of the ranks are in run/stacks;" in told
    told = _explain(ranks[0], {ranks[0]: at(7, COMPUTING), ranks[1]: at(6, COMPUTING)}, None)
    assert "rank 1 (here, 127.0.0.1) hangs at step 6, forward and backward" in told
    told = _explain(ranks[0], {ranks[0]: at(7, COMPUTING), ranks[1]: at(7, COMPUTING)}, None)
    assert "a collective failed at step 7, forward and backward, but all ranks answer" in told
