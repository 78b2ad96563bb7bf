"""What XNAT answers: refusals, tables and descriptions of sessions.

XNAT answers a request that it refuses, or that comes without a login, with a web page, sometimes with status 200. So
every answer is judged by its status and by its content.
"""

from __future__ import annotations

import csv
import html
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, unquote

import requests

from protocols.http.head import retry_after

MAX_WORDS = 300  # characters of an answer that are worth quoting
BUSY_STATES = ("BUILDING", "ARCHIVING", "MOVING", "DELETING", "SEPARATING", "QUEUED")
FAILED_STATES = ("CONFLICT", "ERROR")

_TITLE = re.compile(r"<(h3|h2|h1|title|p)\b[^>]*>(.*?)</\1>", re.IGNORECASE | re.DOTALL)
_TAG = re.compile(r"<[^>]*>")
_URI = re.compile(r"/(?:(archive|prearchive)/projects|xapi/(direct-archive))/([^/]+)(?:/(.*))?")


class XnatRefused(Exception):
    """An answer that is not what was asked for.

    Attributes:
        status: of HTTP.
        words: the server's own, one line. They may hold a session's label, and with it a patient's ID.
        page: it was a web page where data was expected.
        retry_after: seconds that the server asks to wait.
        location: where it redirects to.
    """

    def __init__(
        self, status: int, words: str, page: bool = False, retry_after: float | None = None, location: str = ""
    ) -> None:
        super().__init__(f"status {status}")
        self.status, self.words, self.page = status, words, page
        self.retry_after, self.location = retry_after, location


@dataclass(frozen=True)
class Scan:
    """A scan of an archived session: its ID at XNAT, its series, and how many files it has."""

    id: str
    uid: str
    files: int


@dataclass(frozen=True)
class ImageSession:
    """An archived session. What names a patient stays out of `repr`."""

    id: str
    uid: str
    label: str = field(repr=False)
    patient_id: str = field(repr=False)
    scans: tuple[Scan, ...] = ()


@dataclass(frozen=True)
class CatalogEntry:
    """A session in the prearchive."""

    project: str
    timestamp: str
    folder: str = field(repr=False)
    name: str = field(repr=False)
    uid: str  # of the study; XNAT calls it the tag
    status: str

    @property
    def path(self) -> str:
        return f"/data/prearchive/projects/{part(self.project)}/{part(self.timestamp)}/{part(self.folder)}"

    @property
    def shown(self) -> str:
        """Its place, without the session's label."""
        return f"/prearchive/projects/{self.project}/{self.timestamp}"

    @property
    def state(self) -> str:
        """The status without the mark of a lock."""
        return self.status.lstrip("_").upper()

    @property
    def working(self) -> bool:
        """Whether XNAT is working on it."""
        return self.status.startswith("_") or self.state.startswith(BUSY_STATES)

    @property
    def failed(self) -> bool:
        return self.state.startswith(FAILED_STATES)


@dataclass(frozen=True)
class ArchivePlace:
    """Where an import put a session, according to its answer: a URI."""

    kind: str  # archive, prearchive or direct-archive
    project: str
    rest: str = field(repr=False, default="")

    @property
    def shown(self) -> str:
        """The URI without subject and session."""
        timestamp = "/" + self.rest.split("/", maxsplit=1)[0] if self.kind == "prearchive" and self.rest else ""
        return f"/{self.kind}/projects/{self.project}{timestamp}"


def judged(answer: requests.Response) -> requests.Response:
    """Return an answer that holds data; raise for every other one.

    Raises:
        XnatRefused: any status but 200 and 201, and every web page.
    """
    page = is_page(answer)
    if answer.status_code in (200, 201) and not page:
        return answer
    raise XnatRefused(
        answer.status_code,
        words_of(answer),
        page,
        retry_after(answer.headers.get("Retry-After")),
        answer.headers.get("Location", ""),
    )


def part(value: str) -> str:
    return quote(value, safe="")


def value_of(row: dict[str, Any], name: str) -> str:
    """Return a column of a row: XNAT gives its name, or the path of its field, in upper or lower case."""
    for key, value in row.items():
        if key.lower().rpartition("/")[2] == name:
            return "" if value is None else str(value)
    return ""


def table(answer: requests.Response) -> list[dict[str, Any]]:
    """Return the rows of a table, which comes as JSON or, from some addresses, always as CSV.

    Raises:
        ValueError: it is neither.
    """
    text = answer.text
    if text.lstrip().startswith("{"):
        found = json.loads(text)
        try:
            return [row for row in found["ResultSet"]["Result"] if isinstance(row, dict)]
        except (KeyError, TypeError) as exc:
            raise ValueError("no ResultSet") from exc
    if "csv" not in answer.headers.get("Content-Type", ""):
        raise ValueError("neither JSON nor CSV")
    return list(csv.DictReader(io.StringIO(text)))


def session_of(document: Any) -> ImageSession:
    """Return the session that XNAT's JSON form of an item describes."""
    try:
        item = document["items"][0]
        facts = item["data_fields"]
        scans = tuple(_scan(scan) for scan in _children(item, "scans/scan"))
        number, uid, label, patient = (str(facts.get(name, "")) for name in ("ID", "UID", "label", "dcmPatientId"))
        return ImageSession(number, uid, label, patient, scans)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as exc:
        raise XnatRefused(200, "the answer is not the description of a session", page=True) from exc


def _children(item: dict[str, Any], name: str) -> list[dict[str, Any]]:
    return [child for group in item.get("children", ()) if group.get("field") == name for child in group["items"]]


def _scan(item: dict[str, Any]) -> Scan:
    facts = item["data_fields"]
    files = sum(int(one["data_fields"].get("file_count") or 0) for one in _children(item, "file"))
    return Scan(str(facts.get("ID", "")), str(facts.get("UID", "")), files)


def entry_of(row: dict[str, Any]) -> CatalogEntry:
    return CatalogEntry(
        *(value_of(row, name) for name in ("project", "timestamp", "foldername", "name", "tag", "status"))
    )


def places(text: str) -> Iterator[ArchivePlace]:
    """Yield the URIs of an import's answer: with or without /data before them, ended by any kind of line end."""
    for line in text.split():
        found = _URI.search(line)
        if not found:
            raise XnatRefused(200, "the answer is not a list of sessions", page=True)
        kind, direct, project, rest = found.groups()
        yield ArchivePlace(kind or direct, unquote(project), unquote(rest or ""))


def is_page(answer: requests.Response) -> bool:
    kind = answer.headers.get("Content-Type", "").lower()
    return "html" in kind or answer.content[:200].lstrip().lower().startswith((b"<!doctype html", b"<html"))


def words_of(answer: requests.Response) -> str:
    """Return the words of an error: XNAT's error page has them in its <h3>, other pages in their title."""
    text = answer.text
    if is_page(answer):
        found = {tag.lower(): inner for tag, inner in reversed(_TITLE.findall(text))}
        text = next((found[tag] for tag in ("h3", "h1", "h2", "title", "p") if found.get(tag)), text)
    return line(text) or str(answer.reason or "")


def line(text: str) -> str:
    """Return one short line without markup and control characters."""
    plain = " ".join(html.unescape(_TAG.sub(" ", text)).split())
    plain = "".join(c for c in plain if c.isprintable())
    return plain if len(plain) <= MAX_WORDS else plain[:MAX_WORDS] + "…"
