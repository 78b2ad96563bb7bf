"""Processes that receive beside the listener: begun when associations are open at once, ended when they are idle.

The listener admits every association, and so keeps all limits; what it lends goes to whoever has the fewest. It serves
by itself the first of a source, those with TLS, and those that may ask for storage commitment. Whatever becomes of a
receiver or their forker, the listener goes on: associations that nobody has begun to serve come back to it, and what a
receiver had not reported is looked for on disk.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
import ssl
import subprocess
import sys
import threading
import time
from array import array
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from mmap import mmap
from typing import Any

from protocols.dimse.committing import PUSH_MODEL
from protocols.dimse.intake import ListenerVisit, Reception
from protocols.dimse.keeping import SLOT, News, Versions
from protocols.dimse.receiver import MOST_BYTES
from protocols.dimse.served import Accepted
from transfer.spool import ReceivedUnit

logger = logging.getLogger(__name__)

MOST = 3  # receivers: more take memory, and the kernel is the limit then
PER_CORE = 2  # receivers: those that wait for the disk use none
IDLE_S = 60.0  # for which a receiver stays without an association
END_S = 5.0  # for the forker to end
CALM_S = 30.0  # without receivers after one that could not begin
FORKER = "from protocols.dimse.receiver import fork_receivers\nfork_receivers({})"


@dataclass
class _Lent:
    """An association that a receiver serves."""

    accepted: Accepted
    visit: ListenerVisit
    over: Callable[[], None]
    back: Callable[[], None]


class _Receiver:
    """One receiver, from here; all under the lock of its `Receivers`."""

    def __init__(self, slot: int, channel: socket.socket) -> None:
        self.slot, self.channel = slot, channel
        self.isready = False
        self.lent: dict[int, _Lent] = {}
        self.receptions: dict[str, Reception] = {}  # by folder, of all that it was ever lent
        self.terms: dict[str, dict[str, Any]] = {}  # as it knows them, by folder
        self.idle_since = time.monotonic()


class Receivers:
    """All receivers of this process.

    Args:
        most: how many at once; by default as many as pay on this machine.
    """

    def __init__(self, most: int | None = None) -> None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
        self._most = (min(MOST, PER_CORE * cores) if cores > 1 else 0) if most is None else most
        self._lock = threading.RLock()
        self._receivers: dict[int, _Receiver] = {}
        self._number = 0
        self._calm_until = 0.0
        self._forker: subprocess.Popen[bytes] | None = None
        self._orders = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)  # none yet
        self.versions: Versions | None = None
        self._memory = -1
        if not hasattr(os, "memfd_create"):
            self._most = 0
        if self._most:
            self._memory = os.memfd_create("versions")
            os.ftruncate(self._memory, SLOT * (self._most + 1))
            self.versions = Versions(mmap(self._memory, 0), 0)
            try:
                self._start_forker()
            except OSError as exc:  # it is tried again when it is needed
                logger.warning("no process to receive can be begun: %s", exc)

    def lend(self, accepted: Accepted, over: Callable[[], None], back: Callable[[], None]) -> bool:
        """Have an association served by a receiver, if it is one to lend; see `protocols.dimse.scp.Lend`."""
        visit = accepted.visit
        if not isinstance(visit, ListenerVisit) or visit.isfirst:
            return False
        if isinstance(accepted.sock, ssl.SSLSocket):  # whose keys are in our memory
            return False
        if any(abstract == PUSH_MODEL for abstract, _ in accepted.contexts.values()):
            return False
        with self._lock:
            receiver = self._chosen()
            return receiver is not None and self._lent(receiver, _Lent(accepted, visit, over, back))

    def inform(self, reception: Reception) -> None:
        """Let a source's terms hold for associations that are lent."""
        with self._lock:
            for receiver in list(self._receivers.values()):
                folder, terms = str(reception.spool.folder), _terms(reception)
                if receiver.terms.get(folder, terms) == terms:
                    continue
                receiver.terms[folder] = terms
                try:
                    _send(receiver.channel, json.dumps(["terms", folder, terms]).encode())
                except OSError:  # it does not read any more; what it serves must not go on under the former terms
                    self._dismiss(receiver)

    def tidy(self) -> None:
        """End receivers that have been idle for a while."""
        with self._lock:
            for receiver in list(self._receivers.values()):
                if not receiver.lent and time.monotonic() - receiver.idle_since >= IDLE_S:
                    self._dismiss(receiver)

    def close(self) -> None:
        """End all receivers; associations that are open are broken."""
        with self._lock:
            self._most = 0
            for receiver in list(self._receivers.values()):
                self._dismiss(receiver)
            self._end_forker()
            if self._memory >= 0:
                os.close(self._memory)
                self._memory = -1

    # ---- receivers

    def _chosen(self) -> _Receiver | None:
        """Return who gets the next association; None if nobody can."""
        least = min(self._receivers.values(), key=lambda one: len(one.lent), default=None)
        if (least is None or least.lent) and len(self._receivers) < self._most and time.monotonic() >= self._calm_until:
            least = self._begun() or least
        return least

    def _begun(self) -> _Receiver | None:
        slot = next(slot for slot in range(1, self._most + 1) if slot not in self._receivers)
        try:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs:
                try:
                    self._order(slot, theirs)
                except OSError:  # it was killed
                    self._start_forker()
                    self._order(slot, theirs)
            receiver = _Receiver(slot, ours)
            threading.Thread(target=self._hear, args=(receiver,), name="receiver", daemon=True).start()
        except (OSError, RuntimeError) as exc:
            logger.warning("no process to receive can be begun: %s", exc)
            self._calm_until = time.monotonic() + CALM_S
            return None
        self._receivers[slot] = receiver
        return receiver

    def _order(self, slot: int, theirs: socket.socket) -> None:
        _send(self._orders, str(slot).encode(), [theirs.fileno(), self._memory])

    def _start_forker(self) -> None:
        self._end_forker()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._forker = subprocess.Popen(
                [sys.executable, "-P", "-c", FORKER.format(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                env=os.environ | {"MALLOC_ARENA_MAX": "1"},  # else each thread gets one, of 200 kB
            )
        self._orders = ours

    def _end_forker(self) -> None:
        self._orders.close()
        if self._forker is None:
            return
        try:
            self._forker.wait(END_S)
        except subprocess.TimeoutExpired:  # stopped, perhaps
            self._forker.kill()
            self._forker.wait()
        self._forker = None

    def _dismiss(self, receiver: _Receiver) -> None:
        """Let a receiver end; what it has open is broken, also if it does not run."""
        self._receivers.pop(receiver.slot, None)
        for one in receiver.lent.values():
            with suppress(OSError):
                one.accepted.sock.shutdown(socket.SHUT_RDWR)
        with suppress(OSError):
            receiver.channel.shutdown(socket.SHUT_RDWR)  # wakes whoever hears it

    def _lent(self, receiver: _Receiver, lent: _Lent) -> bool:
        self._number += 1
        accepted, folder, terms = lent.accepted, str(lent.visit.gathering.spool.folder), _terms(lent.visit.gathering)
        asked = {
            "caller": asdict(accepted.caller),
            "contexts": accepted.contexts,
            "max_pdu": accepted.max_pdu,
            "idle_timeout_s": accepted.idle_timeout_s,
        }
        try:
            message = json.dumps(["serve", self._number, folder, terms, asked]).encode()
            _send(receiver.channel, message, [accepted.sock.fileno()])
        except OSError as exc:  # its buffer is full, it is gone, or the message is too long
            logger.info("an association is not lent: %s", exc)
            return False
        receiver.lent[self._number] = lent
        receiver.terms[folder], receiver.receptions[folder] = terms, lent.visit.gathering
        return True

    # ---- what they say

    def _hear(self, receiver: _Receiver) -> None:
        """Take what a receiver says, until its end."""
        while True:
            try:
                data = receiver.channel.recv(MOST_BYTES)
            except OSError:
                data = b""
            if not data:
                break
            try:
                self._take(receiver, *json.loads(data))
            except Exception:  # whatever it is, the next one may be the end of an association
                logger.exception("what a process that receives has said")
        self._lost(receiver)

    def _take(self, receiver: _Receiver, kind: str, *body: Any) -> None:
        if kind == "news":
            self._add(receiver, *body)
        elif kind == "over":
            number, instances, size = body
            with self._lock:
                lent = receiver.lent.pop(number, None)
                receiver.idle_since = time.monotonic()
            if lent is None:
                return
            lent.visit.instances, lent.visit.bytes = instances, size
            lent.over()
        elif kind == "log":
            name, level, words = body
            logging.getLogger(name).log(level, "%s", words)
        elif kind == "ready":
            receiver.isready = True

    def _add(self, receiver: _Receiver, folder: str, counts: list[int], units: list[list[Any]]) -> None:
        heard = [(ReceivedUnit(*unit), at) for *unit, at in units]
        with self._lock:
            reception = receiver.receptions.get(folder)
        if reception is not None:
            reception.add(News(heard, *counts))

    def _lost(self, receiver: _Receiver) -> None:
        """Take back what a receiver that has ended was lent."""
        with self._lock:
            wanted = self._receivers.get(receiver.slot) is receiver
            if wanted:
                del self._receivers[receiver.slot]
                if not receiver.isready:
                    self._calm_until = time.monotonic() + CALM_S
            lent, receiver.lent = list(receiver.lent.values()), {}
            receiver.channel.close()
        if wanted:
            broken = len(lent) if receiver.isready else 0
            logger.error("a process that receives has ended, and with it %d associations", broken)
        if wanted or lent:  # it may have kept what it has not told of
            for reception in receiver.receptions.values():
                try:
                    reception.look()
                except Exception:  # a folder that has gone, or a disk: the associations are over all the same
                    logger.exception("what %s has received can't be looked for now", reception.terms.name)
        for one in lent:
            (one.over if receiver.isready else one.back)()


def _terms(reception: Reception) -> dict[str, Any]:
    """Return the terms that a receiver needs."""
    return asdict(replace(reception.terms, senders=()))


def _send(to: socket.socket, message: bytes, fds: Sequence[int] = ()) -> None:
    """Send a message, if that is possible at once; `socket.send_fds` forgets its flags.

    Raises:
        OSError: the other end has gone, or does not read; or the message is too long.
    """
    if len(message) > MOST_BYTES:
        raise OSError(errno.EMSGSIZE, os.strerror(errno.EMSGSIZE))
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds))] if fds else []
    to.sendmsg([message], rights, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
