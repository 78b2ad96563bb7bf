"""XNAT's REST interface, as far as a delivery needs it: log in, list, import, watch the prearchive, log out.

pyxnat carries what it has calls for: the login, every request, the list of projects, and scans, resources and files of
the prearchive. It has no search by study or by permission, and no call for a single entry of the prearchive: those are
requested by their paths. Each answer is judged before pyxnat sees it, because its own judgement takes a failed login
for an old server, and fails on every error page (UnboundLocalError, pyxnat 1.6.4).

Source: XNAT 1.8's own REST classes (DicomZipImporter, GradualDicomImporter, PrearcSessionArchiver, ScanList, FileList).
"""

from __future__ import annotations

import csv
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from types import ModuleType
from typing import Any
from urllib.parse import unquote, urlsplit

import requests
from requests.auth import HTTPBasicAuth

from protocols.http.adapter import Adapter
from protocols.http.exchange import Body
from protocols.http.session import Session as Http
from protocols.xnat.answers import (
    ArchivePlace,
    CatalogEntry,
    ImageSession,
    XnatRefused,
    entry_of,
    judged,
    line,
    part,
    places,
    session_of,
    table,
    value_of,
    words_of,
)

CLOSE_S = 3.0  # for the last request of all; a cancelled push must be over within five
ZIP = "application/zip"
IMAGE_SESSION = "xnat:imageSessionData"

_SESSION_ID = re.compile(r"[\w.-]{8,200}")
_SCAN = re.compile(r"/scans/([^/]+)/")


# Columns of the tables that pyxnat reads, by the last part of their path. It takes one without them for an empty one.
_COLUMNS = {"projects": "ID", "scans": "ID", "resources": "label", "files": "Name"}


def _pyxnat() -> ModuleType:
    """Import pyxnat without the modules that its constructor looks for, which import pandas and nibabel (3 s, 56 MB).

    They add methods to objects that nobody here uses. The name is private: `tests/protocols/test_xnat_client.py` fails
    for a version that has it no more; `pyproject.toml` pins the one that has.
    """
    interfaces = import_module("pyxnat.core.interfaces")
    interfaces.__find_all_functions__ = lambda modules: {}  # type: ignore[attr-defined]
    return import_module("pyxnat")


