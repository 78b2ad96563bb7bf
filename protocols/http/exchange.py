"""One request and its answer on one connection; the answer may come at any time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from protocols.http.answer import Answer
from protocols.http.origin import WebOrigin
from protocols.net.connection import Connection
from transfer.errors import Interrupted, TimedOut

# How long to wait for "100 Continue" before the body goes anyway (RFC 9110 section 10.1.1); some servers never say it.
CONTINUE_S = 0.3
IDEMPOTENT = frozenset(("GET", "HEAD", "OPTIONS", "TRACE", "PUT", "DELETE"))  # RFC 9110 section 9.2.2
MAX_INFORMATIONAL = 1000  # answers 1xx to one request; a slow import may send one every few seconds
INFORMATIONAL_S = 3600.0  # from the first of them to the final answer
JOINED_BYTES = 65_536  # of a body that go with the head in one piece
AGENT = "talaria"
_without_continue: set[str] = set()  # servers that did not say it in time: this process asks them no more


def says_continue(origin: WebOrigin) -> bool:
    """Return False for a server that was asked to judge a head, and did not say "100 Continue" in time."""
    return origin.where not in _without_continue


class Body(Protocol):
    """The body of a request; asked for its pieces again if the request has to be repeated."""

    @property
    def length(self) -> int:
        """Bytes, exactly."""

    def __iter__(self) -> Iterator[memoryview]: ...

    def sent(self, count: int) -> None:
        """Count bytes that were sent."""


@dataclass(frozen=True)
class Content:
    """A body in memory."""

    data: bytes

    @property
    def length(self) -> int:
        return len(self.data)

    def __iter__(self) -> Iterator[memoryview]:
        yield memoryview(self.data)

    def sent(self, count: int) -> None:
        pass


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    headers: Mapping[str, str] = field(repr=False)
    body: Body | None = field(repr=False)
    expect: bool
    authorization: str = field(default="", repr=False)

    @property
    def idempotent(self) -> bool:
        return self.method in IDEMPOTENT

    def head(self, origin: WebOrigin) -> bytes:
        fields = {"Host": origin.authority, "User-Agent": AGENT, "Accept-Encoding": "identity", **self.headers}
        if self.authorization:
            fields["Authorization"] = self.authorization
        if self.body is not None:
            fields["Content-Length"] = str(self.body.length)
            if self.expect:
                fields["Expect"] = "100-continue"
        path = self.path
        if proxy := origin.forwards:
            path = origin.where + path  # RFC 9112 section 3.2.2
            fields |= proxy.authorization
        lines = [f"{self.method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items())]
        if not "".join(lines).isprintable():
            raise ValueError("a header field holds a control character")
        return "\r\n".join([*lines, "", ""]).encode("latin-1")


class Exchange:
    """One request and its answer, which the server may send at any time.

    Attributes:
        complete: whether the server may have got enough of the request to carry it out.
    """

    def __init__(self, connection: Connection, request: Request) -> None:
        self.complete = False
        self._connection, self._request = connection, request
        self._final: Answer | None = None  # if it came before everything was sent
        self._broken_off = False  # whether what was sent ends before its announced end
        self._informational, self._first_heard = 0, 0.0
        self._quiet = True  # nothing has come yet on this connection

    def run(self, origin: WebOrigin) -> Answer:
        """Send the request and return its final answer."""
        self.send(origin)
        return self.answer()

    def send(self, origin: WebOrigin) -> None:
        """Send the request, as far as the server wants it."""
        body, head = self._request.body, self._request.head(origin)
        if body is None or body.length == 0:
            self.complete = self._send(memoryview(head))
        elif not self._request.expect:
            self._upload(head, body)
        elif self._send(memoryview(head)):
            if not self._connection.listen(CONTINUE_S):
                _without_continue.add(origin.where)
            else:
                self._hear()
            self._broken_off = self._final is not None  # the server has no need of the body
            if not self._final:
                self._upload(b"", body)

    def close(self) -> None:
        self._connection.close()

    def answer(self) -> Answer:
        """Return the final answer."""
        while self._final is None:
            self._hear()
        self._final.early = self._broken_off
        self._connection.used += 1
        return self._final

    def _upload(self, head: bytes, body: Body) -> None:
        """Send the rest of the head and the body, as far as the server lets us.

        The head is sent together with the beginning of the body: alone it would wake the server for nothing.
        """
        ahead = len(head)

        def sent(count: int) -> None:
            nonlocal ahead
            of_body, ahead = max(0, count - ahead), max(0, ahead - count)
            if of_body:
                self.complete = True
                body.sent(of_body)

        for piece in body:
            if head:
                first, head = b"".join((head, piece[:JOINED_BYTES])), b""
                if not self._send(memoryview(first), sent):
                    return
                piece = piece[JOINED_BYTES:]
            if not self._send(piece, sent):
                return

    def _send(self, data: memoryview, sent: Callable[[int], None] = lambda count: None) -> bool:
        """Send bytes; False if sending more is of no use."""
        while data:
            try:
                quiet, self._quiet = self._quiet, False
                data = data[self._connection.send(data, sent, deaf=self._final is not None, quiet=quiet) :]
            except (Interrupted, TimedOut):
                if self._final is None:
                    raise
                self._broken_off = True  # the server had said all it wanted to say
                return False
            if data and not self._hear_early():
                return False
        return True

    def _hear_early(self) -> bool:
        """Read what the server sends meanwhile; False if it wants no more of the request."""
        self._hear()
        # After an early success the server may still be reading; after an error it is not.
        self._broken_off = self._final is not None and self._final.status >= 300
        return not self._broken_off

    def _hear(self) -> None:
        """Read one answer; a status of 1xx means that the final one is still to come (RFC 9110 section 15.2)."""
        answer = Answer(self._connection, self._request.method, self._connection.where)
        if answer.status >= 200:
            self._final = answer
            return
        self._informational += 1
        self._first_heard = self._first_heard or time.monotonic()
        if time.monotonic() - self._first_heard > INFORMATIONAL_S:
            raise TimedOut(f"{self._connection.where}: only answers of status 1xx for {INFORMATIONAL_S:g} s")
        if self._informational > MAX_INFORMATIONAL:
            raise Interrupted(f"{self._connection.where}: more than {MAX_INFORMATIONAL} answers of status 1xx")
