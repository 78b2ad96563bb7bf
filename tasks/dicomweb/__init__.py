"""DICOMweb targets: STOW-RS, QIDO-RS and WADO-RS; and folders that are searched like a server (`file://`)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

from blocks.dicomweb import DicomWebTarget
from imaging import json as dicomjson
from imaging.header import Header
from imaging.part10 import preamble_and_meta
from imaging.query import Match, Query
from protocols.dicomweb import qido, readback, wado_request, wado_uri
from protocols.dicomweb import service as dicomweb
from protocols.dicomweb.client import DicomwebClient, RequestRefused
from protocols.dicomweb.pages import Archive
from protocols.dicomweb.readback import Unverifiable, Verdict
from protocols.dicomweb.service import Service
from protocols.dicomweb.stow import StowPush
from protocols.dicomweb.wado import WadoRetrieval, WadoSeries
from protocols.http.answer import Answer
from protocols.http.exchange import Content
from protocols.http.oauth import ClientCredentials, Fixed
from protocols.http.origin import WebOrigin
from protocols.http.session import Authorizer, Session
from protocols.net import tls
from tasks.dicomweb import folder as dicomweb_folder
from tasks.driver import Driver, Facts
from tasks.probes import go_on, reach_web
from tasks.pulled import compared, of_studies
from transfer import stopping
from transfer.errors import Busy, Denied, DispatchError, Misconfigured, NotFound
from transfer.health import Health, Probe
from transfer.plan import Item, Plan
from transfer.receipt import Level, PushReport, Receipt

# The table of errors is where answers are read: `service.STATUS_ERRORS`; those of sockets and TLS: `protocols.net`.

BOGUS = "1.2.826.0.1.3680043.8.498.0"  # a UID below pydicom's root that no object has
# What a server may answer to a STOW request without instances: all of these come from a STOW service.
STOW_ANSWERS = frozenset((200, 201, 202, 204, 400, 406, 409, 411, 422))
# A part that can't be stored, for servers that answer so to a request without any.
PARTS = {500: b"nothing", 415: preamble_and_meta(Header.of("", "", "1.2.840.10008.1.2.1", "", "", 0))}
WADO_TRIES = 3  # of a list that a retrieval needs, over links that break
# Searches that show whether there is the service: some servers don't let everything be listed, or take no limit.
SEARCHES = (((), 1), ((("StudyInstanceUID", BOGUS),), 1), ((("StudyInstanceUID", BOGUS),), None))
SAMPLES = 3  # studies of which an instance is asked for, until one is given: single ones may be offline, or lost
WADO_NONE = frozenset((204, 400, 404, 406, 409, 410))  # for an instance that isn't there


@contextmanager
def connect(target: DicomWebTarget, check: Callable[[], None] = lambda: None) -> Iterator[Service]:
    """Yield the target's services; make connections when they are needed, and close them at the end."""
    parts = urlsplit(target.url)
    trust = _tls(target)
    secrets = [
        target.http_password, target.access_token, target.client_secret, target.tls_key, target.tls_key_password,
    ]  # fmt: skip
    try:
        with Session(_origin(target, target.url, trust), _authorizer(target, trust), check) as session:
            yield Service(
                session,
                parts.path.rstrip("/"),
                target.qido_url_prefix,
                target.wado_url_prefix,
                target.stow_url_prefix,
                frozenset(secret.get_secret_value() for secret in secrets) - {""},
            )
    except DispatchError as exc:
        exc.target = exc.target or target.name
        raise


def _tls(target: DicomWebTarget) -> tls.Tls:
    return tls.Tls(
        ca=target.ca_cert,
        cert=target.tls_cert,
        key=target.tls_key.get_secret_value(),
        key_password=target.tls_key_password.get_secret_value(),
    )


def _origin(target: DicomWebTarget, url: str, trust: tls.Tls) -> WebOrigin:
    return WebOrigin.of(url, trust, target.connect_timeout_s, target.idle_timeout_s, target.proxy.get_secret_value())


def _authorizer(target: DicomWebTarget, trust: tls.Tls) -> Authorizer | None:
    if target.http_user:
        return Fixed.basic(target.http_user, target.http_password.get_secret_value())
    if target.access_token.get_secret_value():
        return Fixed.bearer(target.access_token.get_secret_value())
    if target.token_url:
        secret = target.client_secret.get_secret_value()
        origin = _origin(target, target.token_url, trust)
        shared = _credentials(target.token_url, target.client_id, secret, target.scope, origin)
        shared.origin = origin  # it is the same server, but holds no certificates that have been renewed since
        return shared
    return None


