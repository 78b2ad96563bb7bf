"""XNAT: whole studies to the import service of a project, one session per study, seen through to the archive.

What the service, the prearchive and the archive do is in `protocols/xnat/client.py`; labels are in `names.py`, the way
of a single study in `study.py`, its zip in `zip.py`.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from urllib.parse import urlsplit

from blocks.xnat import XnatTarget
from protocols.http.session import Session as Http
from protocols.http.session import WebOrigin
from protocols.net.hiding import hiding, quieted
from protocols.net.tls import Tls
from protocols.net.words import clean
from protocols.xnat.answers import Refused
from protocols.xnat.client import Client
from tasks.driver import Driver, Facts
from tasks.probes import reach_web
from tasks.xnat.names import Name, Names, Study, header_of
from tasks.xnat.study import Importer
from transfer.errors import Busy, Cancelled, Denied, DispatchError, Interrupted, Misconfigured, NotFound
from transfer.health import Health
from transfer.outcome import Kind, Outcome
from transfer.plan import Item, Plan
from transfer.receipt import Level, PushReport, Receipt
from transfer.throttle import Throttle

NO_PROOF = (
    "XNAT keeps no checksum of what was sent, and may rewrite files (anonymisation): files and counts were listed"
)
NO_STUDY = "no Study Instance UID (0020,000D): XNAT could not tell which session it belongs to"

# What a status means once somebody is logged in. A login that is refused is Denied, see `connect`.
STATUS: dict[int, type[DispatchError]] = {
    400: Misconfigured,
    401: Interrupted,  # the session expired; the next attempt logs in afresh, and is Denied if that is what it is
    403: Denied,
    404: NotFound,
    405: Misconfigured,
    406: Misconfigured,
    408: Busy,
    409: Busy,
    415: Misconfigured,
    423: Busy,
    425: Busy,
    429: Busy,
    500: Busy,
    502: Busy,
    503: Busy,
    504: Busy,
    507: Busy,
}


@contextmanager
def classified(hidden: Iterable[str] = ()) -> Iterator[None]:
    """Turn XNAT's refusals into our errors.

    Args:
        hidden: what no message may show.
    """
    with quieted(hiding(hidden)):
        try:
            yield
        except Refused as exc:
            words = clean(exc.words, hidden)
            if exc.status < 400:
                # A page of the login, or of a proxy, in the place of data; or the way to one.
                what = "a redirect" if exc.status >= 300 else "a web page"
                raise Interrupted(f"XNAT answered with {what} (status {exc.status}): {words}") from exc
            kind = STATUS.get(exc.status, Busy if exc.status >= 500 else Misconfigured)
            message = f"XNAT answered with status {exc.status}: {words}"
            if kind is Busy:
                raise Busy(message, retry_after=exc.retry_after) from exc
            raise kind(message) from exc


@contextmanager
def connect(target: XnatTarget, check: Callable[[], None]) -> Iterator[Client]:
    """Log in; the session at XNAT is ended in every case.

    Raises:
        Denied: XNAT doesn't take the credentials. Misconfigured: there is no XNAT at `host`.
        Unreachable, TimedOut, NotTrusted, Busy: as `protocols.http.session` and `classified` say.
    """
    origin = _origin(target)
    user, password = target.user, target.password.get_secret_value()
    client = Client(target.host, user, password, lambda ask: Http(origin, check=ask, follow=False), check)
    try:
        with classified((password,)):
            try:
                client.login()
            except Refused as exc:
                words = clean(exc.words, (password,))
                if exc.status == 401:
                    raise Denied(f"XNAT refuses the login of user {user}: {words}") from exc
                if 300 <= exc.status < 400:
                    raise Misconfigured(
                        f"{target.host} answers {exc.status} and points to {_server(exc.location)}, which is not "
                        "followed: set host to where XNAT is"
                    ) from exc
                if exc.page and exc.status < 400:
                    raise Misconfigured(
                        f"{target.host} answers with a web page instead of a session: it is not the base URL of an "
                        f"XNAT, or something before it wants a login: {words}"
                    ) from exc
                if exc.status == 404:
                    raise Misconfigured(f"there is no XNAT at {target.host}: correct host") from exc
                raise
        yield client
    finally:
        client.close()


def _server(location: str) -> str:
    """Where a redirect points to, without what the path may hold."""
    url = urlsplit(location)
    return f"{url.scheme}://{url.netloc}" if url.netloc else "another page of it"


def _origin(target: XnatTarget) -> WebOrigin:
    return WebOrigin.of(target.host, Tls(ca=target.ca_cert), target.connect_timeout_s, target.idle_timeout_s)


def check(target: XnatTarget) -> Health:
    """Staged probes: resolve, tcp, tls, authenticate, project, authorize, version. Nothing is imported."""
    health = Health()
    rest = ["authenticate", "project", "authorize", "version"]

    def ask() -> None:
        """A check has nobody to stop it; its timeouts do."""

    reach_web(health, _origin(target))
    if health.error is None:
        _check_xnat(target, health, ask, rest)
    made = {probe.name for probe in health.probes}
    way = ["resolve", "tcp", *(["tls"] if target.host.startswith("https:") else [])]
    health.skip(*(name for name in way if name not in made), *rest)
    return health


def _check_xnat(target: XnatTarget, health: Health, ask: Callable[[], None], rest: list[str]) -> None:
    """The probes that need a login; takes those that it makes off `rest`."""
    with ExitStack() as ends:
        with health.probe("authenticate") as probe:
            rest.remove("authenticate")
            client = ends.enter_context(connect(target, ask))
            probe.detail = f"logged in as {target.user}"
        if health.error:
            return
        rest.remove("project")
        with health.probe("project") as probe, classified():
            _see_project(client, target)
            probe.detail = f"project {target.project_id} is visible"
        if health.error is None:
            rest.remove("authorize")
            with health.probe("authorize") as probe, classified():
                known = _may_create(client, target)
                probe.detail = (
                    "may create sessions in it" if known else "this XNAT doesn't tell who may create sessions"
                )
        rest.remove("version")
        with health.probe("version", informative=True) as probe, classified():
            probe.detail = client.version() or "XNAT doesn't tell its version"


def _see_project(client: Client, target: XnatTarget) -> None:
    """Raise NotFound if the user doesn't see the project: an import to it would be no error at XNAT, but lost."""
    if target.project_id not in client.projects():
        raise NotFound(
            f"XNAT has no project with the ID {target.project_id!r} that user {target.user} may see (an ID is neither "
            "the title nor the running title)"
        )


