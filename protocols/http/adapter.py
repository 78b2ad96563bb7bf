"""Lets a library that speaks through `requests` speak through our own HTTP client instead of urllib3.

So the library's requests can be stopped in any wait, time out by silence and not by the length of a call, read an
answer that comes before all of the body was sent, send pieces of any size, and raise our own errors. And no URL appears
in a log: urllib3 writes every URL into its log and its errors, and XNAT's URLs hold patients' IDs.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import requests
from requests.adapters import BaseAdapter
from requests.structures import CaseInsensitiveDict

from protocols.http.answer import Answer
from protocols.http.exchange import Body, Content
from protocols.http.multipart import parameters
from protocols.http.session import Session

ANSWER_BYTES = 256 << 20  # a listing of a million files is smaller
# What our client sets itself, by what it really does.
OWN_FIELDS = frozenset(("host", "content-length", "transfer-encoding", "connection", "accept-encoding"))


class Adapter(BaseAdapter):
    """Sends a `requests` session's requests to one origin.

    A body that is not bytes must be one of `protocols.http.exchange`, and have a length for `requests` to see
    (`__len__`).
    """

    def __init__(self, session: Session) -> None:
        super().__init__()
        self._session = session

    def close(self) -> None:
        self._session.close()

    def send(self, request: requests.PreparedRequest, *_: Any, **__: Any) -> requests.Response:
        """Send a request and read its whole answer. Timeouts, trust and proxies are those of our session.

        Raises:
            DispatchError: as `Session.request` does.
        """
        url = urlsplit(request.url or "")
        path = url.path + (f"?{url.query}" if url.query else "")
        with self._session.request(request.method or "GET", path, _fields(request.headers), _body(request)) as answer:
            data = answer.read(ANSWER_BYTES)
        response = requests.Response()
        response.status_code = answer.status
        response.reason = answer.reason
        response.headers = CaseInsensitiveDict(answer.headers.items())
        # Else `requests` takes any text for Latin-1, or tries one encoding after the other.
        response.encoding = parameters(answer.headers.get("Content-Type", ""))[1].get("charset", "utf-8")
        response.raw = _Raw(data, answer)
        response._content = data
        response.url, response.request = request.url or "", request
        requests.cookies.extract_cookies_to_jar(response.cookies, request, response.raw)  # type: ignore[no-untyped-call]
        return response


class _Raw(io.BytesIO):
    """What `requests` takes for urllib3's answer, in which it looks for cookies.

    Attributes:
        answer: the head as it came: `requests` keeps one field of a name.
    """

    def __init__(self, data: bytes, answer: Answer) -> None:
        super().__init__(data)
        self.answer = answer
        self._original_response = SimpleNamespace(msg=answer.headers)

    def release_conn(self) -> None:
        """Do nothing: the whole answer has been read."""


def _fields(headers: Mapping[str, str | bytes]) -> dict[str, str]:
    return {
        name: value.decode("latin-1") if isinstance(value, bytes) else value
        for name, value in headers.items()
        if name.lower() not in OWN_FIELDS
    }


def _body(request: requests.PreparedRequest) -> Body | None:
    body: Any = request.body
    if body is None:
        return None
    if isinstance(body, str):
        return Content(body.encode())
    if isinstance(body, bytes):
        return Content(body)
    ours: Body = body
    return ours