@functools.lru_cache(maxsize=64)
def _credentials(url: str, client_id: str, secret: str, scope: str, origin: WebOrigin) -> ClientCredentials:
    """Return one object per client and process, so that dispatches share its token."""
    return ClientCredentials(url, client_id, secret, scope, origin)


def check(target: DicomWebTarget) -> Health:
    """Probe name, TCP, TLS, credentials, rights, and each of the services that the target's direction needs."""
    if target.folder is not None:
        return dicomweb_folder.check(target)
    health = Health()
    reach_web(health, _origin(target, target.url, _tls(target)))
    if health.ok:
        with connect(target) as service:
            _probe_services(health, target, service)
    made = {probe.name for probe in health.probes}
    health.skip(*(name for name in ("authenticate", "authorize", "qido", "stow", "wado") if name not in made))
    return health


def _probe_services(health: Health, target: DicomWebTarget, service: Service) -> None:
    needs_qido = target.queries or target.verify is not Level.ACCEPTED
    needs_wado = target.queries or target.verify is Level.PROVEN
    asked: dict[str, _Asked] = {}
    with health.probe("authenticate") as probe:
        authorizer = service.session.authorizer
        if authorizer is not None:
            authorizer.header(go_on)
        asked["qido"] = _ask_qido(service)
        if target.stores:
            asked["stow"] = _ask_stow(service, service.path(service.stow, "studies"))
        for one in asked.values():
            if one.answer.status == 401:
                raise _error(service, one)
        _require_service(service, asked)
        probe.detail = "credentials accepted" if authorizer else "no credentials are set, and none are asked for"
        if authorizer and target.url.startswith("http:"):
            probe.detail += "; they go over the network unencrypted"
    if not health.ok:
        return
    with health.probe("authorize"):
        for name, one in asked.items():
            if one.answer.status == 403 and (name == "stow" or needs_qido):
                raise _error(service, one)
    if not health.ok:
        return
    with health.probe("qido", informative=not needs_qido) as probe:
        if asked["qido"].problem:
            raise asked["qido"].problem
        probe.detail = asked["qido"].detail
    if "stow" in asked:
        with health.probe("stow") as probe:
            _judge_stow(service, asked["stow"], probe)
    else:
        health.skip("stow", why="the target is for queries only")
    if needs_wado:
        with health.probe("wado") as probe:
            _probe_wado(service, probe)
    else:
        health.skip("wado", why="nothing is retrieved from this target")


@dataclass(frozen=True)
class _Asked:
    path: str
    answer: Answer
    body: bytes
    problem: DispatchError | None = None
    detail: str = ""


def _error(service: Service, asked: _Asked) -> DispatchError:
    return asked.problem or service.error(asked.answer, asked.body, asked.path)


def _ask(service: Service, method: str, path: str, headers: dict[str, str] | None = None, body: bytes = b"") -> _Asked:
    headers = {"Accept": dicomweb.ACCEPT} | (headers or {})
    with service.session.request(method, path, headers, Content(body) if body else None) as answer:
        return _Asked(path, answer, answer.read())


def _ask_qido(service: Service) -> _Asked:
    """Search as a query does; for one study, if a search for everything is refused."""
    client, path = DicomwebClient(service), service.path(service.qido, "studies")
    made: list[_Asked] = []
    for keys, limit in SEARCHES:
        problem: DispatchError | None = None
        found, refused = "", False
        try:
            found = "has studies" if client.search(("studies",), keys, limit=limit).rows else "no study"
        except RequestRefused as exc:
            problem, refused = exc.error, True
        except DispatchError as exc:
            problem = exc
        if client.last is None:
            raise problem or ValueError("a search has an answer, or an error")
        answer, body = client.last
        detail = f"answers {answer.status}, {found}"
        if made:
            detail = f"answers {answer.status} to a search for one study, {made[0].answer.status} to one for everything"
        made.append(_Asked(path, answer, body, problem, detail))
        if not refused:
            break
    return made[0] if refused or made[-1].answer.status == 404 else made[-1]