class XnatClient:
    """A login to one XNAT server; may be used from several threads.

    Args:
        url: base URL, without a slash at the end.
        user, password: or an alias token and its secret.
        connect: makes the client that sends the requests; its argument is called several times a second in every wait,
            and may raise to stop it.
        check: that argument, until the session is closed.
    """

    def __init__(
        self,
        url: str,
        user: str,
        password: str,
        connect: Callable[[Callable[[], None]], Http],
        check: Callable[[], None],
    ) -> None:
        self._interface: Any = _pyxnat().Interface(server=url, user=user, password=password, verify=True)
        self._session: requests.Session = self._interface._http
        # Bytes: requests would encode text as Latin-1, XNAT reads UTF-8.
        self._session.auth = HTTPBasicAuth(user.encode(), password.encode())
        self._session.trust_env = False  # no .netrc, proxy or certificate bundle of the environment
        self._session.proxies = {}
        self._session.headers["User-Agent"] = "talaria"  # a browser would be sent to the login page, not refused
        self._session.hooks["response"] = [self._judge]
        self._connect = connect
        self._failed = _Failed()
        self._mount(check)

    def _mount(self, check: Callable[[], None]) -> None:
        adapter = _Noted(self._connect(check), self._failed)
        self._session.mount("http://", adapter)
        self._session.mount("https://", adapter)

    def login(self) -> None:
        """Open a session at XNAT; its cookie goes with every later request.

        Raises:
            XnatRefused: the credentials are not accepted (401), or this is not an XNAT.
        """
        self._interface._get_entry_point()

    def close(self) -> None:
        """End the session at XNAT, whatever happened before, within `CLOSE_S`; never raises."""
        end = time.monotonic() + CLOSE_S

        def hurry() -> None:
            if time.monotonic() > end:
                raise TimeoutError

        self._session.close()
        self._mount(hurry)
        if self._session.cookies:  # it may have been opened by a request that failed
            with suppress(Exception):
                self._interface.close_jsession()
        self._session.close()

    def version(self) -> str:
        """Return XNAT's version, "" if it is not known. Its address changed with 1.8."""
        with suppress(XnatRefused):
            text = self._get("/data/version").text.strip()
            if text and not text.startswith("{"):
                return text
        with suppress(XnatRefused, ValueError, AttributeError):
            return str(json.loads(self._get("/xapi/siteConfig/buildInfo").text).get("version", ""))
        return ""

    def projects(self, permission: str = "") -> set[str]:
        """Return the IDs of the projects that the user sees, or may `create`, `edit`, `read` or `delete` in."""
        if not permission:
            with self._read_by_pyxnat():
                return set(self._interface.select.projects().get())
        query = {"permissions": permission, "dataType": "xnat:subjectData", "format": "json"}
        return {value_of(row, "id") for row in self._rows("/data/projects", query)}

    def sessions_of(self, project: str, uid: str) -> list[tuple[str, str]]:
        """Return the labels of a study's archived sessions in a project, each with the label of its subject."""
        rows = self._rows(
            f"/data/projects/{part(project)}/experiments",
            {
                "xsiType": IMAGE_SESSION,
                f"{IMAGE_SESSION}/UID": uid,
                "columns": f"ID,label,subject_label,{IMAGE_SESSION}/UID",
                "format": "json",
            },
        )
        # A server that doesn't filter by this column gives all of them.
        return sorted(
            (value_of(row, "label"), value_of(row, "subject_label")) for row in rows if value_of(row, "uid") == uid
        )

    def labels_of(self, project: str, subject: str) -> list[str]:
        """Return the labels of a subject's sessions; none if there is no such subject."""
        path = f"/data/projects/{part(project)}/subjects/{part(subject)}/experiments"
        try:
            return [value_of(row, "label") for row in self._rows(path, {"columns": "ID,label", "format": "json"})]
        except XnatRefused as exc:
            if exc.status == 404:
                return []
            raise

    def session(self, project: str, label: str) -> ImageSession | None:
        """Return the archived session with that label, None if there is none."""
        path = f"/data/projects/{part(project)}/experiments/{part(label)}"
        try:
            found = self._json(path, {"format": "json"})
        except XnatRefused as exc:
            if exc.status == 404:
                return None
            raise
        return session_of(found)

    def files(self, project: str, label: str) -> list[tuple[str, str]]:
        """Return each file of an archived session: the ID of its scan ("" where XNAT gives none) and its name."""
        path = f"/data/projects/{part(project)}/experiments/{part(label)}/scans/ALL/files"
        found = []
        try:
            rows = self._rows(path, {"format": "json"})
        except XnatRefused as exc:
            if exc.status == 404:  # no scan at all
                return []
            raise
        for row in rows:
            scan = _SCAN.search(value_of(row, "uri"))
            found.append((unquote(scan[1]) if scan else "", value_of(row, "name")))
        return found

    def prearchive(self, project: str) -> list[CatalogEntry]:
        """Return what is in a project's prearchive."""
        rows = self._rows(f"/data/prearchive/projects/{part(project)}", {"format": "json"})
        return [entry_of(row) for row in rows]

    def entry(self, entry: CatalogEntry) -> CatalogEntry | None:
        """Return the current state of an entry; None if it is gone."""
        try:
            rows = self._rows(entry.path, {"format": "json"})
        except XnatRefused as exc:
            if exc.status == 404:
                return None
            raise
        return entry_of(rows[0]) if rows else None

    def entry_files(self, entry: CatalogEntry) -> list[str]:
        """Return the names of the files of all scans of an entry."""
        prearchive, names = self._interface.manage.prearchive, []
        triple = [part(entry.project), part(entry.timestamp), part(entry.folder)]
        with self._read_by_pyxnat():
            for scan in map(part, _all(prearchive.get_scans(triple))):
                for resource in map(part, _all(prearchive.get_resources(triple, scan))):
                    names += _all(prearchive.get_files(triple, scan, resource))
        return names

    def discard(self, entry: CatalogEntry) -> None:
        """Delete an entry of the prearchive."""
        self._interface.delete(entry.path, allow_redirects=False)

    def log_of(self, entry: CatalogEntry) -> str:
        """Return the last line of XNAT's log of an entry; "" if there is none or XNAT doesn't show it."""
        with suppress(XnatRefused):
            answer = self._get(f"{entry.path}/logs/last", {"format": "json"})
            with suppress(ValueError):
                rows = table(answer)
                return line(" ".join(value_of(row, "entry") or value_of(row, "message") for row in rows))
            return line(answer.text)
        return ""

    def import_zip(self, query: dict[str, str], body: Body) -> list[ArchivePlace]:
        """Send a zip to the import service; return where its sessions went, none if XNAT took nothing."""
        answer = self._interface.post(
            "/data/services/import",
            params={"import-handler": "DICOM-zip", "inbody": "true", **query},
            data=body,
            headers={"Content-Type": ZIP, "Accept": "*/*"},
            allow_redirects=False,
        )
        return list(places(answer.text))

    def _judge(self, answer: requests.Response, *_: Any, **__: Any) -> None:
        """Raise XnatRefused for an answer without the requested data. `requests` calls this for every answer."""
        self._session.cookies.update(answer.cookies)  # of a refusal too: there may be a session to end
        try:
            _fit(answer)
        except XnatRefused as exc:
            self._failed.error = exc
            raise

    @contextmanager
    def _read_by_pyxnat(self) -> Iterator[None]:
        """Raise the error that occurred inside pyxnat, which takes some errors for an empty list, or fails on them."""
        self._failed.error = None
        try:
            yield
        except (LookupError, ValueError, StopIteration, csv.Error) as exc:
            raise XnatRefused(200, "the answer is not a table", page=True) from exc
        if self._failed.error:
            raise self._failed.error

    def _get(self, path: str, query: dict[str, str] | None = None) -> requests.Response:
        answer: requests.Response = self._interface.get(path, params=query, allow_redirects=False)
        return answer

    def _json(self, path: str, query: dict[str, str]) -> Any:
        answer = self._get(path, query)
        try:
            return answer.json()
        except ValueError as exc:
            raise XnatRefused(answer.status_code, "the answer is not JSON", page=True) from exc

    def _rows(self, path: str, query: dict[str, str]) -> list[dict[str, Any]]:
        answer = self._get(path, query)
        try:
            return table(answer)
        except ValueError as exc:
            raise XnatRefused(answer.status_code, "the answer is not a table", page=True) from exc


