"""Who may send to a listener: by AE title, and by address, network or name."""

from __future__ import annotations

import ipaddress
import socket
import time
from dataclasses import dataclass
from fnmatch import fnmatchcase

from protocols.dimse.served import Caller

FRESH_S, AGAIN_S, GOOD_S = 30.0, 5.0, 600.0  # for which a name counts as found, as not found, as found before


@dataclass(frozen=True)
class KnownSender:
    """Who may send: a pattern of AE titles, and an address, a network or a name; "" for any.

    Attributes:
        port: on which it listens for reports of storage commitment; 0 for the association that asked.
    """

    aet: str = ""
    host: str = ""
    port: int = 0

    def matches(self, caller: Caller) -> bool | None:
        """Return True if a caller is meant; None if nobody can tell now whose address it has."""
        if self.aet and not fnmatchcase(caller.calling, self.aet):
            return False
        if not self.host:
            return True
        try:
            there = ipaddress.ip_address(caller.host.partition("%")[0])
        except ValueError:
            return False
        try:
            return there in ipaddress.ip_network(self.host, strict=False)
        except ValueError:
            known = _addresses(self.host)
            return None if known is None else there in known


@dataclass(frozen=True)
class _Looked:
    """What the name of a host was last found to mean.

    Attributes:
        addresses: as known last; None if they never were.
        until: `time.monotonic` until which nobody asks again.
        good_until: until which the addresses count, though nobody can tell now.
    """

    addresses: frozenset[ipaddress.IPv4Address | ipaddress.IPv6Address] | None
    until: float
    good_until: float


_looked: dict[str, _Looked] = {}  # by name; a resolver that hangs costs each association seconds


def _addresses(host: str) -> frozenset[ipaddress.IPv4Address | ipaddress.IPv6Address] | None:
    """Return the addresses of a host; None if its name means nothing now, nor did some minutes ago."""
    now, before = time.monotonic(), _looked.get(host)
    if before is None or now >= before.until:
        try:
            found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        except OSError:
            good_until = before.good_until if before else 0.0
            before = _Looked(before.addresses if before and now < good_until else None, now + AGAIN_S, good_until)
        else:
            there = frozenset(ipaddress.ip_address(str(address[0]).partition("%")[0]) for *_, address in found)
            before = _Looked(there, now + FRESH_S, now + GOOD_S)
        _looked[host] = before
    return before.addresses