def _ask_stow(service: Service, path: str) -> _Asked:
    """Send a request as a push does, but without instances; to servers that can't bear that, one with a part.

    Some look into a part before they take its type: they get a DICOM file that ends with its meta information.
    """
    headers = {"Content-Type": 'multipart/related; type="application/dicom"; boundary=talaria'}
    asked = _ask(service, "POST", path, headers, b"--talaria--\r\n")
    if part := PARTS.get(asked.answer.status):
        body = b"--talaria\r\nContent-Type: application/dicom\r\n\r\n" + part + b"\r\n--talaria--\r\n"
        asked = _ask(service, "POST", path, headers, body)
    return asked


def _require_service(service: Service, asked: dict[str, _Asked]) -> None:
    """Raise if a server answers every request alike: that shows nothing about credentials, rights and services."""
    if any(one.answer.status < 300 for one in asked.values()):
        return
    name, one = ("stow", asked["stow"]) if "stow" in asked else ("qido", asked["qido"])
    if one.answer.status not in STOW_ANSWERS | {415}:
        return  # an error wherever it comes from
    nowhere = service.path("", f"no-such-service-{BOGUS}")
    other = _ask_stow(service, nowhere) if name == "stow" else _ask(service, "GET", nowhere)
    if other.answer.status == one.answer.status:
        error = _error(service, one)
        error.message += "; it says so to everything: there is no DICOMweb service here, check url and the prefixes"
        raise error


def _judge_stow(service: Service, asked: _Asked, probe: Probe) -> None:
    status = asked.answer.status
    if status not in STOW_ANSWERS:
        raise service.error(asked.answer, asked.body, asked.path)
    if asked.answer.media_type == "text/html" and status < 400:
        raise dicomweb.unexpected(service, asked.answer, asked.body, asked.path)
    probe.detail = f"answers {status} to a request without instances; nothing was stored"
    if status >= 400:
        probe.detail += ", so that only a push can show whether it takes instances"


def _probe_wado(service: Service, probe: Probe) -> None:
    """Ask for an instance as a retrieval does; if none is known, for one that doesn't exist."""
    refusals: list[DispatchError] = []
    for uids in qido.samples(service, SAMPLES):
        try:
            with closing(wado_request.fetch(service, uids, lambda count: None)) as contents:
                if next(contents, None) is not None:  # that it begins is enough
                    probe.detail = "gives instances"
                    return
            refusals.append(Misconfigured(f"{service.where}: lists instances, but gives none"))
        except (NotFound, Misconfigured, Denied, wado_request.Unable) as exc:
            refusals.append(exc)
            absent = len(uids) == len(wado_request.LEVELS) and isinstance(exc, NotFound | wado_request.NoService)
            if absent and (place := wado_uri.found(service, uids)):
                probe.detail = f"gives instances by WADO-URI only, at {place}"
                return
    if refusals:
        raise refusals[0]
    path = wado_request.path(service, (BOGUS,) * 3)
    asked = _ask(service, "GET", path, {"Accept": wado_request.ACCEPTS[1]})
    if asked.answer.status == 200 and asked.answer.media_type not in (wado_request.DICOM, "multipart/related"):
        raise dicomweb.unexpected(service, asked.answer, asked.body, path, dicomweb.FILES)
    if asked.answer.status not in (200, *WADO_NONE):
        raise service.error(asked.answer, asked.body, path, dicomweb.FILES)
    probe.detail = f"answers {asked.answer.status} for an instance that is not there"


def push(target: DicomWebTarget, plan: Plan, report: PushReport) -> Receipt:
    """Store the plan's pending instances in batches, several requests at once."""
    if target.folder is not None:
        return dicomweb_folder.push(target, plan, report)
    with connect(target, report.check) as service:
        store = StowPush(
            service,
            plan,
            report,
            batch_bytes=target.batch_bytes,
            batch_items=target.batch_items,
            concurrency=target.concurrency,
            bandwidth_limit=target.bandwidth_limit,
        )
        store.run()
        level, notes = _verify(target, service, plan, report)
    if store.unlisted and level is Level.ACCEPTED:
        notes.append(f"{store.unlisted} instance(s) were accepted without being named: verify=listed would make sure")
    return report.receipt(target.name, plan, verified=level, notes=tuple(notes))


