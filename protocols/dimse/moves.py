"""What retrievals by C-MOVE have requested: their Storage SCP accepts nothing else."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from protocols.dimse.command import AFFECTED_INSTANCE, ORIGINATOR, ORIGINATOR_ID, CommandSet
from protocols.dimse.ports import shared
from protocols.dimse.receive import NOT_AUTHORISED, Depot
from protocols.dimse.scp import CALLING_UNKNOWN, NO_REASON, Refusal, StorageScp
from protocols.dimse.served import Caller, ServedAssociation
from protocols.dimse.transport import Peer
from protocols.dimse.turns import Turns
from protocols.net.connection import host_of
from transfer.errors import NothingCame

MOST_NAMED = 5  # addresses that a message names
PORT_S = 30  # for another process to give up the Storage SCP's port


class Later(Exception):
    """Who waits until a node can send here is to wait no longer."""


@dataclass(frozen=True)
class MoveDestination:
    """The destination of C-MOVE: our Storage SCP, as the peer knows it. Port 0: none, so C-MOVE can't be used.

    Attributes:
        host: address to listen on, "" for all.
        line: lock by which processes of this machine take turns on the port.
    """

    aet: str = "TALARIA"
    port: int = 0
    host: str = ""
    line: Path | None = field(default=None, compare=False)

    @property
    def question(self) -> str:
        """What to ask where nothing comes."""
        return f"is {self.aet} registered there with this machine's address and port {self.port}?"


class Strangers(set[str]):
    """Addresses from which associations were refused while something was expected from a host.

    Args:
        host: as its peer's settings name it.

    Attributes:
        plain: those of the host that came without TLS, which is demanded.
        broken: those of the host with which a TLS handshake failed, and why.
    """

    def __init__(self, host: str) -> None:
        super().__init__()
        self.host = host
        self.plain, self.broken = set[str](), dict[str, str]()

    def __str__(self) -> str:
        """Return what to say of them, behind another sentence; "" if there were none."""
        said = ""
        if self:
            refused = f"associations from {_some(self)} were refused"
            said += f"; {refused}: that is no address of {self.host}, as the target names it"
        if self.plain:
            refused = f"associations without TLS from {_some(self.plain)} were refused"
            said += f"; {refused}: have the peer send to this destination over TLS, as the target does"
        for address in sorted(self.broken)[:MOST_NAMED]:
            said += f"; the TLS handshake with {address} failed: {self.broken[address]}"
        return said


def _some(addresses: set[str]) -> str:
    return ", ".join(sorted(addresses)[:MOST_NAMED])


@dataclass(eq=False)
class Expected:
    """One C-MOVE that is under way.

    Attributes:
        originators, message_id: by which instances say whose move they belong to (PS3.7 section 9.1.1.1): ours, and
            the peer's own AE title, which pynetdicom's archive gives instead.
        hosts: addresses that they may come from.
        instances: their UIDs, None if they are not known.
        strangers: takes the addresses from which associations are refused meanwhile.
        tls: with which they are to come; None if they may come in clear.
        unclear: whether something was refused that may have been for this one, or for another.
    """

    originators: frozenset[str]
    message_id: int
    hosts: frozenset[str]
    instances: frozenset[str] | None
    depot: Depot
    strangers: Strangers = field(repr=False)
    tls: ssl.SSLContext | None = field(default=None, repr=False)
    unclear: bool = False

    def takes(self, caller: Caller) -> bool:
        """Return whether what it brings may come from a peer."""
        return caller.host in self.hosts and (caller.tls or self.tls is None)

    def last_heard(self) -> float:
        """Return when something was last received."""
        return self.depot.last_heard()


class MoveDesk:
    """Knows the moves that are under way in this process.

    Attributes:
        turns: who may request moves from nodes with TLS.
    """

    def __init__(self) -> None:
        self.turns = Turns()
        self._expected: list[Expected] = []
        self._lock = threading.Lock()

    @contextmanager
    def expecting(self, one: Expected) -> Iterator[None]:
        """Accept what belongs to this move until the block ends."""
        with self._lock:
            self._expected.append(one)
        try:
            yield
        finally:
            with self._lock:
                self._expected.remove(one)

    def admit(self, caller: Caller) -> MoveVisit | Refusal:
        """Admit a peer if something was requested from one at its address, over TLS where that is demanded."""
        with self._lock:
            if any(one.takes(caller) for one in self._expected):
                return MoveVisit(self, caller)
            here = self._expected_from(caller.host)
            for one in here:
                one.strangers.plain.add(caller.host)
            return NO_REASON if here else CALLING_UNKNOWN

    def context(self, host: str) -> ssl.SSLContext | None:
        """Return what TLS to use with a peer: that of what was requested from its address."""
        with self._lock:
            return next((one.tls for one in self._expected_from(host) if one.tls is not None), None)

    def failed(self, host: str, why: str) -> None:
        """Note that a TLS handshake with a peer came to nothing."""
        with self._lock:
            for one in self._expected:
                if host in one.hosts:
                    one.strangers.broken[host] = why

    def _expected_from(self, host: str) -> list[Expected]:
        """Return what is expected from an address; where that is nothing, who expects something hears of it."""
        found = [one for one in self._expected if host in one.hosts]
        for one in self._expected if not found else ():
            one.strangers.add(host)
        return found

    def depot(self, caller: Caller, request: CommandSet) -> tuple[Depot | None, int]:
        """Return the folder for an instance, or None and the status to refuse it with."""
        one = self._of(caller, request)
        return (None, NOT_AUTHORISED) if one is None else (one.depot, 0)

    def _of(self, caller: Caller, request: CommandSet) -> Expected | None:
        originator, number = request.text(ORIGINATOR), request.number(ORIGINATOR_ID)
        with self._lock:
            found = [
                one
                for one in self._expected
                if one.takes(caller)
                and (number is None or one.message_id == number)
                and (not originator or originator in one.originators)
            ]
        if len(found) == 1:
            return found[0]
        uid = request.text(AFFECTED_INSTANCE)
        its = next((one for one in found if one.instances is not None and uid in one.instances), None)
        for one in found if its is None else ():
            one.unclear = True
        return its


@dataclass(frozen=True)
class MoveVisit:
    """An association on which instances of moves come."""

    desk: MoveDesk
    caller: Caller
    services: frozenset[str] = frozenset()

    def depot(self, request: CommandSet) -> tuple[Depot | None, int]:
        """Return the folder for an instance, or None and the status to refuse it with."""
        return self.desk.depot(self.caller, request)

    def serve(self, association: ServedAssociation, request: CommandSet) -> bool:
        """Serve nothing but storage."""
        return False

    def ended(self) -> None:
        """Need nothing done: what is expected does not depend on associations."""


def addresses(host: str, port: int) -> frozenset[str]:
    """Return the addresses of a host as a listener sees them."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError:
        return frozenset()
    return frozenset(host_of(address) for *_, address in found)


