"""DICOM targets, plain and with TLS: C-ECHO, C-STORE and C-FIND."""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from blocks.base import check_host
from blocks.dicom import SENDER, DicomTarget
from blocks.dicom_tls import DicomTlsTarget, TlsProfile
from imaging.query import Match, Query
from imaging.transcode import NEVER
from protocols.dimse import transport
from protocols.dimse.asking import ROOMS, Asking
from protocols.dimse.association import Association, about_contexts, negotiate
from protocols.dimse.commitment import CannotCommit, commit, reason, report_listener
from protocols.dimse.contexts import UNCOMPRESSED, names
from protocols.dimse.find import CannotList, Stored, missing
from protocols.dimse.fleet import Fleet
from protocols.dimse.listener import Listener
from protocols.dimse.message import VERIFICATION
from protocols.dimse.moves import addresses
from protocols.dimse.ports import shared
from protocols.dimse.query import STUDY_ROOT_FIND, finder
from protocols.dimse.search import PeerSearch
from protocols.dimse.transport import Peer
from protocols.net import tls
from tasks import dicom_move, dicom_pull
from tasks.driver import Driver, Facts
from tasks.probes import reach
from tasks.quiet import Quiet
from transfer import granted, stopping
from transfer.errors import DispatchError, Misconfigured, TimedOut
from transfer.health import Health
from transfer.plan import Item, Origin, Plan, header_of
from transfer.receipt import Level, PushReport, Receipt
from transfer.throttle import Throttle
from transfer.validation import check_aet

BOGUS = "1.2.826.0.1.3680043.8.498.0"  # a UID below pydicom's root that no study has
NOBODY = "TALARIA-PROBE"  # for peers that know studies below a patient only
NOTHING = {"StudyInstanceUID": BOGUS, "PatientID": NOBODY}
LISTEN_S = 10  # for another process to give up the port on which commitment reports come in
# What `check` asks for beside C-ECHO: the classes that most studies are made of, and the syntaxes that they come in.
CHECKED_CLASSES = (
    "1.2.840.10008.5.1.4.1.1.2",  # CT
    "1.2.840.10008.5.1.4.1.1.2.1",  # Enhanced CT
    "1.2.840.10008.5.1.4.1.1.4",  # MR
    "1.2.840.10008.5.1.4.1.1.1",  # CR
    "1.2.840.10008.5.1.4.1.1.1.1",  # DX for presentation
    "1.2.840.10008.5.1.4.1.1.6.1",  # US
    "1.2.840.10008.5.1.4.1.1.7",  # Secondary Capture
    "1.2.840.10008.5.1.4.1.1.12.1",  # XA
    "1.2.840.10008.5.1.4.1.1.20",  # NM
    "1.2.840.10008.5.1.4.1.1.128",  # PET
    "1.2.840.10008.5.1.4.1.1.66.4",  # Segmentation
    "1.2.840.10008.5.1.4.1.1.88.33",  # Comprehensive SR
    "1.2.840.10008.5.1.4.1.1.104.1",  # Encapsulated PDF
    "1.2.840.10008.5.1.4.1.1.481.3",  # RT Structure Set
)
CHECKED_SYNTAXES = (
    *UNCOMPRESSED,
    "1.2.840.10008.1.2.1.99",  # deflated
    "1.2.840.10008.1.2.4.50",  # JPEG baseline
    "1.2.840.10008.1.2.4.70",  # JPEG lossless, first-order prediction
    "1.2.840.10008.1.2.4.80",  # JPEG-LS lossless
    "1.2.840.10008.1.2.4.90",  # JPEG 2000 lossless
    "1.2.840.10008.1.2.5",  # RLE
)


def connect(target: DicomTarget, origin: Origin) -> Peer:
    """Return the peer that the target means for a study that came from `origin`.

    Raises:
        Misconfigured: the target takes something from the study's origin, and the study has none.
    """
    host, called, calling = target.host, target.aet_target, target.aet_source
    if host == SENDER:
        host = _from_origin(target, check_host, origin.sender_host, "host is sender", "--sender-host")
    if target.pass_sender_aet:
        calling = _from_origin(target, check_aet, origin.sender_aet, "pass_sender_aet is on", "--sender-aet")
    if target.pass_receiver_aet:
        called = _from_origin(target, check_aet, origin.receiver_aet, "pass_receiver_aet is on", "--receiver-aet")
    return _peer(target, host, called, calling)