def _may_create(client: Client, target: XnatTarget) -> bool:
    """Tell whether XNAT says so; raise Denied if it says that the user may not create sessions in the project."""
    try:
        allowed = client.projects("create")
    except Refused as exc:
        if exc.status in (400, 404, 500):  # releases that don't know the question
            return False
        raise
    if target.project_id not in allowed:
        raise Denied(
            f"user {target.user} may see project {target.project_id} and not create sessions in it: make the user a "
            "member or an owner"
        )
    return True


def push(target: XnatTarget, plan: Plan, report: PushReport) -> Receipt:
    """Import each study of the plan as one session.

    An item counts as delivered when XNAT shows its file in the archived session; in the prearchive when that is the
    destination, or with a warning when the time for archiving is up.
    """
    report.check()
    studies = _studies(plan, report)
    if target.verify is Level.ACCEPTED:
        studies = [study for study in studies if study.pending]
    if not studies:
        return report.receipt(target.name, plan)
    stop = threading.Event()

    def ask() -> None:
        report.check()
        if stop.is_set():  # another study's failure ends this push
            raise Cancelled("the push has failed")

    with connect(target, ask) as client:
        with classified():
            _see_project(client, target)
            _may_create(client, target)
        importer = Importer(
            client, target, plan, Names(client, target, plan), report, ask, Throttle(target.bandwidth_limit)
        )
        _deliver(importer, studies, stop, target.concurrency)
    reached = Level.LISTED if importer.listed and target.verify is not Level.ACCEPTED else Level.ACCEPTED
    notes = (*sorted(importer.notes), *((NO_PROOF,) if target.verify is Level.PROVEN else ()))
    return report.receipt(target.name, plan, reached, notes)


def _studies(plan: Plan, report: PushReport) -> list[Study]:
    """The plan's studies, in the order of their UIDs."""
    found: dict[str, list[Item]] = defaultdict(list)
    for item in plan.items:
        uid = header_of(item).StudyInstanceUID
        if uid:
            found[uid].append(item)
        elif item.path not in plan.done:
            report(item, Outcome(Kind.REJECTED, NO_STUDY))
    return [
        Study(uid, tuple(items), tuple(item for item in items if item.path not in plan.done))
        for uid, items in sorted(found.items())
    ]


def _deliver(importer: Importer, studies: list[Study], stop: threading.Event, at_once: int) -> None:
    """Import studies, several at once; the first failure ends the others, and is raised."""
    named = []
    for study in studies:  # in this order, so that studies which want the same label get theirs as the last time
        patients = {header_of(item).PatientID for item in study.items} - {""}
        with classified(patients):
            named.append((study, importer.names.name(study)))

    def deliver(study: Study, name: Name) -> None:
        with classified(name.hidden):
            importer.deliver(study, name)

    if len(named) == 1:
        deliver(*named[0])
        return
    failure: BaseException | None = None
    with ThreadPoolExecutor(min(at_once, len(named)), thread_name_prefix="xnat") as pool:
        for future in as_completed([pool.submit(deliver, *one) for one in named]):
            error = None if future.cancelled() else future.exception()
            if error is not None and failure is None:
                failure = error
                stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
    if failure is not None:
        raise failure


driver = Driver(
    target=XnatTarget,
    check=check,
    push=push,
    facts=Facts(dicom_only=True, verifies_by=(Level.ACCEPTED, Level.LISTED)),
)
