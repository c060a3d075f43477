"""The watchdog: ends a run on all ranks when one is lost, hangs or fails alone. One line says which, and where.

A rank is lost when a collective fails or its heartbeat stops. It hangs when one phase of a step takes longer than the
time-out. Time-outs of collectives would not do: they do not apply to the groups that DeepSpeed makes, and say nothing
about the cause.
"""

from __future__ import annotations

import faulthandler
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from lodestar.distributed.collectives import gather_objects, is_broken
from lodestar.distributed.runtime import Runtime, own_address
from lodestar.errors import LodestarError, PeerLostError

PATIENCE_SECONDS = 2.0
"""Time-out of one heartbeat."""
GRACE_SECONDS = 1.0
"""A rank that ends because of another answers a little longer, so that it is not taken for a lost one."""
LOADING, COMPUTING, HOOKS = "loading the batch", "forward and backward", "after the update"
SAVING, EVALUATING = "saving", "evaluating"
_OF_A_STEP = (LOADING, COMPUTING)
"""Phases that last no longer than the time-out; the others take as long as they take."""


@dataclass
class _Phase:
    """What this process does."""

    name: str = "start-up"
    step: int = 0
    since: float = field(default_factory=time.monotonic)

    def __str__(self) -> str:
        return f"step {self.step}, {self.name}" if self.step else self.name


_phase = _Phase()


def enter(name: str, step: int) -> None:
    """Say what this process does from now on, for the error that names it; `step` is the one it works on."""
    global _phase
    _phase = _Phase(name, step)


@dataclass(frozen=True)
class Peer:
    """A rank, and where it answers heartbeats."""

    rank: int
    host: str
    address: str
    port: int
    process: int
    started: float
    token: str = field(repr=False)
    """Shown by those who may ask, so that a port scan does not end a run."""

    def ask(self, **request: Any) -> dict[str, Any] | None:
        """Its phase, and that in which it last saw the next rank; none where it does not answer."""
        try:
            with socket.create_connection((self.address, self.port), timeout=PATIENCE_SECONDS) as connection:
                connection.settimeout(PATIENCE_SECONDS)
                connection.sendall(json.dumps({"token": self.token, **request}).encode() + b"\n")
                with connection.makefile() as answer:
                    return json.loads(answer.readline())
        except (OSError, ValueError):
            return None

    def hangs(self) -> bool:
        """Of a rank that does not answer: whether its process, or its host, is still there or cannot be asked."""
        try:
            socket.create_connection((self.address, self.port), timeout=PATIENCE_SECONDS).close()
        except ConnectionRefusedError:
            return False
        except OSError:
            return True
        return True

    def kill(self) -> None:
        """End its process, which must be on this host: nothing else ends one that is stopped."""
        with suppress(psutil.Error):
            process = psutil.Process(self.process)
            if process.create_time() == self.started:
                process.kill()


@contextmanager
def watchdog(
    runtime: Runtime, timeout_minutes: float, stacks: Path | None = None, located: Callable[[str], str] = str
) -> Iterator[None]:
    """Ends this process and its peers with one line, when one of them is lost, hangs or fails alone inside.

    timeout_minutes   how long a rank may be silent, or in one phase of a step
    stacks            a folder for the stacks of ranks where one hangs
    located           adds the place in the recipe to an error's text
    """
    if runtime.world_size == 1:
        yield
        return
    with socket.create_server(("", 0), backlog=runtime.world_size) as server:
        this = Peer(
            runtime.rank,
            socket.gethostname(),
            own_address(),
            server.getsockname()[1],
            os.getpid(),
            psutil.Process().create_time(),
            secrets.token_hex(8),
        )
        watch = _Watch(gather_objects(this), runtime.rank, 60 * timeout_minutes, stacks)
        threading.Thread(target=watch.answer, args=(server,), daemon=True).start()
        watch.reachable = all(gather_objects(watch.neighbour.ask() is not None))
        if watch.reachable:  # else a firewall blocks heartbeats
            threading.Thread(target=watch.check, daemon=True).start()
        try:
            yield
        except LodestarError as error:
            error.args = (located(str(error)),)  # rank 0 prints it as it is told
            watch.fail_alone(error)
            raise
        except RuntimeError as error:
            if not is_broken(error):
                raise
            watch.claim()
            raise watch.end_others() from error
        finally:
            watch.claim()


