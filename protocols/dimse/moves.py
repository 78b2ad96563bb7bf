"""What retrievals by C-MOVE have requested: their Storage SCP accepts nothing else."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from protocols.dimse.command import AFFECTED_INSTANCE, ORIGINATOR, ORIGINATOR_ID, CommandSet
from protocols.dimse.ports import shared
from protocols.dimse.receive import NOT_AUTHORISED, Depot
from protocols.dimse.scp import CALLING_UNKNOWN, Refusal, StorageScp
from protocols.dimse.served import Caller, ServedAssociation
from protocols.dimse.transport import Peer

MOST_NAMED = 5  # addresses that a message names
PORT_S = 30  # for another process to give up the Storage SCP's port


@dataclass(frozen=True)
class MoveDestination:
    """The destination of C-MOVE: our Storage SCP, as the peer knows it. Port 0: none, so C-MOVE can't be used."""

    aet: str = "TALARIA"
    port: int = 0
    host: str = ""  # address to listen on, "" for all

    @property
    def question(self) -> str:
        """What to ask where nothing comes."""
        return f"is {self.aet} registered there with this machine's address and port {self.port}?"


class Strangers(set[str]):
    """Addresses from which associations were refused while something was expected from a host.

    Args:
        host: as its peer's settings name it.
    """

    def __init__(self, host: str) -> None:
        super().__init__()
        self.host = host

    def __str__(self) -> str:
        """Return what to say of them, behind another sentence; "" if there were none."""
        if not self:
            return ""
        some = ", ".join(sorted(self)[:MOST_NAMED])
        return f"; associations from {some} were refused: that is no address of {self.host}, as the target names it"


@dataclass(eq=False)
class Expected:
    """One C-MOVE that is under way.

    Attributes:
        originators, message_id: by which instances say whose move they belong to (PS3.7 section 9.1.1.1): ours, and
            the peer's own AE title, which pynetdicom's archive gives instead.
        hosts: addresses that they may come from.
        instances: their UIDs, None if they are not known.
        strangers: takes the addresses from which associations are refused meanwhile.
    """

    originators: frozenset[str]
    message_id: int
    hosts: frozenset[str]
    instances: frozenset[str] | None
    depot: Depot
    strangers: set[str] = field(default_factory=set, repr=False)

    def last_heard(self) -> float:
        """Return when something was last received."""
        return self.depot.heard


class MoveDesk:
    """Knows the moves that are under way in this process."""

    def __init__(self) -> None:
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
        """Admit a peer if something was requested from one at its address."""
        with self._lock:
            expected = any(caller.host in one.hosts for one in self._expected)
            for one in self._expected if not expected else ():
                one.strangers.add(caller.host)
        return MoveVisit(self, caller) if expected else CALLING_UNKNOWN

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
                if caller.host in one.hosts
                and (number is None or one.message_id == number)
                and (not originator or originator in one.originators)
            ]
        if len(found) == 1:
            return found[0]
        uid = request.text(AFFECTED_INSTANCE)
        return next((one for one in found if one.instances is not None and uid in one.instances), None)


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
    return frozenset(str(address[0]).removeprefix("::ffff:") for *_, address in found)


DESK = MoveDesk()


@contextmanager
def listening(at: MoveDestination, peer: Peer, check: Callable[[], None]) -> Iterator[None]:
    """Have the Storage SCP accept what is expected of a peer, until the block ends.

    Raises:
        Misconfigured: the port can't be listened on.
    """
    context = peer.tls.server() if peer.tls and peer.tls.cert else None
    with shared(
        StorageScp,
        at.host,
        at.port,
        lambda: StorageScp(at.host, at.port, at.aet, DESK, None, peer.idle_timeout_s),
        context,
        PORT_S,
        check,
        remedy=" for what C-MOVE sends, set scp_port",
    ):
        yield
