"""Fetches one page of a search, or metadata, with dicomweb-client, over our own connections.

The library makes the URLs and reads the JSON. This module adds what it would lose: queries in the form that servers
read (it encodes `*`, which Orthanc then takes for a letter), answers in XML, the status, type and words of an answer
that it can't read, and the Warning that there are more results. It fetches no further page by itself: with a server
that ignores `offset` that would never end.
"""

from __future__ import annotations

import json
import logging
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl, urlencode
from urllib.parse import quote as percent

import requests
from dicomweb_client.web import DICOMwebClient

from imaging import json as dicomjson
from imaging.json import Attributes
from protocols.dicomweb import service as dicomweb
from protocols.dicomweb.service import JSON, QUERY_SAFE, XML, Service
from protocols.http.adapter import Adapter
from protocols.http.answer import Answer
from protocols.http.multipart import Parts, parameters
from protocols.http.session import Session
from transfer.errors import Busy, DispatchError, Interrupted, NotFound

# It logs URLs, which hold what identifies patients, and servers' words, which may.
logging.getLogger("dicomweb_client").setLevel(logging.CRITICAL + 1)

ACCEPT = f"{JSON}, application/json;q=0.9"
ACCEPT_XML = f'multipart/related; type="{XML}", {XML};q=0.9'

FIRST_WAIT_S = 1.0  # at a server that asks to come back and doesn't say when; doubles each time
MOST_WAIT_S = 60.0  # who has to wait longer gives the place to others meanwhile

_TAG = re.compile(r"[0-9A-Fa-f]{8}")  # how an attribute is named (PS3.18 annex F.2.2)

Keys = tuple[tuple[str, str], ...]


# Of a form of a request: 413 where it would give too much, 422 as some frameworks write it.
REFUSALS = (400, 413, 422, 501)
FAILS = 500  # likewise of an offset, if it says so twice: some stumble over one that is behind their last result


class RequestRefused(Exception):
    """The server refuses this form of the request."""

    def __init__(self, error: DispatchError) -> None:
        super().__init__(error.message)
        self.error = error


@dataclass(frozen=True)
class Page:
    """Results of a search, and whether the server says that there are more."""

    rows: list[Attributes] = field(repr=False)
    more: bool = False


