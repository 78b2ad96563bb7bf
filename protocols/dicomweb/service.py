"""What the three DICOMweb services share: where they are, what their statuses mean, DICOM JSON and XML.

Sources: PS3.18 sections 8.5 (status codes), 10.5 (store), 10.6 (search) and 10.4 (retrieve), Annex F (DICOM JSON),
PS3.19 Annex A (Native DICOM Model), RFC 9110 section 15.
"""

from __future__ import annotations

import functools
import json
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import quote as percent
from urllib.parse import urlencode

from pydicom.datadict import keyword_for_tag

from protocols import words
from protocols.answer import Answer
from protocols.http import Session
from protocols.link import SLICE_S
from transfer.errors import Busy, Cancelled, Denied, DispatchError, Interrupted, Misconfigured, NotFound

JSON = "application/dicom+json"
XML = "application/dicom+xml"
# JSON first; XML for servers that have nothing else. Orthanc takes the first that it knows.
ACCEPT = f"{JSON}, {XML};q=0.9, application/json;q=0.8, application/xml;q=0.7"

RESULT_BYTES = 128 << 20  # of a search: servers without pages give all at once, some 1 kB for each result
# What a status means where nothing more specific is known of the request.
STATUS_ERRORS: dict[int, type[DispatchError]] = {
    401: Denied,
    403: Denied,
    404: NotFound,
    410: NotFound,
    408: Busy,
    425: Busy,
    429: Busy,
    500: Busy,
    502: Busy,
    503: Busy,
    504: Busy,
    507: Busy,
    501: Misconfigured,
    505: Misconfigured,
}
ADVICE = {
    401: "check the credentials",
    403: "ask for the right to do this",
    404: "check url and the prefixes",
    405: "this service is not at this place: check url and the prefixes",
    410: "check url and the prefixes",
}
# In a value of a query. RFC 3986 section 3.4 allows more; those signs separate values for some servers.
QUERY_SAFE = "*?/:@!$'()-._~"
_SAFE = "@:$&!*'(),;=+-._~%"  # in a path, RFC 3986 section 3.3


@dataclass(frozen=True)
class Service:
    """A DICOMweb server.

    Attributes:
        base: path of the URL, without a slash at its end.
        qido, wado, stow: prefixes of the three services below it, "" for none.
        hidden: values that no message may show.
    """

    session: Session = field(repr=False)
    base: str = ""
    qido: str = ""
    wado: str = ""
    stow: str = ""
    hidden: frozenset[str] = field(default=frozenset(), repr=False)

    @property
    def where(self) -> str:
        return self.session.origin.where

    def path(self, prefix: str, *segments: str, query: Iterable[tuple[str, str]] = ()) -> str:
        """The path of a resource below a prefix, encoded, with its query."""
        given = [part for part in (*self.base.split("/"), *prefix.split("/")) if part]  # may be encoded already
        path = "".join("/" + percent(part, safe=_SAFE) for part in given)
        path += "".join("/" + percent(segment, safe="") for segment in segments)
        text = urlencode(list(query), quote_via=percent, safe=QUERY_SAFE)
        return f"{path}?{text}" if text else path

    def hiding(self, values: Iterable[str]) -> Service:
        """The same service, with more values that no message may show."""
        return replace(self, hidden=self.hidden | frozenset(values))

    def words(self, body: bytes, answer: Answer) -> str:
        """The server's own words in an answer: its error document, and its Warning fields."""
        warnings = " ".join(answer.headers.get_all("Warning") or ())
        said = words.quote(body, answer.media_type, self._hidden)
        return self.clean("; ".join(part for part in (said, warnings) if part))

    def clean(self, text: str) -> str:
        """A text of the server, fit for a message."""
        return words.clean(text, self._hidden)

    @property
    def _hidden(self) -> frozenset[str]:
        authorizer = self.session.authorizer
        return self.hidden | (authorizer.secrets if authorizer else frozenset())

    def error(self, answer: Answer, body: bytes, path: str) -> DispatchError:
        """The error that a status stands for; the message has the server's own words."""
        status = answer.status
        kind = STATUS_ERRORS.get(status, Busy if status >= 500 else Misconfigured)
        where = f"{self.where}{path.split('?')[0]}"
        text = f"{where}: {status} {self.clean(answer.reason)}".rstrip()
        if status == 401 and (scheme := (answer.headers.get("WWW-Authenticate") or "").split(" ")[0].strip(",")):
            text += f" (it asks for {self.clean(scheme)})"
        if said := self.words(body, answer):
            text += f": {said!r}"
        if status in ADVICE:
            text += f"; {ADVICE[status]}"
        return Busy(text, retry_after=answer.retry_after) if kind is Busy else kind(text)

    def get(self, path: str, accept: str) -> tuple[int, Answer, bytes]:
        """Fetch what a search finds; returns status, head and body."""
        with self.session.request("GET", path, {"Accept": accept}) as answer:
            return answer.status, answer, answer.read(RESULT_BYTES)


