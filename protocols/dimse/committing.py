"""Storage commitment as its SCP: promises a sender to keep what it has sent, which is what lies on disk or has arrived.

N-ACTION is answered at once. The report, an N-EVENT-REPORT, follows on the same association or, where a port of the
sender is known, on one that we open when the sender's is over; one that can't be sent is kept on disk and tried again.

Source: PS3.4 Annex J (Storage Commitment Push Model), PS3.7 sections 10.1.1 and 10.1.4.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydicom.dataset import Dataset
from pydicom.filebase import DicomBytesIO
from pydicom.filereader import read_dataset
from pydicom.filewriter import write_dataset

from imaging.header import IMPLICIT_LITTLE, UID
from protocols.dimse.command import (
    AFFECTED_CLASS,
    AFFECTED_INSTANCE,
    DATASET_TYPE,
    FIELD,
    MESSAGE_ID,
    RESPONDED_TO,
    STATUS,
    CommandSet,
    encoded,
)
from protocols.dimse.commitment import PUSH_MODEL, PUSH_MODEL_INSTANCE, REQUEST_COMMITMENT
from protocols.dimse.contexts import UNCOMPRESSED
from protocols.dimse.direct import associate
from protocols.dimse.message import NO_DATASET
from protocols.dimse.stream import pdus
from protocols.dimse.transport import Peer
from protocols.net import tls
from transfer.database import LOST
from transfer.errors import Cancelled, DispatchError
from transfer.oserrors import words_of
from transfer.spool import sync

if TYPE_CHECKING:
    from protocols.dimse.served import ServedAssociation

__all__ = ["PUSH_MODEL", "Commitments", "ReportTo", "Reports"]
logger = logging.getLogger(__name__)

N_EVENT_REPORT_RQ, N_EVENT_REPORT_RSP, N_ACTION_RQ, N_ACTION_RSP = 0x0100, 0x8100, 0x0130, 0x8130
REQUESTED_CLASS, EVENT_TYPE, REQUESTED_INSTANCE, ACTION_TYPE = 0x0003, 0x1002, 0x1001, 0x1008
ALL_KEPT, SOME_FAILED = 1, 2  # event types, PS3.4 table J.3-2
NO_SUCH_OBJECT = 0x0112  # failure reason, PS3.3 section C.14.1.1
PROCESSING_FAILURE, NO_SUCH_INSTANCE, NO_SUCH_CLASS, NO_SUCH_ACTION = 0x0110, 0x0112, 0x0118, 0x0123  # PS3.7 Annex C
RESOURCE_LIMITATION = 0x0213
MOST_REQUEST = 1 << 24  # bytes; 100,000 instances
MOST_WAITING = 10_000  # reports; who asks then is told to ask again
PATIENCE_S = 3.0  # for the sender to end its association before its report comes on another one
WAITS_S = (5.0, 30.0, 120.0, 600.0, 3600.0)  # before a report is tried again, the last until it is given up
GIVEN_UP_S = 86_400.0  # after its request: senders ask again by then
CONNECT_S = IDLE_S = 10.0


@dataclass(frozen=True)
class ReportTo:
    """Whom to report to.

    Attributes:
        calling: our AE title.
        called, host, port: the sender's; port 0 if it listens on none.
    """

    calling: str
    called: str
    host: str
    port: int = 0


class Commitments:
    """Serves the requests of one association.

    Args:
        holds: returns which instances (SOP class by UID) are kept; raises one of `LOST` if nobody knows now.
        folder: where reports wait that go to an association of their own.
        has_room: whether its disk has room for one more.
    """

    def __init__(
        self,
        holds: Callable[[Mapping[str, str]], set[str]],
        to: ReportTo,
        reports: Reports,
        folder: Path,
        has_room: Callable[[], bool],
    ) -> None:
        self._holds, self._to, self._reports, self._folder, self._has_room = holds, to, reports, folder, has_room
        self._message = 0
        self._waiting: dict[int, str] = {}  # transactions that were reported on here, by message

    def serve(self, association: ServedAssociation, request: CommandSet) -> bool:
        """Serve an N-ACTION, or take the answer to a report; return False for anything else."""
        if request.kind == N_EVENT_REPORT_RSP:
            self._answered(request)
            if request.has_dataset:
                association.stream.skip()
            return True
        if request.kind != N_ACTION_RQ:
            return False
        status, transaction, instances = self._read(association, request)
        report = {}
        if status == 0:
            try:
                report = _outcome(transaction, instances, self._holds(instances))
            except LOST as exc:  # none of them is known to be lost: the sender is to ask again, not to send again
                logger.warning("nobody knows now what %s may delete: %s", self._to.called, exc)
                status = RESOURCE_LIMITATION
            if status == 0 and self._to.port and not self._is_put(report):
                status = RESOURCE_LIMITATION
        answer: dict[int, int | str | bytes] = {
            AFFECTED_CLASS: PUSH_MODEL,
            FIELD: N_ACTION_RSP,
            RESPONDED_TO: request.number(MESSAGE_ID) or 0,
            DATASET_TYPE: NO_DATASET,
            STATUS: status,
            AFFECTED_INSTANCE: PUSH_MODEL_INSTANCE,
            ACTION_TYPE: REQUEST_COMMITMENT,
        }
        association.stream.send(pdus(request.context, encoded(answer), None, association.max_pdu))
        if status == 0 and not self._to.port:
            self._message += 1
            self._waiting[self._message] = transaction
            syntax = association.contexts[request.context][1]
            association.stream.send(_event(request.context, self._message, report, syntax, association.max_pdu))
        return True

    def _is_put(self, report: dict[str, Any]) -> bool:
        """Return whether a report will be sent; if not, the sender is to ask again later."""
        if self._has_room() and self._reports.waiting < MOST_WAITING:
            try:
                self._reports.put(self._folder, self._to, report)
            except OSError as exc:
                logger.warning("no report of storage commitment can be kept: %s", words_of(exc))
            else:
                return True
        return False

    def _read(self, association: ServedAssociation, request: CommandSet) -> tuple[int, str, dict[str, str]]:
        """Return the status to answer with, the transaction, and its instances: SOP class by UID."""
        data = association.stream.dataset(MOST_REQUEST) if request.has_dataset else b""
        abstract, syntax = association.contexts.get(request.context, ("", ""))
        if abstract != PUSH_MODEL or request.uid(REQUESTED_CLASS) != PUSH_MODEL:
            return NO_SUCH_CLASS, "", {}
        if request.uid(REQUESTED_INSTANCE) != PUSH_MODEL_INSTANCE:
            return NO_SUCH_INSTANCE, "", {}
        if request.number(ACTION_TYPE) != REQUEST_COMMITMENT:
            return NO_SUCH_ACTION, "", {}
        try:
            asked = read_dataset(BytesIO(data), syntax == IMPLICIT_LITTLE, True)
            transaction = str(asked.TransactionUID)
            instances = {
                str(one.ReferencedSOPInstanceUID): str(one.ReferencedSOPClassUID) for one in asked.ReferencedSOPSequence
            }
        except Exception:  # whatever pydicom raises for what a sender makes up
            return PROCESSING_FAILURE, "", {}
        if not UID.fullmatch(transaction) or not all(UID.fullmatch(uid) for uid in instances):
            return PROCESSING_FAILURE, "", {}
        return 0, transaction, instances

    def _answered(self, response: CommandSet) -> None:
        transaction = self._waiting.pop(response.number(RESPONDED_TO) or 0, "")
        status = response.number(STATUS)
        if transaction and status:
            logger.warning("%s answered a report of storage commitment with %04X", self._to.called, status)

    def ended(self) -> None:
        """Note that the association is over: what waits for that may be reported now."""
        for _ in self._waiting:
            logger.warning(
                "%s ended its association without an answer to a report of storage commitment: if it expects reports "
                "on a new association, set its port among the peers",
                self._to.called,
            )
        if self._to.port:
            self._reports.hurry(self._to)


@dataclass
class _Due:
    """A report that waits to be sent."""

    path: Path
    to: ReportTo
    report: dict[str, Any]
    asked: float  # seconds since the epoch
    at: float  # `time.monotonic`
    tries: int = 0


class Reports:
    """Sends reports on associations of our own, in a thread, until they are answered; they outlive the process.

    Args:
        security: returns the TLS settings of the source whose folder of reports has this name; None for plain
            connections.
    """

    def __init__(self, security: Callable[[str], tls.Tls | None] = lambda source: None) -> None:
        self._security = security
        self._due: dict[Path, _Due] = {}
        self._changed = threading.Condition()
        self._closed = False
        self._thread: threading.Thread | None = None

    def put(self, folder: Path, to: ReportTo, report: dict[str, Any]) -> None:
        """Keep a report on disk, and send it soon, in place of one on the same transaction that waits.

        Raises:
            OSError: it can't be written.
        """
        now = time.time()
        if not folder.is_dir():
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            for made in (folder.parent.parent, folder.parent):
                sync(made)
        who = "\0".join((to.calling, to.called, to.host, str(to.port), str(report["transaction"])))
        path = folder / f"{hashlib.sha256(who.encode()).hexdigest()[:32]}.json"  # others may make up the same UID
        part = path.with_suffix(".part")
        with self._changed:  # the report before, on the same transaction, may have just been answered
            with open(os.open(part, os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_CLOEXEC, 0o600), "w") as file:
                json.dump({"to": asdict(to), "report": report, "asked": now}, file)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
            sync(folder)
            self._add(_Due(path, to, report, now, time.monotonic() + PATIENCE_S))

    def take_up(self, folder: Path) -> None:
        """Send what waited when the process ended."""
        for path in folder.glob("*.json") if folder.is_dir() else ():
            try:
                kept = json.loads(path.read_text())
                due = _Due(path, ReportTo(**kept["to"]), kept["report"], kept["asked"], time.monotonic())
            except (OSError, ValueError, KeyError, TypeError):
                logger.warning("%s can't be read: no report is made of it", path)
                continue
            self._add(due)

    def hurry(self, to: ReportTo) -> None:
        """Send what waits for the end of a sender's association."""
        with self._changed:
            for due in self._due.values():
                if due.to == to and not due.tries:
                    due.at = time.monotonic()
            self._changed.notify()

    def close(self) -> None:
        """Send nothing more."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    @property
    def waiting(self) -> int:
        """How many reports have not been answered yet."""
        return len(self._due)

    def _add(self, due: _Due) -> None:
        with self._changed:
            self._due[due.path] = due
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="commitment-reports", daemon=True)
                with suppress(RuntimeError):  # no more threads now: the next report begins it
                    thread.start()
                    self._thread = thread
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                if self._closed:
                    return
                due = min(self._due.values(), key=lambda one: one.at, default=None)
                wait = None if due is None else due.at - time.monotonic()
                if due is None or (wait is not None and wait > 0):
                    self._changed.wait(wait)
                    continue
            sent = self._sent(due)
            with self._changed:
                if (sent or time.time() - due.asked > GIVEN_UP_S) and self._due.get(due.path) is due:
                    with suppress(OSError):  # else another took its place meanwhile
                        due.path.unlink()
                    del self._due[due.path]
                self._see_to_others(due, sent=sent)

    def _see_to_others(self, tried: _Due, *, sent: bool) -> None:
        """Let all that go to one sender wait for one of them: each takes seconds where it does not answer."""
        alike, now = [one for one in self._due.values() if one.to == tried.to], time.monotonic()
        if sent:
            for one in alike:
                if one.tries:
                    one.at, one.tries = now, 0
            return
        known = max((one.tries for one in alike if one is not tried), default=0)
        if tried.tries >= known:
            at, tries = now + WAITS_S[min(tried.tries, len(WAITS_S) - 1)], tried.tries + 1
        else:  # it is new, and the others wait already
            at, tries = max(one.at for one in alike if one.tries == known), known
        for one in (*alike, tried):
            if one.at <= at:
                one.at, one.tries = at, tries
        tried.at += 1e-3  # it may be this report that fails: another one is the next

    def _sent(self, due: _Due) -> bool:
        to, source = due.to, due.path.parent.name
        try:
            peer = Peer(to.host, to.port, to.called, to.calling, CONNECT_S, IDLE_S, tls=self._security(source))
            status = _report(peer, due.report, self._check)
        except Cancelled:
            return False
        except DispatchError as exc:
            logger.warning("a report of storage commitment waits: %s", exc.message)
            return False
        except Exception:  # whatever it is, it must not keep the others
            logger.exception("a report of storage commitment to %s waits", to.called)
            return False
        if status:
            logger.warning("%s answered a report of storage commitment with %04X", to.called, status)
        return True

    def _check(self) -> None:
        if self._closed:
            raise Cancelled("the listener ends")


def _report(peer: Peer, report: Mapping[str, Any], check: Callable[[], None]) -> int:
    """Report on an association of our own; return the status of the answer.

    Raises:
        DispatchError: it was not sent, or not answered.
    """
    association = associate(peer, [(PUSH_MODEL, UNCOMPRESSED)], check, providers=[PUSH_MODEL])
    if not association.accepted:
        raise DispatchError(f"{peer.where}: the peer takes no reports of storage commitment")
    try:
        (_, syntax), context = next(iter(association.accepted.items()))
        association.stream.send(_event(context, 1, report, syntax, association.max_send))
        answer = association.stream.command()
        while answer.kind != N_EVENT_REPORT_RSP:
            if answer.has_dataset:
                association.stream.skip()
            answer = association.stream.command()
        if answer.has_dataset:
            association.stream.skip()
    except BaseException:
        association.abort()
        raise
    association.release()
    return answer.number(STATUS) or 0


def _outcome(transaction: str, instances: Mapping[str, str], kept: set[str]) -> dict[str, Any]:
    return {
        "transaction": transaction,
        "kept": {uid: sop_class for uid, sop_class in instances.items() if uid in kept},
        "failed": {uid: sop_class for uid, sop_class in instances.items() if uid not in kept},
    }


def _event(context: int, message: int, report: Mapping[str, Any], syntax: str, most: int) -> bytes:
    """Return an N-EVENT-REPORT request as PDUs."""
    command: dict[int, int | str | bytes] = {
        AFFECTED_CLASS: PUSH_MODEL,
        FIELD: N_EVENT_REPORT_RQ,
        MESSAGE_ID: message,
        DATASET_TYPE: 1,
        AFFECTED_INSTANCE: PUSH_MODEL_INSTANCE,
        EVENT_TYPE: SOME_FAILED if report["failed"] else ALL_KEPT,
    }
    ds = Dataset()
    ds.TransactionUID = report["transaction"]
    if report["kept"]:
        ds.ReferencedSOPSequence = [_reference(*one) for one in report["kept"].items()]
    if report["failed"]:
        ds.FailedSOPSequence = [_reference(*one) for one in report["failed"].items()]
        for one in ds.FailedSOPSequence:
            one.FailureReason = NO_SUCH_OBJECT
    out = DicomBytesIO()
    out.is_little_endian, out.is_implicit_VR = True, syntax == IMPLICIT_LITTLE
    write_dataset(out, ds)
    return pdus(context, encoded(command), out.getvalue(), most)


def _reference(uid: str, sop_class: str) -> Dataset:
    one = Dataset()
    one.ReferencedSOPClassUID, one.ReferencedSOPInstanceUID = sop_class, uid
    return one
