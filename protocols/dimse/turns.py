"""TLS on a port that several targets share: whose settings answer a peer that opens a connection.

All that is known of a peer before the handshake is its address. So what is awaited from one address at a time is
awaited with the settings of one target: who comes with others waits its turn.
"""

from __future__ import annotations

import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from protocols.net.tls import Tls

LOOK_S = 0.05


@dataclass(eq=False)
class _Turn:
    """Somebody who awaits connections from some addresses, or waits to."""

    hosts: frozenset[str]
    tls: Tls
    context: ssl.SSLContext
    has_begun: bool = False

    def bars(self, hosts: frozenset[str], tls: Tls) -> bool:
        return bool(self.hosts & hosts) and self.tls != tls


class Turns:
    """Who awaits connections over TLS, in the order in which they came."""

    def __init__(self) -> None:
        self._turns: list[_Turn] = []
        self._lock = threading.Lock()

    @contextmanager
    def taken(self, hosts: frozenset[str], tls: Tls | None, check: Callable[[], None]) -> Iterator[None]:
        """Wait until nobody awaits connections from these addresses with other settings, and await them until the end.

        Args:
            hosts: addresses that connections come from.
            tls: with which they are answered; None for none, which bars nobody.
            check: called several times a second while it waits; may raise to stop.

        Raises:
            Misconfigured: the settings can't be used to listen.
        """
        if tls is None:
            yield
            return
        one = _Turn(hosts, tls, tls.server())
        with self._lock:
            self._turns.append(one)
        try:
            while not self._begins(one):
                check()
                time.sleep(LOOK_S)
            yield
        finally:
            with self._lock:
                self._turns.remove(one)

    def _begins(self, one: _Turn) -> bool:
        with self._lock:
            before = self._turns[: self._turns.index(one)]
            one.has_begun = not any(each.bars(one.hosts, one.tls) for each in before)
            return one.has_begun

    def context(self, host: str) -> ssl.SSLContext | None:
        """Return what to shake hands with: the settings of who awaits this address.

        Where nobody names it (the peer may have several), those that all share; None if there are none.
        """
        with self._lock:
            here = [one for one in self._turns if one.has_begun]
            named = next((one.context for one in here if host in one.hosts), None)
            return named or (here[0].context if len({one.tls for one in here}) == 1 else None)
