"""Storage commitment: the peer's promise to keep what it has received.

N-ACTION asks for it; the answer, an N-EVENT-REPORT, comes on the same association or on a new one that the peer
opens to our listener, at once or much later.

Source: PS3.4 Annex J (Storage Commitment Push Model), PS3.3 section C.14.1.1 (failure reasons).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from pydicom.dataset import Dataset
from pydicom.uid import generate_uid
from pynetdicom import evt

from protocols.dimse.association import Association, associate
from protocols.dimse.contexts import UNCOMPRESSED
from protocols.dimse.listener import Listener
from protocols.dimse.transport import Peer
from protocols.net.connection import SLICE_S
from transfer.errors import Cancelled, DispatchError, Retryable

PUSH_MODEL = "1.2.840.10008.1.20.1"
PUSH_MODEL_INSTANCE = "1.2.840.10008.1.20.1.1"
REQUEST_COMMITMENT = 1  # action type, PS3.4 table J.3-1
BATCH = 10_000  # instances in one transaction: a megabyte of UIDs, which peers hold in memory
# How long the association stays open for a report if there is a listener too: some peers report on it as long as it
# is there, others only after it has ended.
LINGER_S = 3.0
ANSWER_S = 2.0  # for pynetdicom to send the response to a report

REASONS = {
    0x0110: "processing failure",
    0x0112: "no such object instance",
    0x0119: "class-instance conflict",
    0x0122: "referenced SOP class not supported",
    0x0131: "duplicate transaction UID",
    0x0213: "resource limitation",
}


class CannotCommit(Exception):
    """The peer gives no commitment; the text says why."""


@dataclass
class Transaction:
    """One request and the report on it.

    Attributes:
        instances: SOP class by SOP instance UID.
        committed: the instances that the peer takes responsibility for.
        failed: failure reason (0008,1197) of those that it doesn't.
        refused: why it takes none, though it has taken an earlier transaction.
    """

    instances: dict[str, str]
    uid: str = field(default_factory=lambda: str(generate_uid(prefix=None)))  # can't be guessed: 2.25 and a UUID
    committed: set[str] = field(default_factory=set)
    failed: dict[str, int] = field(default_factory=dict)
    refused: str = ""
    reported: threading.Event = field(default_factory=threading.Event)

    def take(self, report: Dataset) -> None:
        """Take the report (PS3.4 table J.3-2); instances that were not asked for are ignored."""
        for one in report.get("ReferencedSOPSequence") or ():
            self.committed.add(str(one.get("ReferencedSOPInstanceUID", "")))
        for one in report.get("FailedSOPSequence") or ():
            self.failed[str(one.get("ReferencedSOPInstanceUID", ""))] = _reason(one)
        self.failed = {uid: reason for uid, reason in self.failed.items() if uid in self.instances}
        self.committed = (self.committed & self.instances.keys()) - self.failed.keys()
        self.reported.set()

    @property
    def request(self) -> Dataset:
        """Return the action information (PS3.4 table J.3-1)."""
        ds = Dataset()
        ds.TransactionUID = self.uid
        references = []
        for uid, sop_class in self.instances.items():
            one = Dataset()
            one.ReferencedSOPClassUID, one.ReferencedSOPInstanceUID = sop_class, uid
            references.append(one)
        ds.ReferencedSOPSequence = references
        return ds


def _reason(failed: Dataset) -> int:
    """Return the Failure Reason (0008,1197), or 0110 (processing failure) if a peer gives none."""
    try:
        return int(failed.get("FailureReason") or 0x0110)
    except (TypeError, ValueError):
        return 0x0110


class Transactions:
    """The transactions that wait for a report, by UID; reports may come from any thread."""

    def __init__(self) -> None:
        self._open: dict[str, Transaction] = {}
        self._lock = threading.Lock()

    def add(self, transaction: Transaction) -> None:
        with self._lock:
            self._open[transaction.uid] = transaction

    def remove(self, transaction: Transaction) -> None:
        with self._lock:
            self._open.pop(transaction.uid, None)

    def report(self, event: evt.Event, served: list[threading.Thread] | None = None) -> tuple[int, Dataset | None]:
        """Handle an N-EVENT-REPORT; return the status of the response.

        Args:
            served: called with the thread of pynetdicom's that will send the response.
        """
        if served is not None:
            served.append(threading.current_thread())
        try:
            report = event.event_information
            with self._lock:
                transaction = self._open.get(str(report.get("TransactionUID", "")))
            if transaction is None:
                return 0x0112, None  # no such object instance: a report that nobody waits for (any more)
            transaction.take(report)
        except Exception:  # whatever a peer sends must not end the listener
            return 0x0110, None
        return 0x0000, None


OPEN = Transactions()  # of this process: listeners are shared by all its dispatches


def report_listener(host: str, port: int, ae_title: str) -> Listener:
    """Listen for reports on associations that peers open."""
    return Listener(host, port, ae_title, [PUSH_MODEL], [(evt.EVT_N_EVENT_REPORT, OPEN.report)])


def commit(
    peer: Peer,
    instances: dict[str, str],
    wait_s: float,
    listener: Listener | None,
    check: Callable[[], None] = lambda: None,
) -> list[Transaction]:
    """Ask a peer to commit itself to instances (SOP class by UID), and wait for its reports.

    Args:
        wait_s: seconds to wait for a report, from its request on.
        listener: where reports on new associations come in; None to wait on the same association only.

    Returns:
        The transactions; those that were not reported on in time have `reported` unset. Behind one that the peer
        refuses, it is asked for no more.

    Raises:
        CannotCommit: the peer doesn't support it, or doesn't answer the first request.
        Retryable: there is no association now. Cancelled: by `check`.
    """
    uids = list(instances)
    transactions = [
        Transaction({uid: instances[uid] for uid in uids[at : at + BATCH]}) for at in range(0, len(uids), BATCH)
    ]
    for transaction in transactions:
        OPEN.add(transaction)
    try:
        end, asked = 0.0, list[Transaction]()
        for transaction in transactions:
            begun = time.monotonic()
            try:
                _ask(peer, transaction, min(wait_s, LINGER_S) if listener else wait_s, check)
            except CannotCommit as exc:
                if not asked:
                    raise
                transaction.refused = str(exc)
                break
            asked.append(transaction)
            end = begun + wait_s
        if listener:
            for transaction in asked:
                _wait(transaction, end, check)
    finally:
        for transaction in transactions:
            OPEN.remove(transaction)
    return transactions


def _ask(peer: Peer, transaction: Transaction, wait_s: float, check: Callable[[], None]) -> None:
    """Ask for one transaction, and wait for the report on the same association.

    Uses an association of its own: a report on one transaction during the request for the next would make pynetdicom's
    threads wait for each other.
    """
    served: list[threading.Thread] = []
    handlers = [(evt.EVT_N_EVENT_REPORT, OPEN.report, [served])]
    try:
        association = associate(peer, [(PUSH_MODEL, UNCOMPRESSED)], check, handlers=handlers)
    except (Retryable, Cancelled):
        raise
    except DispatchError as exc:
        raise CannotCommit(exc.message) from exc
    if not association.accepted:
        raise CannotCommit("the peer does not support storage commitment")
    try:
        _request(association, transaction, check)
        _wait(transaction, time.monotonic() + wait_s, check, association)
    except CannotCommit:
        association.release()
        raise
    except Retryable as exc:
        association.abort()
        # A peer that doesn't know what to say to N-ACTION wouldn't know it the next time either.
        raise CannotCommit(exc.message) from exc
    except BaseException:
        association.abort()
        raise
    for thread in served:
        thread.join(ANSWER_S)
    association.release()


def _request(association: Association, transaction: Transaction, check: Callable[[], None]) -> None:
    """Send one N-ACTION and wait for its response."""
    begun = time.monotonic()
    status, _ = association.call(
        "N-ACTION",
        lambda assoc: assoc.send_n_action(transaction.request, REQUEST_COMMITMENT, PUSH_MODEL, PUSH_MODEL_INSTANCE),
        check,
    )
    if "Status" not in status:
        raise association.lost("N-ACTION", begun)
    if status.Status != 0:
        raise CannotCommit(f"the peer refused storage commitment with status {status.Status:04X}")


def _wait(
    transaction: Transaction, end: float, check: Callable[[], None], association: Association | None = None
) -> None:
    """Wait until it is reported, the time is up, or the association for the report has ended."""
    while not transaction.reported.wait(min(SLICE_S, max(0.0, end - time.monotonic()))):
        check()
        if time.monotonic() >= end or (association is not None and not association.assoc.is_established):
            return


def reason(code: int) -> str:
    """Return a failure reason in words."""
    return f"storage commitment failed: {code:04X} {REASONS.get(code, 'unknown reason')}"