class _Watch:
    """The watchdog of one rank."""

    def __init__(self, peers: list[Peer], rank: int, limit: float, stacks: Path | None) -> None:
        self.peers, self.rank, self.limit, self.stacks = peers, rank, limit, stacks
        self.neighbour = peers[(rank + 1) % len(peers)]
        self.reachable = False
        self._last_seen: str | None = None
        """The phase in which the next rank last answered."""
        self._is_over = threading.RLock()

    def claim(self) -> None:
        """From here on this thread ends the process, and no other; waits for ever where another does already."""
        self._is_over.acquire()

    # --- heartbeats ---

    def answer(self, server: socket.socket) -> None:
        """Answer requests: the kernel alone accepts connections for a stopped process too."""
        while True:
            try:
                connection = server.accept()[0]
            except OSError:
                return  # closed at the end of the run
            with suppress(OSError, ValueError, AttributeError), connection:
                connection.settimeout(PATIENCE_SECONDS)
                request = json.loads(connection.makefile().readline(1 << 16))
                if request.get("token") != self.peers[self.rank].token:
                    continue
                now = {"at": str(_phase), "step": _phase.step, "next": self._last_seen}
                connection.sendall(json.dumps(now).encode() + b"\n")
                connection.close()
                if (ending := request.get("end")) is not None:
                    threading.Thread(target=self._obey, kwargs=ending, daemon=True).start()

    def check(self) -> None:
        """Ask the next rank from time to time; as each rank does, all ranks are checked. Look at this one too."""
        last_answer = time.monotonic()
        while True:
            now, phase = time.monotonic(), _phase
            deadlines = [last_answer + self.limit] + [phase.since + self.limit] * (phase.name in _OF_A_STEP)
            due = [deadline - now for deadline in deadlines if deadline > now]
            time.sleep(min([1.0, self.limit / 4, *due]))
            if (answer := self.neighbour.ask()) is not None:
                last_answer, self._last_seen = time.monotonic(), answer["at"]
            is_late = phase is _phase and phase.name in _OF_A_STEP and time.monotonic() - phase.since > self.limit
            is_silent = time.monotonic() - last_answer > self.limit
            if is_silent or (is_late and self._others_differ()):
                self.claim()
                os._exit(self.end_others(self.neighbour if is_silent else None).exit_code)

    def _others_differ(self) -> bool:
        """Whether ranks wait for others: a step in which all take their time is a long one."""
        answers = self._ask_all().values()
        return len({answer["at"] if answer else None for answer in answers}) > 1

    def _ask_all(self, known_silent: Peer | None = None) -> dict[Peer, dict[str, Any] | None]:
        def ask(peer: Peer) -> dict[str, Any] | None:
            return None if peer is known_silent else peer.ask()

        with ThreadPoolExecutor(32) as pool:
            return dict(zip(self.peers, pool.map(ask, self.peers), strict=True))

    # --- the end ---

    def fail_alone(self, error: LodestarError) -> None:
        """An error of this rank: the others would wait for it, and then report it as lost. Rank 0 prints it."""
        self.claim()
        if not self.reachable:
            error.print_on_this_rank = True
            return
        others = [peer for peer in self.peers if peer.rank != self.rank]
        told = self._tell(others, error, printing=[0])
        if self.rank and error.print_on_this_rank is None:
            error.print_on_this_rank = 0 not in told

    def end_others(self, known_silent: Peer | None = None) -> PeerLostError:
        """End all ranks but this one, those that hang on this host too; returns the error of this one, already printed.

        Where one hangs, those that can write their stacks.
        """
        if not self.reachable:
            this = self.peers[self.rank]
            return PeerLostError(
                f"rank {this.rank} ({_place(this)}): a collective failed, but a firewall blocks heartbeats (see why "
                "other ranks ended; the same command resumes the run)",
                print_on_this_rank=True,
            )
        answers = self._ask_all(known_silent)
        silent = [peer for peer, answer in answers.items() if answer is None]
        alive = [peer for peer, answer in answers.items() if answer is not None]
        folder = self.stacks if not silent or any(peer.hangs() for peer in silent) else None
        error = PeerLostError(_explain(self.peers[self.rank], answers, folder), print_on_this_rank=False)
        first_of_hosts = list({peer.address: peer.rank for peer in reversed(alive)}.values())
        others = [peer for peer in alive if peer.rank != self.rank]
        self._tell(others, error, printing=first_of_hosts, silent=[peer.rank for peer in silent], folder=folder)
        self._kill(silent)
        self._dump(folder)
        if self.rank in first_of_hosts:
            _print(error)
        time.sleep(GRACE_SECONDS)
        return error

    def _tell(
        self,
        peers: Sequence[Peer],
        error: LodestarError,
        *,
        printing: Sequence[int],
        silent: Sequence[int] = (),
        folder: Path | None = None,
    ) -> set[int]:
        """End `peers`, of which those in `printing` print the error; returns those that answered."""

        def tell(peer: Peer) -> bool:
            ending = {"line": str(error), "code": error.exit_code, "prints": peer.rank in printing}
            return peer.ask(end={**ending, "silent": list(silent), "folder": folder and str(folder)}) is not None

        return {peer.rank for peer in peers if tell(peer)}  # without threads: this rank may have no memory for them

    def _obey(self, *, line: str, code: int, prints: bool, silent: Sequence[int], folder: str | None) -> None:
        self.claim()
        self._kill([self.peers[rank] for rank in silent])
        self._dump(Path(folder) if folder else None)
        if prints:
            _print(line)
        time.sleep(GRACE_SECONDS)
        os._exit(code)

    def _kill(self, peers: Sequence[Peer]) -> None:
        this = self.peers[self.rank]
        for peer in peers:
            if (peer.host, peer.address) == (this.host, this.address):
                peer.kill()

    def _dump(self, folder: Path | None) -> None:
        if folder is not None:
            with suppress(OSError):
                folder.mkdir(parents=True, exist_ok=True)
                with (folder / f"rank-{self.rank}.txt").open("w") as file:
                    file.write(f"{_phase}\n")
                    file.flush()
                    faulthandler.dump_traceback(file)