DESK = MoveDesk()


def cannot_come(peer: Peer, at: MoveDestination) -> str:
    """Return why a peer can't send here by C-MOVE, and what to set; "" if it can."""
    if not at.port:
        return "no port is set for the Storage SCP that C-MOVE would send to: set scp_port"
    if peer.tls and not peer.tls.cert:
        return "C-MOVE sends over TLS connections that the peer opens: set tls_cert and tls_key, which answer it"
    return ""


def nothing_came(peer: Peer, at: MoveDestination, answer: str, patience_s: float, strangers: Strangers) -> NothingCame:
    """Return the error that a peer's answer means by which it has sent what did not come in so many seconds."""
    came = f"the peer says that it has sent the series ({answer}), and nothing came within {patience_s:g} s"
    return NothingCame(f"{peer.where}: {came}: {at.question}{strangers}")


@contextmanager
def listening(at: MoveDestination, peer: Peer, check: Callable[[], None]) -> Iterator[ssl.SSLContext | None]:
    """Have the Storage SCP accept what is expected, until the block ends; yields the TLS with which a peer is to come.

    Raises:
        Misconfigured: the port can't be listened on, or the peer's TLS settings can't be used for that.
    """
    with shared(
        StorageScp,
        at.host,
        at.port,
        lambda: StorageScp(at.host, at.port, at.aet, DESK, None, peer.idle_timeout_s, security=DESK),
        PORT_S,
        check,
        remedy=" for what C-MOVE sends, set scp_port",
        line=at.line,
    ) as scp:
        scp.idle_timeout_s = max(scp.idle_timeout_s, peer.idle_timeout_s)  # another peer's may be shorter
        yield peer.tls.server() if peer.tls else None
