"""Where all ranks meet: rank 0's store. An error says what is wrong with the address, or who is missing.

Addresses are checked without torch, so that a mistake is told at once.
"""

from __future__ import annotations

import errno
import secrets
import socket
import threading
import time
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING

from lodestar.errors import LaunchError

if TYPE_CHECKING:
    from torch.distributed import Store

POLL_SECONDS = 0.2
CONNECT_SECONDS = 5.0
"""Time-out of one attempt; between two of them Python handles signals."""
HANDSHAKE_SECONDS = 30.0
"""Time-out of a store that has accepted a connection."""


def require_address(host: str, port: str, *, serves: bool) -> int:
    """The port as a number; LaunchError where `host` is not known or `port` is none.

    serves   whether other ranks are to find this process there
    """
    if not (port.isascii() and port.isdigit() and 0 < int(port[:9]) < 2**16):
        raise LaunchError(f"environment: MASTER_PORT: {port!r} is no port (export the same number from 1 to 65535)")
    number = int(port)
    try:
        socket.getaddrinfo(host, number, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise LaunchError(
            f"environment: MASTER_ADDR: {host!r} is not a known host (export the address of rank 0's host)"
        ) from None
    if serves:
        _require_own(host, number)
    return number


def _require_own(host: str, port: int) -> None:
    """LaunchError where this process cannot listen at `port`, or does not find itself at `host`."""
    try:
        server = socket.create_server(("", port))
    except OSError as error:
        problem = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be opened: {error.strerror}"
        raise _port_error(port, problem) from None
    token = secrets.token_bytes(8)
    server.settimeout(CONNECT_SECONDS)
    with server:
        try:
            with socket.create_connection((host, port), timeout=CONNECT_SECONDS) as connection:
                connection.sendall(token)
                while True:  # other ranks may try too
                    with server.accept()[0] as accepted:
                        accepted.settimeout(CONNECT_SECONDS)
                        if accepted.recv(len(token)) == token:
                            return
        except OSError:
            raise _address_error(host) from None


def _port_error(port: int, problem: str) -> LaunchError:
    return LaunchError(f"environment: MASTER_PORT: {port} {problem} (export another, the same on all nodes)")


def _address_error(host: str) -> LaunchError:
    return LaunchError(
        f"environment: MASTER_ADDR: {host} does not lead to the host of rank 0 (export that host's address)"
    )


def meet(
    host: str, port: int, *, rank: int, world_size: int, serves: bool, attempt: str, timeout_seconds: float
) -> Store:
    """The store at which all `world_size` ranks have met; LaunchError where some do not come in time.

    attempt   of the launcher, which starts its ranks again after a failure
    """
    from torch.distributed import PrefixStore

    deadline = time.monotonic() + timeout_seconds
    tcp_store = _serve(host, port) if serves else _connect(host, port, deadline)
    store = PrefixStore(f"lodestar/{attempt}", tcp_store)
    if store.add(f"rank {rank}", 1) > 1:
        raise LaunchError(
            f"environment: RANK: {rank} belongs to two processes (number them from 0 to {world_size - 1})"
        )
    if rank == 0:
        store.set("world size", str(world_size))
    count = store.add("count", 1)
    while count < world_size:
        if time.monotonic() > deadline:
            missing = [number for number in range(world_size) if not store.check([f"rank {number}"])]
            shown = ", ".join(map(str, missing[:12])) + (", ..." if missing[12:] else "")
            raise LaunchError(
                f"environment: {count} of {world_size} ranks came to {host}:{port} within {timeout_seconds / 60:g} "
                f"minutes; missing: {shown} (start them, and see why they ended; WORLD_SIZE counts all)"
            )
        _require_size(store, world_size)
        time.sleep(POLL_SECONDS)
        count = store.add("count", 0)
    _require_size(store, world_size)
    tcp_store.set_timeout(timedelta(seconds=timeout_seconds))
    return store


def _require_size(store: Store, world_size: int) -> None:
    if store.check(["world size"]) and (of_main := int(store.get("world size"))) != world_size:
        raise LaunchError(
            f"environment: WORLD_SIZE: {world_size}, but {of_main} on rank 0 (export the same everywhere)"
        )


def _serve(host: str, port: int) -> Store:
    from torch.distributed import DistError, TCPStore

    try:
        timeout = timedelta(seconds=CONNECT_SECONDS)
        return TCPStore(host, port, is_master=True, timeout=timeout, wait_for_workers=False, multi_tenant=True)
    except (DistError, RuntimeError) as error:
        taken = "EADDRINUSE" in str(error) or "already in use" in str(error)
        raise (_port_error(port, "is in use") if taken else _address_error(host)) from None


def _connect(host: str, port: int, deadline: float) -> Store:
    """A client of the store; tries until then, because rank 0 may start later."""
    while True:
        with suppress(OSError):
            socket.create_connection((host, port), timeout=CONNECT_SECONDS).close()
            if (store := _client(host, port)) is not None:
                return store
        if time.monotonic() > deadline:
            raise LaunchError(
                f"environment: MASTER_ADDR: no rank 0 at {host}:{port} (start it there, and export its address and "
                "port on all nodes)"
            )
        time.sleep(POLL_SECONDS)


def _client(host: str, port: int) -> Store | None:
    """None where the store is not there yet; LaunchError where something else is, for which torch waits for ever."""
    from torch.distributed import DistError, TCPStore

    stores: list[Store] = []

    def connect() -> None:
        with suppress(DistError, RuntimeError):
            timeout = timedelta(seconds=CONNECT_SECONDS)
            stores.append(TCPStore(host, port, is_master=False, timeout=timeout, wait_for_workers=False))

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(HANDSHAKE_SECONDS)
    if thread.is_alive():
        raise LaunchError(
            f"environment: MASTER_PORT: another program answers at {host}:{port}, not rank 0 (export a free port of "
            "rank 0's host, the same on all nodes)"
        )
    return stores[0] if stores else None