def _peer(target: DicomTarget, host: str, called: str, calling: str) -> Peer:
    return Peer(
        host,
        target.port,
        called,
        calling,
        connect_timeout_s=target.connect_timeout_s,
        idle_timeout_s=target.idle_timeout_s,
        max_pdu=target.max_pdu,
        tls=_tls(target),
    )


def _from_origin(target: DicomTarget, check: Callable[[str], str], value: str, why: str, option: str) -> str:
    if not value.strip():
        raise Misconfigured(f"{why}, but this dispatch does not say where the study came from: {option}", target.name)
    try:
        return check(value)
    except ValueError as exc:
        raise Misconfigured(f"{why}, but the study's origin can't be used: {exc}", target.name) from exc


def _tls(target: DicomTarget) -> tls.Tls | None:
    if not isinstance(target, DicomTlsTarget):
        return None
    return tls.Tls(
        ca=target.ca_cert,
        cert=target.tls_cert,
        key=target.tls_key.get_secret_value(),
        key_password=target.tls_key_password.get_secret_value(),
        verify_hostname=target.verify_hostname,
        profile=str(target.tls_profile),
    )


def check(target: DicomTarget) -> Health:
    """Probe name, TCP, TLS, association, C-ECHO and the presentation contexts that the peer accepts."""
    health = Health()
    probes = ["resolve", "tcp", *(["tls"] if isinstance(target, DicomTlsTarget) else []), "associate", "echo"]
    probes += ["find", "retrieve"] if target.queries else []
    if target.host == SENDER:
        health.skip(*probes, why="the node is known only when a study has come from it")
        return health
    association: Association | None = None
    try:
        association = _probe(health, target)
    finally:
        if association is not None:
            association.release()
    if health.ok and target.queries:
        _probe_queries(health, _peer(target, target.host, target.aet_target, target.aet_source))
    health.skip(*probes[len(health.probes) :])
    return health


def _probe_queries(health: Health, peer: Peer) -> None:
    """Find and get a study that doesn't exist, and ask for C-MOVE; only a real move shows whether it arrives."""
    with health.probe("find") as probe:
        with finder(peer) as asked:
            found = list(asked.ask_for("STUDY", NOTHING, ("StudyDate",)))
        root = "Study Root" if asked.root == STUDY_ROOT_FIND else "Patient Root"
        probe.detail = f"C-FIND is answered ({root})"
        if found:
            probe.detail += "; it ignores query keys, so its answers are filtered here"
    if not health.ok:
        return
    with health.probe("retrieve") as probe:
        probe.detail = dicom_pull.granted(peer, NOTHING)


def check_move(target: DicomTarget, health: Health) -> None:
    """Probe whether the peer knows us as a move destination: it moves one instance to our Storage SCP."""
    peer = _peer(target, target.host, target.aet_target, target.aet_source)
    dicom_move.probe_move(health, peer, Quiet(target).text)


def _probe(health: Health, target: DicomTarget) -> Association | None:
    """Make the probes on one connection, each on top of the previous one; stop at the first that fails."""
    # A check has no study: titles that would come from one are replaced by the target's own.
    peer = _peer(target, target.host, target.aet_target, target.aet_source)
    shake = partial(_shake, peer, peer.tls) if peer.tls else None
    sock = reach(health, peer.host, peer.port, peer.connect_timeout_s, shake=shake)
    if sock is None:
        return None
    association: Association | None = None
    with health.probe("associate") as probe:
        made, tried, note = _negotiate(sock, peer)
        if not made.accepted:
            made.release()
            raise Misconfigured(f"{peer.where}: the peer accepted the association, but none of what was offered")
        association, probe.detail = made, "; ".join([_accepted(made, tried) + note, *_legacy(target)])
        probe.facts["transfer_syntaxes"] = [names([one]) for one in _syntaxes(made)]
    if association is None:
        return None
    with health.probe("echo"):
        if not any(abstract == VERIFICATION for abstract, _ in association.accepted):
            raise Misconfigured(f"{peer.where}: the peer does not accept the Verification SOP class (C-ECHO)")
        association.echo()
    return association


def _shake(peer: Peer, settings: tls.Tls, sock: socket.socket) -> ssl.SSLSocket:
    wrapped = transport.handshake(sock, peer, settings)
    transport.verdict(wrapped, peer, settings)
    return wrapped