def _fit(answer: requests.Response) -> None:
    """Raise XnatRefused for an answer that is not what was requested, or that pyxnat can't read."""
    judged(answer)
    url = urlsplit(answer.request.url or "")
    last = url.path.rpartition("/")[2]
    if last == "JSESSION" and answer.request.method == "GET" and not _SESSION_ID.fullmatch(answer.text.strip()):
        raise XnatRefused(answer.status_code, words_of(answer), page=True)
    if "format=csv" in url.query and last in _COLUMNS:
        head = next(csv.reader([answer.text.partition("\n")[0]]), [])
        if "csv" not in answer.headers.get("Content-Type", "") or _COLUMNS[last] not in head:
            raise XnatRefused(answer.status_code, "the answer is not a table", page=True)


class _Failed(threading.local):
    """The error of a thread's last request."""

    error: BaseException | None = None


class _Noted(Adapter):
    """Sends requests, and keeps the errors."""

    def __init__(self, session: Http, failed: _Failed) -> None:
        super().__init__(session)
        self._failed = failed

    def send(self, request: requests.PreparedRequest, *rest: Any, **options: Any) -> requests.Response:
        try:
            return super().send(request, *rest, **options)
        except BaseException as exc:
            self._failed.error = exc
            raise


def _all(values: str | list[str]) -> list[str]:
    """Return values as a list: pyxnat returns a single one without."""
    return [values] if isinstance(values, str) else list(values)