class DicomwebClient:
    """The searches and metadata of one service; for one thread at a time.

    Args:
        tries: how often a search is made over connections that break.
        waits: how often it waits at a server that asks to come back.
    """

    def __init__(self, service: Service, tries: int = 1, waits: int = 0) -> None:
        self._service, self._tries, self._waits = service, tries, waits
        session = requests.Session()
        session.trust_env = False  # proxies, certificates and passwords are the target's own
        session.headers.clear()
        self._wire = _Wire(service.session)
        session.mount("http://", self._wire)
        session.mount("https://", self._wire)
        self._library = DICOMwebClient(
            service.where + service.path(""),
            session,
            qido_url_prefix=service.path(service.qido).removeprefix(service.path("")).strip("/") or None,
            wado_url_prefix=service.path(service.wado).removeprefix(service.path("")).strip("/") or None,
            permissive_uid=True,
        )
        self._library.set_http_retry_params(retry=False)

    @property
    def last(self) -> tuple[Answer, bytes] | None:
        """The latest answer, and its body; None if none came."""
        return self._wire.last

    def search(
        self,
        segments: Sequence[str],
        keys: Keys = (),
        fields: Sequence[str] = (),
        *,
        limit: int | None = None,
        offset: int | None = None,
    ) -> Page:
        """Fetch one page of the studies, series or instances at a path (`studies/<uid>/series`, for one).

        Raises:
            RequestRefused: 400, 413, 422, 501; of an offset also 500, twice.
            NotFound: there is no such resource, or no such page.
            DispatchError: as `Service.error`.
        """
        asks: dict[str, Callable[..., Any]] = {
            "studies": self._library.search_for_studies,
            "series": self._library.search_for_series,
            "instances": self._library.search_for_instances,
        }
        ask = asks[segments[-1]]
        above = [percent(uid, safe="") for uid in segments[1::2]]
        found, answer = self._patiently(
            lambda: ask(*above, limit=limit, offset=offset, fields=fields or None, search_filters=dict(keys)),
            self._service.path(self._service.qido, *segments),
            fails=1 if offset else None,
        )
        # PS3.18 section 8.3.4.4: "Warning: 299 ...: There are additional results that can be requested".
        more = any(warning.strip().startswith("299") for warning in answer.headers.get_all("Warning") or ())
        return Page([row for row in found if row], more)

    def metadata(self, *uids: str) -> list[Attributes]:
        """Fetch the metadata of all instances of a study or series, or of one instance.

        Raises:
            Refused, DispatchError: as for a search.
        """
        ask: Callable[..., Any] = (
            self._library.retrieve_study_metadata,
            self._library.retrieve_series_metadata,
            self._library.retrieve_instance_metadata,
        )[len(uids) - 1]
        names = ("studies", "series", "instances")
        segments = [part for pair in zip(names, uids, strict=False) for part in pair]
        path = self._service.path(self._service.wado, *segments, "metadata")
        return self._read(lambda: ask(*(percent(uid, safe="") for uid in uids)), path)[0]

    def _patiently(self, ask: Callable[[], Any], path: str, fails: int | None) -> tuple[list[Attributes], Answer]:
        broken = waited = 0
        while True:
            try:
                return self._read(ask, path)
            except Interrupted:
                broken += 1
                if broken >= self._tries:
                    raise
            except Busy as exc:
                wait_s = FIRST_WAIT_S * 2**waited if exc.retry_after is None else exc.retry_after
                status = self.last[0].status if self.last else 0
                if status == FAILS and fails is not None:
                    if not fails:
                        raise RequestRefused(exc) from None
                    fails -= 1
                    continue
                later = status in (429, 503)
                waited += 1
                if waited > self._waits or not later or wait_s > MOST_WAIT_S:
                    raise
                dicomweb.pause(wait_s, self._service.session.check)

    def _read(self, ask: Callable[[], Any], path: str) -> tuple[list[Attributes], Answer]:
        """Let the library send and read; raise our own error, with the server's words, if it can't read the answer."""
        service, problem = self._service, None
        self._wire.last = None
        try:
            found = dicomjson.data_sets(ask())
            if any(row and not any(map(_TAG.fullmatch, row)) for row in found):  # as in {"results": [...]}
                raise ValueError("not DICOM JSON")  # noqa: TRY301
        except (requests.HTTPError, ValueError, RecursionError) as exc:
            problem = exc
        if self._wire.last is None:  # nothing was sent: a UID that no path can hold
            raise NotFound(f"{service.where}{path}: is not a valid path") from None
        answer, body = self._wire.last
        if problem is None and answer.status in (200, 204, 206):
            return found, answer
        # Not `from problem`: the library's texts hold the whole URL, which may name a patient.
        if problem is not None and answer.status in (200, 206):
            raise dicomweb.unexpected(service, answer, body, path) from None
        error = service.error(answer, body, path)
        if answer.status in REFUSALS:
            raise RequestRefused(error) from None
        if answer.status == 416:  # no such page
            raise NotFound(error.message) from None
        raise error from None


class _Wire(Adapter):
    """The library's connections, which are our own.

    Attributes:
        last: the latest answer, and its body as it came.
    """

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        self._kept = threading.local()
        self._accept = ACCEPT

    @property
    def last(self) -> tuple[Answer, bytes] | None:
        kept: tuple[Answer, bytes] | None = getattr(self._kept, "last", None)
        return kept

    @last.setter
    def last(self, value: tuple[Answer, bytes] | None) -> None:
        self._kept.last = value

    def send(self, request: requests.PreparedRequest, *args: Any, **settings: Any) -> requests.Response:
        """Send a request, its query in the form that servers read; return the answer with a body in JSON."""
        head, _, query = (request.url or "").partition("?")
        if query:
            pairs = parse_qsl(query, keep_blank_values=True)
            request.url = f"{head}?{urlencode(pairs, quote_via=percent, safe=QUERY_SAFE)}"
        request.headers["Accept"] = self._accept
        response = super().send(request)
        if response.status_code == 406 and self._accept == ACCEPT:
            request.headers["Accept"] = ACCEPT_XML
            response = super().send(request)
            if response.status_code < 300:
                self._accept = ACCEPT_XML
        raw: Any = response.raw
        answer: Answer = raw.answer
        self.last = answer, response.content
        if response.status_code in (200, 206):
            response._content = _as_json(answer, response.content, head)
        elif response.status_code < 400:
            response._content = b""
        return response


def _as_json(answer: Answer, body: bytes, where: str) -> bytes:
    """Return the body of an answer as JSON; unchanged if it is neither JSON nor XML."""
    body = body.removeprefix(b"\xef\xbb\xbf").strip()
    kind, options = parameters(answer.headers.get("Content-Type", ""))
    try:
        if kind.startswith("multipart/") and options.get("boundary"):
            parts = Parts(iter([memoryview(body)]), options["boundary"], where)
            texts = [b"".join(bytes(piece) for piece in parts.content()) for _ in parts]
            return json.dumps([one for text in texts for one in dicomjson.parse(text)]).encode()
        if body[:1] == b"<":
            return json.dumps(dicomjson.parse(body)).encode()
    except ValueError:
        pass
    return body
