"""XNAT targets: whole studies go to a project's import service, one session per study, and are followed to the archive.

What the service, the prearchive and the archive do is in `protocols/xnat/client.py`; labels are in `names.py`, the
delivery of a single study in `study.py`, its zip in `zip.py`.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from urllib.parse import urlsplit

from blocks.xnat import XnatTarget
from protocols.http.origin import WebOrigin
from protocols.http.session import Session as Http
from protocols.net.tls import Tls
from protocols.net.words import clean
from protocols.xnat.answers import XnatRefused
from protocols.xnat.client import XnatClient
from tasks.driver import Driver, Facts
from tasks.probes import go_on, reach_web
from tasks.xnat.errors import classified
from tasks.xnat.names import Name, Names, XnatStudy
from tasks.xnat.study import Importer
from transfer.duplicates import Duplicates
from transfer.errors import (
    Cancelled,
    Denied,
    DispatchError,
    Misconfigured,
    NotFound,
    Retryable,
    Unreachable,
)
from transfer.fanout import each, gravest
from transfer.health import Health
from transfer.outcome import Kind, Outcome
from transfer.plan import Item, Plan, header_of
from transfer.receipt import Level, PushReport, Receipt
from transfer.throttle import Throttle

NO_PROOF = (
    "XNAT keeps no checksum of what was sent, and may rewrite files (anonymisation): files and counts were listed"
)
MAX_IN_A_ROW = 3  # studies that fail one after the other before XNAT is left in peace
NO_STUDY = "no Study Instance UID (0020,000D): XNAT could not know which session it belongs to"


@contextmanager
def connect(target: XnatTarget, check: Callable[[], None]) -> Iterator[XnatClient]:
    """Log in, and end the session at XNAT in every case.

    Raises:
        Denied: XNAT doesn't take the credentials. Misconfigured: there is no XNAT at `host`.
        Unreachable, TimedOut, NotTrusted, Busy: as `protocols.http.session` and `classified` say.
    """
    origin = _origin(target)
    user, password = target.user, target.password.get_secret_value()
    client = XnatClient(target.host, user, password, lambda ask: Http(origin, check=ask, follow=False), check)
    try:
        with classified((password,)):
            try:
                client.login()
            except XnatRefused as exc:
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
    """Return the server that a redirect points to, without its path."""
    url = urlsplit(location)
    return f"{url.scheme}://{url.netloc}" if url.netloc else "another page of it"


def _origin(target: XnatTarget) -> WebOrigin:
    return WebOrigin.of(
        target.host,
        Tls(ca=target.ca_cert),
        target.connect_timeout_s,
        target.idle_timeout_s,
        target.proxy.get_secret_value(),
    )


def check(target: XnatTarget) -> Health:
    """Staged probes: resolve, tcp, tls, authenticate, project, authorize, version. Nothing is imported."""
    health = Health()
    rest = ["authenticate", "project", "authorize", "version"]

    reach_web(health, _origin(target))
    if health.error is None:
        _check_xnat(target, health, rest)
    health.skip(*rest)
    return health


def _check_xnat(target: XnatTarget, health: Health, rest: list[str]) -> None:
    """Make the probes that need a login; remove each from `rest`."""
    with ExitStack() as ends:
        with health.probe("authenticate") as probe:
            rest.remove("authenticate")
            client = ends.enter_context(connect(target, go_on))
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
                    "may create sessions in it" if known else "this XNAT does not say who may create sessions"
                )
        rest.remove("version")
        with health.probe("version", informative=True) as probe, classified():
            probe.detail = client.version() or "XNAT does not give its version"


def _see_project(client: XnatClient, target: XnatTarget) -> None:
    """Raise NotFound if the user doesn't see the project: XNAT would accept an import to it and lose it."""
    if target.project_id not in client.projects():
        raise NotFound(
            f"XNAT has no project with the ID {target.project_id!r} that user {target.user} may see (an ID is neither "
            "the title nor the running title)"
        )


def _may_create(client: XnatClient, target: XnatTarget) -> bool:
    """Return whether XNAT knows the user's rights; raise Denied if the user may not create sessions in the project."""
    try:
        allowed = client.projects("create")
    except XnatRefused as exc:
        if exc.status in (400, 404, 500):  # releases that don't know the question
            return False
        raise
    if target.project_id not in allowed:
        raise Denied(
            f"user {target.user} may see project {target.project_id} but not create sessions in it: make the user a "
            "member or an owner"
        )
    return True


