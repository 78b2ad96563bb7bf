"""What the three DICOMweb services share: where they are, and the meaning of statuses.

Sources: PS3.18 sections 8.5 (status codes), 10.5 (store), 10.6 (search) and 10.4 (retrieve), RFC 9110 section 15.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from urllib.parse import quote as percent
from urllib.parse import urlencode

from protocols.http.answer import Answer
from protocols.http.head import BUSY_STATUS
from protocols.http.session import Session
from protocols.net import words
from protocols.net.connection import SLICE_S
from transfer.errors import Busy, Denied, DispatchError, Interrupted, Misconfigured, NotFound, Unauthorized

JSON = "application/dicom+json"
XML = "application/dicom+xml"
FILES = "DICOM files"  # what WADO gives, in messages
# JSON first; XML for servers that have nothing else. Orthanc takes the first that it knows.
ACCEPT = f"{JSON}, {XML};q=0.9, application/json;q=0.8, application/xml;q=0.7"

RESULT_BYTES = 128 << 20  # of a search: servers without pages give all at once, some 1 kB for each result
# What a status means where nothing more specific is known of the request.
STATUS_ERRORS: dict[int, type[DispatchError]] = {
    **dict.fromkeys(BUSY_STATUS, Busy),
    401: Unauthorized,
    403: Denied,
    404: NotFound,
    410: NotFound,
    501: Misconfigured,
    505: Misconfigured,
}
ADVICE = {
    401: "check the credentials",
    403: "ask for the right to do this",
    404: "check url and the prefixes",
    405: "this service is not there: check url and the prefixes",
    406: "it can't give its answer as {wanted} here: check url and the prefixes, and any proxy before the server",
    410: "check url and the prefixes",
    415: "it does not take this type of content here: check url and the prefixes, and any proxy before the server",
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
        """Return the path of a resource below a prefix, encoded, with its query."""
        given = [part for part in (*self.base.split("/"), *prefix.split("/")) if part]  # may be encoded already
        path = "".join("/" + percent(part, safe=_SAFE) for part in given)
        path += "".join("/" + percent(segment, safe="") for segment in segments)
        text = urlencode(list(query), quote_via=percent, safe=QUERY_SAFE)
        return f"{path}?{text}" if text else path

    def hiding(self, values: Iterable[str]) -> Service:
        """Return the same service, with more values that no message may show."""
        return replace(self, hidden=self.hidden | frozenset(values))

    def words(self, body: bytes, answer: Answer) -> str:
        """Return the server's own words in an answer: its error document, and its Warning fields."""
        warnings = " ".join(answer.headers.get_all("Warning") or ())
        said = words.excerpt(body, answer.media_type, self._hidden)
        return self.clean("; ".join(part for part in (said, warnings) if part))

    def clean(self, text: str) -> str:
        """Return a text of the server in a form for messages."""
        return words.clean(text, self._hidden)

    @property
    def _hidden(self) -> frozenset[str]:
        return self.hidden | self.session.secrets

    def error(self, answer: Answer, body: bytes, path: str, wanted: str = "JSON or XML") -> DispatchError:
        """Return the error that a status means; the message has the server's own words, and what was asked for."""
        status = answer.status
        kind = STATUS_ERRORS.get(status, Busy if status >= 500 else Misconfigured)
        where = f"{self.where}{path.split('?')[0]}"
        text = f"{where}: {status} {self.clean(answer.reason)}".rstrip()
        if status == 401 and (scheme := (answer.headers.get("WWW-Authenticate") or "").split(" ")[0].strip(",")):
            text += f" (it asks for {self.clean(scheme)})"
        if said := self.words(body, answer):
            text += f": {said!r}"
        if status in ADVICE:
            text += f"; {ADVICE[status].format(wanted=wanted)}"
        return Busy(text, retry_after=answer.retry_after) if kind is Busy else kind(text)

    def get(self, path: str, accept: str) -> tuple[int, Answer, bytes]:
        """Fetch a resource; return status, head and body."""
        with self.session.request("GET", path, {"Accept": accept}) as answer:
            return answer.status, answer, answer.read(RESULT_BYTES)


def pause(seconds: float, check: Callable[[], None]) -> None:
    """Wait; `check` is called several times a second and may raise to stop."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        check()
        time.sleep(min(left, SLICE_S))


def unexpected(service: Service, answer: Answer, body: bytes, path: str, wanted: str = "DICOM JSON") -> DispatchError:
    """Return the error for an answer of status 200 that is not what was asked for, such as a login page."""
    said = service.words(body, answer)
    where = f"{service.where}{path.split('?')[0]}"
    if wanted != FILES and answer.media_type in (JSON, XML, "application/json", "application/xml", "text/xml"):
        return Interrupted(f"{where}: the answer can't be read as DICOM JSON or XML")
    return Misconfigured(
        f"{where}: the answer is {answer.media_type or 'of no type'} instead of {wanted}"
        + (f" ({said!r})" if said else "")
        + ": check url and the prefixes"
    )
