"""Which DICOM sources can't share a port, and which ones would receive again what they have sent.

Of a study that comes back, the second copy counts as confirmed as soon as it is there, by the ledger's word on the
first one: both would be removed, and nobody else would have it.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from ipaddress import IPv4Address, IPv6Address, ip_address
from types import MappingProxyType

from blocks import Target
from blocks.dicom import SENDER, DicomTarget
from blocks.dicom_source import DicomSource
from blocks.source import Source
from protocols.net.connection import resolve_within
from tasks.names import split
from transfer.errors import Unreachable
from transfer.home import host_name

Address = IPv4Address | IPv6Address
RESOLVE_S = 5.0  # for the name of a host; a resolver that is away must not hold up a sweep


def clashes(sources: Iterable[Source]) -> dict[str, str]:
    """Return why some of these sources can't listen beside those before them: a sentence by the source's name."""
    wrong: dict[str, str] = {}
    seen: list[DicomSource] = []
    for one in sources:
        if not isinstance(one, DicomSource):
            continue
        why = next((why for other in seen if (why := clash(one, other))), "")
        if why:
            wrong[one.name] = why
        else:
            seen.append(one)
    return wrong


def clash(one: DicomSource, other: DicomSource) -> str:
    """Return why a source can't listen beside another one, in a sentence; "" if it can."""
    if one.port != other.port:
        return ""
    if one.host != other.host:
        if not _overlap(_bound(one.host), _bound(other.host)):
            return ""
        return (
            f"port {one.port}: {other.name} listens on it at {other.host or 'all addresses'}, and"
            f" {one.host or 'all addresses'} is another name for that, or a part of it: give both the same host, or"
            " two ports"
        )
    if one.aet == other.aet:
        return f"AE title {one.aet} on port {one.port} is that of {other.name}: each source on a port needs its own"
    if one.security != other.security:
        return f"port {one.port}: {other.name} listens on it with other settings of TLS: they belong to the port"
    return ""


def loops(
    source: DicomSource,
    sources: Iterable[Source],
    targets: Mapping[str, Target],
    elsewhere: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[str]:
    """Yield which targets of a source lead back to it, each in a sentence.

    A source of another host is found where a target names that host, or an address that its name stands for, or that
    the source listens on.

    Args:
        sources: all that are saved, or about to be.
        targets: all that are saved, by name.
        elsewhere: the sources that belong to other hosts, each with its host.
    """
    listeners = {one.name: one for one in (*sources, source) if isinstance(one, DicomSource)}
    ways = _Ways([*listeners.values()], targets, elsewhere)
    for written in source.reaches:
        for first in ways.ends(source, written):
            if first.name == source.name:
                yield f"target {written} is this source itself: what it receives would come again, and then be removed"
            elif source.name in ways.behind(first):
                there = f" on the host {elsewhere[first.name]}" if first.name in elsewhere else ""
                yield (
                    f"target {written} is source {first.name}{there}, from which studies come back to this one: what it"
                    " receives would come again, and then be removed"
                )


class _Ways:
    """Who receives what some listeners send.

    Args:
        elsewhere: the listeners of other hosts, each with its host; all others are this machine's.
    """

    def __init__(
        self, listeners: Sequence[DicomSource], targets: Mapping[str, Target], elsewhere: Mapping[str, str]
    ) -> None:
        self._listeners, self._targets, self._elsewhere = listeners, targets, elsewhere

    def behind(self, source: DicomSource) -> set[str]:
        """Return the names of the sources that receive what a source sends, or what these send on."""
        found: set[str] = set()
        open_ = [source]
        while open_:
            one = open_.pop()
            for written in one.reaches:
                new = [end for end in self.ends(one, written) if end.name not in found]
                found.update(end.name for end in new)
                open_ += new
        return found

    def ends(self, source: DicomSource, written: str) -> list[DicomSource]:
        """Return the sources that receive what a source sends to a target; on each host one at most."""
        target = self._targets.get(split(written)[1])
        if not isinstance(target, DicomTarget) or target.host == SENDER:
            return []
        title = source.aet if target.pass_receiver_aet else target.aet_target
        alike = [one for one in self._listeners if (one.port, one.aet) == (target.port, title)]
        return [one for one in alike if self._leads(source, target.host, one)]  # else nobody's name has to be resolved

    def _leads(self, source: DicomSource, host: str, to: DicomSource) -> bool:
        """Return True if a target's host, for the host that a source belongs to, is that of a listener."""
        here, there = (self._elsewhere.get(one.name, "") for one in (source, to))
        if not here and not there:
            return _overlap(_bound(to.host), _ours(host))
        if not to.host and host.casefold() == (there or host_name()).casefold():
            return True
        meant = _outside(host)
        if not meant:  # addresses that mean the machine on which they are used
            return here == there and _overlap(_bound(to.host), map(_to_itself, _addresses(host)))
        if not there:
            return _overlap(_bound(to.host), meant & _ours(host))
        return _overlap(_bound(to.host), meant) if meant & _outside(there) else bool(meant & _bound(to.host))


def _outside(host: str) -> set[Address]:
    """Return those of a host's addresses that mean the same host on each machine."""
    return {one for one in map(_plain, _addresses(host)) if not (one.is_loopback or one.is_unspecified)}


def _plain(address: Address) -> Address:
    """Return an address of IPv4 that is written as one of IPv6 as what it is."""
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return mapped or address


def _to_itself(address: Address) -> Address:
    """Return the address under which whoever connects to this one reaches his own machine."""
    address = _plain(address)
    if not address.is_unspecified:
        return address
    return IPv4Address("127.0.0.1") if address.version == 4 else IPv6Address("::1")


def _bound(host: str) -> frozenset[Address]:
    """Return the addresses that a listener of this host is bound to, as `protocols.dimse.scp` does it."""
    if not host:
        return frozenset((IPv4Address(0), IPv6Address(0)))
    version = 6 if ":" in host else 4
    return frozenset(one for one in _addresses(host) if one.version == version)


def _addresses(host: str) -> dict[Address, tuple[socket.AddressFamily, tuple[object, ...]]]:
    """Return the addresses of a host, each with what a socket wants of it; none if its name means nothing now."""
    found: dict[Address, tuple[socket.AddressFamily, tuple[object, ...]]] = {}
    with suppress(Unreachable):
        for family, address in resolve_within(host, 0, RESOLVE_S, lambda: None):
            found[ip_address(str(address[0]).partition("%")[0])] = family, address
    return found


def _overlap(ones: Iterable[Address], others: Iterable[Address]) -> bool:
    """Return True if two sets of addresses have one in common; that of all stands for each of its version."""
    others = list(others)
    return any(
        one == other or (one.version == other.version and (one.is_unspecified or other.is_unspecified))
        for one in ones
        for other in others
    )


def _ours(host: str) -> set[Address]:
    """Return those of a host's addresses that are this machine's own."""
    found: set[Address] = set()
    for written, (family, place) in _addresses(host).items():
        address = _to_itself(written)
        if address.is_loopback or _is_route_to_itself(family, place):
            found.add(address)
    return found


def _is_route_to_itself(family: socket.AddressFamily, place: tuple[object, ...]) -> bool:
    """Return True if what is sent to an address would be sent from it; nothing is sent."""
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.connect((place[0], 9, *place[2:]))
            return bool(sock.getsockname()[0] == str(place[0]).partition("%")[0])
    except OSError:  # no way leads there
        return False