def _print(error: object) -> None:
    print(f"error: {error}", file=sys.stderr, flush=True)


def _explain(this: Peer, answers: Mapping[Peer, dict[str, Any] | None], folder: Path | None) -> str:
    """What `this` rank makes of the answers of all ranks, in one line."""
    peers = list(answers)
    silent = [peer for peer in peers if answers[peer] is None]
    steps = {
        peer: (answer["step"], answer["at"] != f"step {answer['step']}, {LOADING}")
        for peer, answer in answers.items()
        if answer
    }
    stacks = f"stacks of the ranks are in {folder}; " if folder else ""
    if silent:
        named = ", ".join(f"{peer.rank} ({_place(peer)}{_last_seen(peer, answers)})" for peer in silent)
        what = f"lost rank{'s' * (len(silent) > 1)} {named}"
        remedy = f"see why it ended or hangs there; {stacks}the same command resumes the run"
    elif len(set(steps.values())) > 1:
        late = [peer for peer in peers if steps[peer] == min(steps.values())]
        named = ", ".join(f"{peer.rank} ({_place(peer)})" for peer in late)
        answer = answers[late[0]] or {}
        what = f"rank{'s' * (len(late) > 1)} {named} hang{'s' * (len(late) == 1)} at {answer['at']}"
        remedy = f"{stacks}the same command resumes the run"
    else:
        at = next(answer["at"] for answer in answers.values() if answer)
        what = f"a collective failed at {at}, but all ranks answer"
        remedy = f"look at the network between the ranks; {stacks}the same command resumes the run"
    return f"rank {this.rank} ({_place(this)}): {what} ({remedy})"


def _place(peer: Peer) -> str:
    return f"{peer.host}, {peer.address}"


def _last_seen(peer: Peer, answers: Mapping[Peer, dict[str, Any] | None]) -> str:
    """What the rank before saw of it."""
    peers = list(answers)
    before = answers[peers[peers.index(peer) - 1]]
    return f"; last seen at {before['next']}" if before and before["next"] else ""
