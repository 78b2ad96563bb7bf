"""Retrieval from a DICOM node: find first, fetch series by series, compare with what was announced."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from imaging.query import Match, Query, text
from protocols.dimse.contexts import UNCOMPRESSED
from protocols.dimse.direct import associate
from protocols.dimse.get import PATIENT_ROOT_GET, PATIENT_ROOT_MOVE, STUDY_ROOT_GET, STUDY_ROOT_MOVE, failure, getter
from protocols.dimse.moves import MoveDestination, cannot_come
from protocols.dimse.offers import USUAL_CLASSES, pairs_for
from protocols.dimse.pull import Pull
from protocols.dimse.query import finder
from protocols.dimse.search import PeerSearch
from protocols.dimse.series import PulledSeries
from protocols.dimse.transport import Peer
from protocols.net.hiding import date_forms, forms
from protocols.net.words import clean
from tasks.pulled import compared, of_studies
from transfer import stopping
from transfer.errors import Cancelled, DispatchError, Misconfigured, NotFound
from transfer.home import Home
from transfer.receipt import Level, PushReport, Receipt
from transfer.throttle import Throttle

FEW = 8  # storage contexts, of an association on which nothing is to come
FAR_S = 0.008  # for the first answer to a query; from then on a series is worth several associations
SCP_PORT = 11_112  # unless TALARIA_SCP_PORT says otherwise; registered for DICOM


def destination() -> MoveDestination:
    """Return the destination of C-MOVE, from the settings `scp_aet`, `scp_port` and `scp_host`."""
    port = int(os.environ.get("TALARIA_SCP_PORT", SCP_PORT))
    line = None
    with suppress(OSError):  # without a state directory, nobody else is known of
        line = Home.current().root / f"scp-{port}"
    return MoveDestination(
        os.environ.get("TALARIA_SCP_AET") or "TALARIA", port, os.environ.get("TALARIA_SCP_HOST") or "", line
    )


def retrieve(
    peer: Peer,
    query: Query,
    folder: Path,
    report: PushReport,
    *,
    name: str,
    associations: int,
    bandwidth_limit: int | None,
    quote: Callable[[str], str],
) -> Receipt:
    """Fetch what matches into a folder, as `<SOP instance UID>.dcm`; what is there already is not fetched again.

    Args:
        quote: returns what may be said of the peer's own words, by the target's settings.

    Raises:
        NotFound: nothing matches.
    """

    def list_again(one: PulledSeries) -> None:
        with finder(peer, report.check) as asked:
            _list(PeerSearch(asked), one)

    with finder(peer, report.check) as asked:
        search = PeerSearch(asked)
        matches = list(search.find(replace(query, level="series")))
        series = [_series(match, search) for match in matches]
        if not series:
            raise NotFound(f"{peer.where}: nothing matches the query")
        pull = Pull(
            peer,
            series,
            folder,
            report,
            list_again,
            associations=associations,
            throttle=Throttle(bandwidth_limit),
            destination=destination(),
            far=asked.quickest_s > FAR_S,
            quote=without_patients(matches, quote),
        )
        pull.look()
        for one in series:
            if pull.wants_list(one):
                _list(search, one)
    plan = pull.run()
    receipt = report.receipt(name, plan, Level.ACCEPTED if pull.unproven else Level.LISTED, tuple(pull.notes))
    return compared(receipt, plan, series, of_studies(query, matches), pull.unproven, pull.elsewhere)


def without_patients(matches: Iterable[Match], quote: Callable[[str], str]) -> Callable[[str], str]:
    """Return `quote` for the words of a peer that may name the patients of what it was asked for."""
    named: set[str] = set()
    for one in matches:
        named |= forms(text(one.attributes.get("PatientName"))) | date_forms(
            text(one.attributes.get("PatientBirthDate"))
        )
        named.add(text(one.attributes.get("PatientID")))
    return lambda words: quote(clean(words, named - {""}))


def grants(peer: Peer) -> tuple[bool, bool]:
    """Return whether the peer grants C-GET, and whether it grants C-MOVE."""
    gets, moves = (STUDY_ROOT_GET, PATIENT_ROOT_GET), (STUDY_ROOT_MOVE, PATIENT_ROOT_MOVE)
    association = associate(peer, [(root, UNCOMPRESSED) for root in (*gets, *moves)])
    try:
        has_get, has_move = (any(association.context(root) for root in roots) for roots in (gets, moves))
    finally:
        association.release()
    return has_get, has_move


def granted(peer: Peer, nothing: Mapping[str, str]) -> str:
    """Return a sentence on which of C-GET and C-MOVE the peer grants.

    C-GET is asked for: an Orthanc accepts its context from everybody, and ends the association at the request.

    Args:
        nothing: StudyInstanceUID and PatientID that no study has.

    Raises:
        Misconfigured: neither.
    """
    has_get, has_move = grants(peer)
    at = destination()
    why = _why_no_get(peer, nothing) if has_get else ""
    if has_get and not why:
        return f"C-GET is granted, {'and C-MOVE' if has_move else 'C-MOVE is not'}"
    because = f" ({why})" if why else ""
    if not has_move:
        raise Misconfigured(f"{peer.where}: the peer grants neither C-GET nor C-MOVE: it can't be pulled from{because}")
    if obstacle := cannot_come(peer, at):
        raise Misconfigured(f"{peer.where}: the peer grants C-MOVE only, and {obstacle}{because}")
    return (
        f"C-MOVE is granted, C-GET is not: {at.aet}, port {at.port}, must be registered there as a destination{because}"
    )


def _why_no_get(peer: Peer, nothing: Mapping[str, str]) -> str:
    """Return why a peer that accepts the context of C-GET does not do it; "" if it does."""
    try:
        pairs = pairs_for(dict.fromkeys(USUAL_CLASSES, ()))[:FEW]
        with getter(peer, pairs, stopping.check, Throttle(None), lambda count: None) as asked:
            keys = {
                key: value for key, value in nothing.items() if key != "PatientID" or asked.root == PATIENT_ROOT_GET
            }
            answer = asked.answer(keys | {"QueryRetrieveLevel": "STUDY"})
    except Cancelled:
        raise
    except DispatchError as exc:
        return exc.message
    refused = answer is not None and (answer.unsupported or failure(peer, answer))
    return f"the peer answers with {answer}" if refused else ""


def _series(match: Match, search: PeerSearch) -> PulledSeries:
    patient = str(match.attributes.get("PatientID", ""))
    return PulledSeries(
        match.StudyInstanceUID,
        match.SeriesInstanceUID,
        match.instances or None,  # a series without instances is none: the peer doesn't count
        patient=patient,
        charset=search.charset_of(patient),
        modality=str(match.attributes.get("Modality", "")),
    )


def _list(search: PeerSearch, one: PulledSeries) -> None:
    """Ask the peer what a series has."""
    images, one.all_listed = search.images(
        one.study, one.uid, one.patient, charset=one.charset, announced=one.announced, doubtful=one.doubtful
    )
    one.images = {str(each["SOPInstanceUID"]): _kinds(each) for each in images} or None
    one.listed, one.proven = True, one.proven or one.doubtful


def _kinds(image: dict[str, object]) -> tuple[str, tuple[str, ...]]:
    """Return an instance's SOP class, and the transfer syntaxes in which the peer says that it is available."""
    syntaxes = text(image.get("AvailableTransferSyntaxUID")).split("\\")
    return text(image.get("SOPClassUID")), tuple(syntax for syntax in syntaxes if syntax)