def _verify(target: DicomWebTarget, service: Service, plan: Plan, report: PushReport) -> tuple[Level, list[str]]:
    """Verify at the target's level, or as far as the server lets us; revoke what turns out not to be there."""
    arrived = [item for item in plan.items if report.arrived(plan, item)]
    items = [item for item in arrived if not report.elsewhere(plan, item)]
    elsewhere = len(arrived) - len(items)
    if target.verify is Level.ACCEPTED:
        return Level.ACCEPTED, []
    level, notes = Level.ACCEPTED, []
    if elsewhere:
        notes.append(f"{elsewhere} instance(s) can't be verified: the server stored them under other UIDs")
    if not items:
        return level, notes
    try:
        missing = readback.unlisted(service, items, report.check)
        for item in missing:
            report.revoke(item, "accepted, but not listed by the server afterwards")
        items = [item for item in items if item not in missing]
        level = Level.ACCEPTED if elsewhere else Level.LISTED
    except Unverifiable as exc:
        notes.append(f"can't be verified by listing: {exc}")
    if target.verify is Level.PROVEN:
        why = _prove(target, service, plan, items, report)
        level = level if why or elsewhere else Level.PROVEN
        notes += [why] if why else []
    return level, notes


def _prove(target: DicomWebTarget, service: Service, plan: Plan, items: list[Item], report: PushReport) -> str:
    """Read everything back and compare; return why that proves less than it should, "" if it proves all."""
    unproven: list[Item] = []

    def judged(item: Item, verdict: Verdict) -> None:
        if verdict in (Verdict.OTHER, Verdict.MISSING):
            report.revoke(item, str(verdict.value))
        elif verdict is Verdict.UNLIKE:
            unproven.append(item)

    try:
        readback.read_back(service, plan, items, concurrency=target.concurrency, check=report.check, judged=judged)
    except Unverifiable as exc:
        return f"can't be proven by reading back: {exc}"
    if unproven:
        return (
            f"{len(unproven)} instance(s) can't be proven: the server gives them back in another transfer syntax, "
            f"or changed where there is no pixel data to compare ({unproven[0].shown})"
        )
    return ""


def find(target: DicomWebTarget, query: Query) -> Iterator[Match]:
    """Yield the studies or series that match."""
    if target.folder is not None:
        yield from dicomweb_folder.find(target, query)
        return
    with connect(target, stopping.check) as service:
        yield from qido.find(service, query)


def retrieve(target: DicomWebTarget, query: Query, folder: Path, report: PushReport) -> Receipt:
    """Fetch what matches into a folder, as `<SOP instance UID>.dcm`; what is there already is not fetched again.

    Raises:
        NotFound: nothing matches.
    """
    if target.folder is not None:
        return dicomweb_folder.retrieve(target, query, folder, report)
    with connect(target, report.check) as service:
        matches = list(qido.find(service, replace(query, level="series"), tries=WADO_TRIES))
        series = [WadoSeries(match.StudyInstanceUID, match.SeriesInstanceUID, match.instances) for match in matches]
        if not series:
            raise NotFound(f"{service.where}: nothing matches the query")
        retrieval = WadoRetrieval(
            service,
            series,
            folder,
            report,
            functools.partial(_listed, service),
            concurrency=target.concurrency,
            bandwidth_limit=target.bandwidth_limit,
        )
        plan = retrieval.run()
    level = Level.ACCEPTED if retrieval.blind else Level.LISTED
    receipt = report.receipt(target.name, plan, level, tuple(retrieval.notes))
    unproven = retrieval.blind - retrieval.ended_well
    return compared(receipt, plan, retrieval.announced, of_studies(query, matches), unproven, retrieval.elsewhere)


def _listed(service: Service, series: WadoSeries) -> tuple[set[str] | None, bool]:
    """Return the UIDs of a series' instances, from a search or else from metadata, and whether these are all.

    None if neither lists any.
    """
    found: set[str] = set()
    whole = False
    with suppress(NotFound, Misconfigured):  # not every server lists instances, or all of them
        found.update(qido.instances(Archive(service, WADO_TRIES), series.study, series.uid, series.announced))
        whole = bool(found)
    if not whole:
        with suppress(NotFound, Misconfigured, RequestRefused, Busy):
            found.update(
                dicomjson.text(one, qido.SOP_UID) for one in DicomwebClient(service).metadata(series.study, series.uid)
            )
            whole = True
    return found - {""} or None, whole


driver = Driver(
    target=DicomWebTarget,
    check=check,
    push=push,
    find=find,
    retrieve=retrieve,
    facts=Facts(dicom_only=True, reconnects=True, verifies_by=(Level.ACCEPTED, Level.LISTED, Level.PROVEN)),
)