def push(target: XnatTarget, plan: Plan, report: PushReport) -> Receipt:
    """Import each study of the plan as one session.

    An item counts as delivered when XNAT shows its file in the archived session; in the prearchive when that is the
    destination, or with a warning when the time for archiving is up.
    """
    report.check()
    duplicates = Duplicates(plan, report)
    items = duplicates.begin()
    if not items and target.verify is Level.ACCEPTED:
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
        names, throttle = Names(client, target, plan), Throttle(target.bandwidth_limit)
        importer = Importer(
            client, target, plan, names, report, ask, throttle, lambda exc: _is_away(client, target, exc)
        )
        everything = target.verify is not Level.ACCEPTED
        while items or everything:
            studies = [study for study in _studies(plan, items, report) if study.pending or everything]
            _Push(importer, stop).run(studies)
            everything, items = False, duplicates.settle()
    reached = Level.LISTED if importer.listed and target.verify is not Level.ACCEPTED else Level.ACCEPTED
    notes = (*sorted(importer.notes), *((NO_PROOF,) if target.verify is Level.PROVEN else ()))
    return report.receipt(target.name, plan, reached, notes)


def _studies(plan: Plan, items: Iterable[Item], report: PushReport) -> list[XnatStudy]:
    """Return the plan's studies of which `items` are to be sent; those that failed before come last."""
    found: dict[str, list[Item]] = defaultdict(list)
    sending = {item.path for item in items}
    last: dict[str, int] = {}
    for number, item in enumerate(plan.items):
        uid = header_of(item).StudyInstanceUID
        if uid:
            found[uid].append(item)
            last[uid] = number
        elif item.path in sending:
            report(item, Outcome(Kind.REJECTED, NO_STUDY))
    return [
        XnatStudy(uid, tuple(found[uid]), tuple(item for item in found[uid] if item.path in sending))
        for uid in sorted(found, key=lambda uid: last[uid])
    ]


class _Push:
    """Imports studies, several at once. A failure of one doesn't stop the others, unless XNAT is away."""

    def __init__(self, importer: Importer, stop: threading.Event) -> None:
        self._importer, self._stop = importer, stop
        self._lock = threading.Lock()
        self._in_a_row = 0  # failures since a study came to its end
        self._errors: list[DispatchError] = []
        self._refused: list[tuple[XnatStudy, DispatchError]] = []  # studies that are for good, as far as is known

    def run(self, studies: list[XnatStudy]) -> None:
        """Import studies.

        Raises:
            DispatchError: the gravest of what went wrong, when nothing more can be done.
        """
        self._importer.sends.clear()
        names = {}
        for study in sorted(studies, key=lambda one: one.uid):  # those that want one label get theirs as the last time
            with classified({header_of(item).PatientID for item in study.items} - {""}):
                names[study.uid] = self._importer.names.name(study)
        each(studies, lambda study: self._deliver(study, names[study.uid]), self._importer.target.concurrency, "xnat")
        self._settle_refused()
        if self._errors:
            raise gravest(self._errors)

    def _settle_refused(self) -> None:
        """Reject studies that XNAT refuses while it takes others; raise the reason if it takes none."""
        report = self._importer.report
        taken = any(outcome.arrived for outcome in report.outcomes.values())
        for study, error in self._refused:
            if not taken:
                raise error
            for item in study.pending:
                if item.path not in report.outcomes:
                    report(item, Outcome(Kind.REJECTED, error.message))

    def _deliver(self, study: XnatStudy, name: Name) -> None:
        try:
            with classified(name.hidden):
                self._importer.deliver(study, name)
        except Cancelled:
            report = self._importer.report
            if not self._stop.is_set() or report.begins_no_more or report.cancelled.is_set():
                raise
        except Retryable as exc:
            if study.pending:
                exc.item = exc.item or study.pending[0].shown  # it comes last in the next attempt
            with self._lock:
                self._errors.append(exc)
                self._in_a_row += 1
                in_a_row = self._in_a_row
            if in_a_row >= MAX_IN_A_ROW or self._importer.is_away(exc):
                self._stop.set()
                raise
        except (Denied, Misconfigured, NotFound) as exc:  # a gateway's word, perhaps, on this study alone
            with self._lock:
                self._refused.append((study, exc))
                self._in_a_row += 1
                ends = self._in_a_row >= MAX_IN_A_ROW
            if ends:
                self._stop.set()
                raise
        except BaseException:
            self._stop.set()
            raise
        else:
            with self._lock:
                self._in_a_row = 0


def _is_away(client: XnatClient, target: XnatTarget, exc: Retryable) -> bool:
    """Return True if an error is not about a study or a file: XNAT asks to wait, or answers nothing else either."""
    if isinstance(exc, Unreachable) or getattr(exc, "retry_after", None):
        return True
    try:
        with classified():
            _see_project(client, target)
    except Cancelled:
        raise
    except DispatchError:
        return True
    return False


driver = Driver(
    target=XnatTarget,
    check=check,
    push=push,
    facts=Facts(dicom_only=True, verifies_by=(Level.ACCEPTED, Level.LISTED)),
)