def _negotiate(sock: socket.socket, peer: Peer) -> tuple[Association, tuple[str, ...], str]:
    """Ask for an association with many contexts or, if the peer refuses that, with as few as a push.

    Returns:
        The association, the storage classes that were asked for, and a note if the peer takes few contexts only.
    """
    pairs: list[tuple[str, tuple[str, ...]]] = [
        (each, (syntax,)) for syntax in CHECKED_SYNTAXES for each in CHECKED_CLASSES
    ]
    verification: list[tuple[str, tuple[str, ...]]] = [(VERIFICATION, UNCOMPRESSED)]
    note = ""
    try:
        return negotiate(sock, peer, verification + pairs[: ROOMS[0]]), CHECKED_CLASSES, note
    except DispatchError as exc:
        if not about_contexts(exc):
            raise
        ended = exc
    asking = Asking(peer, NEVER, silent=isinstance(ended, TimedOut))
    if asking.answers(stopping.check):
        for room in ROOMS[1:]:
            asked = verification + pairs[: min(room, len(CHECKED_CLASSES))]
            note = f"; the peer refuses an association with {len(pairs) + 1} contexts, so it was asked for {len(asked)}"
            try:
                return asking.associate(asked, stopping.check), tuple(each for each, _ in asked[1:]), note
            except DispatchError as exc:
                if not about_contexts(exc):
                    raise
    raise ended


def _accepted(association: Association, tried: Sequence[str]) -> str:
    """Return a sentence on the storage contexts that a peer accepts."""
    stored = {abstract for abstract, _ in association.accepted} - {VERIFICATION}
    refused = [each for each in tried if each not in stored]
    text = f"accepts {len(stored)} of {len(tried)} storage classes tried"
    if refused:
        text += f" (not {names(refused)})"
    return f"{text}; transfer syntaxes: {names(_syntaxes(association))}"


def _syntaxes(association: Association) -> list[str]:
    """Return the transfer syntaxes that a peer accepts for storage, in the order in which they were tried."""
    found = {syntax for abstract, syntax in association.accepted if abstract != VERIFICATION}
    return [one for one in CHECKED_SYNTAXES if one in found]


def _legacy(target: DicomTarget) -> tuple[str, ...]:
    """Return a hint if a target's connections may be weakly encrypted."""
    if isinstance(target, DicomTlsTarget) and target.tls_profile is TlsProfile.LEGACY:
        return ("tls_profile legacy: the connection may use TLS 1.0 and suites without forward secrecy",)
    return ()


def push(target: DicomTarget, plan: Plan, report: PushReport) -> Receipt:
    """Store the plan's pending instances, over `concurrency` associations, and verify as the target says."""
    peer = connect(target, plan.origin)
    fleet = Fleet(peer, plan, report, target.concurrency, str(target.transcode), Throttle(target.bandwidth_limit))
    fleet.deliver()
    level, notes = _verify(target, peer, plan, report)
    return report.receipt(target.name, plan, verified=level, notes=(*fleet.notes, *notes, *_legacy(target)))


def _verify(target: DicomTarget, peer: Peer, plan: Plan, report: PushReport) -> tuple[Level, list[str]]:
    """Verify at the target's level or the best one below it; note why it is below."""
    arrived: dict[str, list[Item]] = {}
    for item in plan.items:
        if item.header is not None and report.arrived(plan, item):
            arrived.setdefault(item.header.SOPInstanceUID, []).append(item)
    notes: list[str] = []
    if target.verify is Level.ACCEPTED or not arrived:
        return Level.ACCEPTED, notes
    renamed = {uid: items for uid, items in arrived.items() if any(report.elsewhere(plan, one) for one in items)}
    if target.verify is Level.PROVEN:
        try:
            there = {uid: items for uid, items in arrived.items() if uid not in renamed}
            arrived = renamed | (_prove(target, peer, there, report, notes) if there else {})
        except CannotCommit as exc:
            notes.append(f"not proven: {exc}")
        if not arrived:
            return Level.PROVEN, notes
    try:
        wanted = [_stored(items[0]) for items in arrived.values()]
        absent = missing(peer, wanted, report.check)
        for uid in absent - renamed.keys():
            for item in arrived[uid]:
                report.revoke(item, "confirmed by the peer, but it does not list the instance afterwards")
        if lost := absent & renamed.keys():
            notes.append(f"{len(lost)} instance(s) can't be verified: the peer stored them under other UIDs")
            return Level.ACCEPTED, notes
    except CannotList as exc:
        notes.append(f"not listed: {exc}")
        return Level.ACCEPTED, notes
    return Level.LISTED, notes


