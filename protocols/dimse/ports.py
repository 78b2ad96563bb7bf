"""Ports on which this process listens for associations from peers, each shared by all its users."""

from __future__ import annotations

import select
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar, cast

from protocols.net.connection import SLICE_S
from transfer.errors import Misconfigured


class Port(Protocol):
    """Listens on a port from the time that it is made."""

    def close(self) -> None:
        """Stop listening, and break open associations."""


P = TypeVar("P", bound=Port)

_LOCK = threading.Lock()
_SHARED: dict[tuple[type[Any], str, int], tuple[Any, int]] = {}


@contextmanager
def shared(
    kind: type[P],
    host: str,
    port: int,
    make: Callable[[], P],
    wait_s: float,
    check: Callable[[], None] = lambda: None,
    *,
    remedy: str = "",
) -> Iterator[P]:
    """Listen on a port until the block ends; several blocks of one process share the listener.

    Args:
        kind: what listens: two kinds can't share a port.
        make: makes it, if there is none.
        wait_s: seconds to wait for another user to release the port.
        remedy: what to do if that doesn't happen.

    Raises:
        Misconfigured: the port can't be listened on.
    """
    key = kind, host, port
    end = time.monotonic() + wait_s
    while True:
        with _LOCK:
            found, users = _SHARED.get(key, (None, 0))
            try:
                one = cast(P, found or make())
            except OSError as exc:
                if time.monotonic() >= end:
                    where = f"{host or 'all addresses'}, port {port}"
                    raise Misconfigured(f"can't listen on {where}{remedy}: {exc.strerror or exc}") from exc
            else:
                _SHARED[key] = one, users + 1
                break
        select.select([], [], [], SLICE_S)
        check()
    try:
        yield one
    finally:
        with _LOCK:
            one, users = _SHARED[key]
            if users == 1:
                del _SHARED[key]
                one.close()
            else:
                _SHARED[key] = one, users - 1
