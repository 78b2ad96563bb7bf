"""Ports on which this process listens for associations from peers, each shared by all its users."""

from __future__ import annotations

import select
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

from protocols.dimse.portline import PortLine
from protocols.net.connection import SLICE_S
from transfer.errors import Misconfigured


class Port(Protocol):
    """Listens on a port from the time that it is made."""

    def close(self) -> None:
        """Stop listening, and break open associations."""


P = TypeVar("P", bound=Port)

_LOCK = threading.Lock()
_SHARED: dict[tuple[type[Any], str, int], tuple[Any, int]] = {}
_LINES: dict[Path | None, PortLine] = {}
_TAKEN: set[tuple[type[Any], str, int]] = set()  # which somebody had for as long as was to be waited


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
    line: Path | None = None,
) -> Iterator[P]:
    """Listen on a port until the block ends; several blocks of one process share the listener.

    Args:
        kind: what listens: two kinds can't share a port.
        make: makes it, if there is none.
        wait_s: seconds to wait for another user to release the port.
        remedy: what to do if that doesn't happen.
        line: lock that other processes of ours share, which are waited for as long as it takes. Another program that
            has the port is waited for once, until it was released.

    Raises:
        Misconfigured: the port can't be listened on.
    """
    key, place = (kind, host, port), _LINES.setdefault(line, PortLine(line))
    end = time.monotonic() + wait_s
    with _waiting(key, place):
        while True:
            with _LOCK:
                found, users = _SHARED.get(key, (None, 0))
                if place.is_wanted() if found else not place.take():
                    end = time.monotonic() + wait_s
                else:
                    try:
                        one = cast(P, found or make())
                    except OSError as exc:
                        if time.monotonic() >= end or (line and key in _TAKEN):
                            _TAKEN.add(key)
                            where = f"{host or 'all addresses'}, port {port}"
                            raise Misconfigured(f"can't listen on {where}{remedy}: {exc.strerror or exc}") from exc
                    else:
                        _SHARED[key] = one, users + 1
                        _TAKEN.discard(key)
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
                place.leave()
            else:
                _SHARED[key] = one, users - 1


@contextmanager
def _waiting(key: tuple[type[Any], str, int], place: PortLine) -> Iterator[None]:
    """Stand in the line until the end of the block; who doesn't listen then, and is alone, leaves it."""
    with _LOCK:
        place.waiting += 1
    try:
        yield
    finally:
        with _LOCK:
            place.waiting -= 1
            if not place.waiting and key not in _SHARED:
                place.leave()