def pause(seconds: float, check: Callable[[], None]) -> None:
    """Wait; `check` is called several times a second and may raise to stop."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        check()
        time.sleep(min(left, SLICE_S))


def gravest(errors: Sequence[BaseException]) -> BaseException:
    """The one of several errors to raise: what nobody foresaw, a cancellation, what ends all attempts, the rest."""

    def rank(error: BaseException) -> int:
        if not isinstance(error, DispatchError):
            return 0
        return 1 if isinstance(error, Cancelled) else 3 if error.retryable else 2

    return min(errors, key=rank)


# ---- DICOM JSON and XML

Attributes = dict[str, Any]  # as PS3.18 Annex F: by tag, eight hexadecimal digits in upper case


def parse(body: bytes) -> list[Attributes]:
    """Read data sets from DICOM JSON or from the Native DICOM Model in XML, whichever it is.

    Raises:
        ValueError: it is neither.
    """
    text = body.removeprefix(b"\xef\xbb\xbf").strip()
    try:
        if text[:1] == b"<":
            return [_native(_xml(text))]
        document = json.loads(text)
    except RecursionError as exc:
        raise ValueError("nested too deeply") from exc
    document = document if isinstance(document, list) else [document]
    if not all(isinstance(one, dict) for one in document):
        raise ValueError("not DICOM JSON")
    return [{str(tag).upper(): element for tag, element in one.items()} for one in document]


def _xml(text: bytes) -> ElementTree.Element:
    if b"<!DOCTYPE" in text or b"<!ENTITY" in text:
        raise ValueError("XML with a document type")
    try:
        root = ElementTree.fromstring(text)  # noqa: S314
    except ElementTree.ParseError as exc:
        raise ValueError(f"XML that is not well-formed: {exc}") from exc
    if _local(root) != "NativeDicomModel":
        found = next((one for one in root.iter() if _local(one) == "NativeDicomModel"), None)
        if found is None:
            raise ValueError("XML, but no Native DICOM Model")
        return found
    return root


def _local(element: ElementTree.Element) -> str:
    return element.tag.rpartition("}")[2]


def _native(parent: ElementTree.Element) -> Attributes:
    found: Attributes = {}
    for element in parent:
        if _local(element) != "DicomAttribute":
            continue
        vr = element.get("vr", "")
        values: list[Any] = []
        for child in element:
            kind = _local(child)
            if kind == "Item":
                values.append(_native(child))
            elif kind == "Value":
                values.append((child.text or "").strip())
            elif kind == "PersonName":
                values.append({_local(group): "^".join(_name(group)) for group in child})
        found[element.get("tag", "").upper()] = {"vr": vr, "Value": values}
    return found


def _name(group: ElementTree.Element) -> list[str]:
    parts = {_local(part): (part.text or "").strip() for part in group}
    names = [parts.get(name, "") for name in ("FamilyName", "GivenName", "MiddleName", "NamePrefix", "NameSuffix")]
    while names and not names[-1]:
        names.pop()
    return names


def values(attributes: Attributes, tag: str) -> list[Any]:
    """All values of an element; none if it is absent, empty or malformed."""
    element = attributes.get(tag)
    found = element.get("Value") if isinstance(element, dict) else None
    return [value for value in found if value is not None] if isinstance(found, list) else []


def text(attributes: Attributes, tag: str) -> str:
    """The first value of an element as text, "" if there is none."""
    found = values(attributes, tag)
    return str(found[0]).strip(" \0") if found else ""


def number(attributes: Attributes, tag: str) -> int | None:
    """The first value of an element as a number; servers write codes as numbers, or as text."""
    try:
        return int(text(attributes, tag))
    except ValueError:
        return None


def keyworded(attributes: Attributes) -> dict[str, Any]:
    """Values by DICOM keyword: one value as it is, several as a list, none as ""; sequences are left out."""
    found: dict[str, Any] = {}
    for tag, element in attributes.items():
        keyword = _keyword(tag)
        if not keyword or not isinstance(element, dict) or element.get("vr") in ("SQ", "OB", "OW", "UN"):
            continue
        plain = [_plain(value) for value in values(attributes, tag)]
        found[keyword] = plain[0] if len(plain) == 1 else plain or ""
    return found


@functools.lru_cache(maxsize=4096)  # a look into pydicom's dictionary takes longer than all the rest
def _keyword(tag: str) -> str:
    """The keyword of a tag, "" if it has none or is no tag."""
    try:
        return keyword_for_tag(int(tag, 16))
    except (ValueError, OverflowError):
        return ""


def _plain(value: Any) -> Any:
    """A person's name as its VR has it: up to three groups with '='."""
    if not isinstance(value, dict):
        return value
    groups = [str(value.get(group, "")) for group in ("Alphabetic", "Ideographic", "Phonetic")]
    return "=".join(groups).rstrip("=")


def unexpected(service: Service, answer: Answer, body: bytes, path: str) -> DispatchError:
    """The error for an answer of status 200 that is not what was asked for, such as a login page."""
    said = service.words(body, answer)
    where = f"{service.where}{path.split('?')[0]}"
    if answer.media_type in (JSON, XML, "application/json", "application/xml", "text/xml"):
        return Interrupted(f"{where}: the answer can't be read as DICOM JSON or XML")
    return Misconfigured(
        f"{where}: the answer is {answer.media_type or 'of no type'} instead of DICOM JSON"
        + (f" ({said!r})" if said else "")
        + ": check url and the prefixes"
    )