def _prove(
    target: DicomTarget, peer: Peer, arrived: dict[str, list[Item]], report: PushReport, notes: list[str]
) -> dict[str, list[Item]]:
    """Ask for storage commitment; revoke what is refused, and return what the peer's report leaves out."""
    peer = replace(peer, called=target.storage_commitment_aet or peer.called)
    instances = {uid: header_of(items[0]).SOPClassUID for uid, items in arrived.items()}
    with ExitStack() as stack:
        listener = None
        if target.storage_commitment_port:
            try:
                listener = stack.enter_context(_listen(target, peer, report))
            except Misconfigured as exc:
                notes.append(f"storage commitment is awaited on the same association only: {exc.message}")
        transactions = commit(peer, instances, target.storage_commitment_wait_s, listener, report.check)
    left = dict(arrived)
    for transaction in transactions:
        for uid, code in transaction.failed.items():
            for item in left.pop(uid, ()):
                report.revoke(item, reason(code))
        for uid in transaction.committed:
            left.pop(uid, None)
    if left:
        refused = "".join(transaction.refused for transaction in transactions)
        why = refused or "the report leaves them out"
        if not refused and not all(transaction.reported.is_set() for transaction in transactions):
            why = f"no report within {target.storage_commitment_wait_s:g} s"
            if listener is None:
                why += " or before the association that it was to come on ended"
        notes.append(f"not proven: storage commitment of {len(left)} of {len(arrived)} instances: {why}")
    return left


@contextmanager
def _listen(target: DicomTarget, peer: Peer, report: PushReport) -> Iterator[Listener]:
    """Listen for reports on associations that the peer opens, under the AE title that it knows us by.

    Raises:
        Misconfigured: the port, or the TLS settings, can't be used, or others await the peer with other settings.
    """
    host, port, end = target.storage_commitment_host, target.storage_commitment_port, time.monotonic() + LISTEN_S
    settings = peer.tls if peer.tls and peer.tls.cert else None

    def check() -> None:
        report.check()
        if time.monotonic() >= end:
            raise Misconfigured(
                f"another target at {peer.host} has other TLS settings, and awaits reports on port {port}: give each "
                "of them a port of its own (storage_commitment_port)"
            )

    make = partial(report_listener, host, port, peer.calling)
    with (
        shared(Listener, host, port, make, LISTEN_S, report.check) as listener,
        listener.turns.taken(addresses(peer.host, peer.port), settings, check),
    ):
        yield listener


def _stored(item: Item) -> Stored:
    header = header_of(item)
    return Stored(header.StudyInstanceUID, header.SeriesInstanceUID, header.SOPInstanceUID)


def find(target: DicomTarget, query: Query) -> Iterator[Match]:
    """Yield the studies or series that match."""
    try:
        with finder(_peer(target, target.host, target.aet_target, target.aet_source), stopping.check) as asked:
            yield from PeerSearch(asked, min(target.concurrency, granted.connections())).find(query)
    except DispatchError as exc:
        exc.target = exc.target or target.name
        raise


def retrieve(target: DicomTarget, query: Query, folder: Path, report: PushReport) -> Receipt:
    """Fetch what matches into a folder, as `<SOP instance UID>.dcm`; see `tasks.dicom_pull`."""
    try:
        return dicom_pull.retrieve(
            _peer(target, target.host, target.aet_target, target.aet_source),
            query,
            folder,
            report,
            name=target.name,
            associations=min(target.concurrency, target.max_dispatches),
            bandwidth_limit=target.bandwidth_limit,
            quote=Quiet(target).text,
        )
    except DispatchError as exc:
        exc.target = exc.target or target.name
        raise


driver = Driver(
    target=DicomTarget,
    check=check,
    push=push,
    find=find,
    retrieve=retrieve,
    check_move=check_move,
    facts=Facts(dicom_only=True, reconnects=True, verifies_by=(Level.ACCEPTED, Level.LISTED, Level.PROVEN)),
)
