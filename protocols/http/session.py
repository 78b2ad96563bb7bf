"""An HTTP/1.1 client for bodies of any size (RFC 9110, RFC 9112), on sockets of its own.

The length of a body is known beforehand, so no server has to understand chunked requests; an answer that comes before
the whole body was sent is read and respected; a request can be stopped at any time. http.client, urllib3 and httpx read
the answer only when the last byte is sent, and can't be stopped in a wait; their speed is in docs/performance.md.
Redirects are followed within one origin only, so that neither data nor credentials go to a host that nobody named.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from socket import socket
from ssl import SSLSocket
from typing import Protocol
from urllib.parse import quote as encoded
from urllib.parse import urljoin, urlsplit

from protocols.http.answer import Answer
from protocols.http.proxy import Proxy
from protocols.net.connection import Connection, connect, handshake
from protocols.net.tls import Tls
from transfer.errors import Interrupted, Misconfigured, TimedOut

# How long to wait for "100 Continue" before the body goes anyway (RFC 9110 section 10.1.1); some servers never say it.
CONTINUE_S = 0.3
STALE_S = 0.5  # a connection idle for so long may have been closed by a server that tires quickly (Orthanc: 1 s)
LEFTOVER_BYTES = 1 << 20  # of an answer that nobody wants: read so that the connection can be used again
IDEMPOTENT = frozenset(("GET", "HEAD", "OPTIONS", "TRACE", "PUT", "DELETE"))  # RFC 9110 section 9.2.2
MAX_INFORMATIONAL = 1000  # answers 1xx to one request; a slow import may send one every few seconds
INFORMATIONAL_S = 3600.0  # from the first of them to the final answer
JOINED_BYTES = 65_536  # of a body that go with the head in one piece
REDIRECTS = (301, 302, 303, 307, 308)
MAX_REDIRECTS = 5
SAFE = "/?:@!$&'()*+,;=-._~%"  # stays as it is in a path and a query that a server names (RFC 3986 section 3.3)
PORTS = {"http": 80, "https": 443}
AGENT = "talaria"
_without_continue: set[str] = set()  # servers that did not say it in time: this process asks them no more


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


class Authorizer(Protocol):
    """Where the Authorization field comes from."""

    def header(self, check: Callable[[], None]) -> str:
        """Return the field's value."""

    def renew(self, refused: str, check: Callable[[], None]) -> bool:
        """Get another value after this one was refused; False if there is none."""

    @property
    def secrets(self) -> frozenset[str]:
        """What no message may show."""


@dataclass(frozen=True)
class WebOrigin:
    """A server: scheme, host and port, and how to talk to it."""

    scheme: str
    host: str
    port: int
    tls: Tls = field(default=Tls(), repr=False)
    connect_timeout_s: float = 10.0
    idle_timeout_s: float = 60.0
    proxy: Proxy | None = None

    @classmethod
    def of(cls, url: str, tls: Tls, connect_timeout_s: float, idle_timeout_s: float, proxy: str = "") -> WebOrigin:
        """Return the server that a URL names.

        Args:
            proxy: as `Proxy.of` takes it.
        """
        parts = urlsplit(url)
        return cls(
            parts.scheme,
            parts.hostname or "",
            parts.port or PORTS[parts.scheme],
            tls,
            connect_timeout_s,
            idle_timeout_s,
            Proxy.of(proxy, url),
        )

    @property
    def authority(self) -> str:
        """The value of the Host field; with the port only where it isn't the scheme's default."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == PORTS[self.scheme] else f"{host}:{self.port}"

    @property
    def where(self) -> str:
        """The server, for messages."""
        return f"{self.scheme}://{self.authority}"

    @property
    def way(self) -> str:
        """The server, and the proxy if there is one, for messages."""
        return f"{self.where} by way of {self.proxy.url}" if self.proxy else self.where

    @property
    def forwards(self) -> Proxy | None:
        """The proxy, if it reads requests and forwards them; for a server with TLS it forwards bytes."""
        return self.proxy if self.scheme == "http" else None

    def reach(self, check: Callable[[], None]) -> socket:
        """Connect to the server, or to the proxy that forwards to it; see `connect`."""
        if self.proxy is None:
            return connect(self.host, self.port, self.connect_timeout_s, check)
        sock = self.proxy.connect(self.tls, self.connect_timeout_s, check)
        if self.scheme == "https":
            self.proxy.tunnel(sock, self.host, self.port, self.connect_timeout_s, check)
        return sock

    def shake(self, sock: socket, check: Callable[[], None]) -> SSLSocket:
        """Shake hands with the server; closes the socket if that fails."""
        return handshake(sock, self.host, self.where, self.tls, self.connect_timeout_s, check)

    def connect(self, check: Callable[[], None]) -> Connection:
        """Make a connection; raises as `connection.connect`, `connection.handshake` and `Proxy` do."""
        sock = self.reach(check)
        if self.scheme == "https":
            sock = self.shake(sock, check)
        return Connection(sock, self.way, self.idle_timeout_s, check, has_cert=bool(self.tls.cert))


class Session:
    """Requests to one origin, over connections that are reused; safe to use from several threads.

    Args:
        authorizer: gives the Authorization field; None for none.
        check: called several times a second during a request; may raise to stop it.
        follow: whether redirects are followed; if not, they are answers like others.
    """

    def __init__(
        self,
        origin: WebOrigin,
        authorizer: Authorizer | None = None,
        check: Callable[[], None] = lambda: None,
        *,
        follow: bool = True,
    ) -> None:
        self.origin, self.authorizer, self.check, self.follow = origin, authorizer, check, follow
        self._idle: list[Connection] = []
        self._lock = threading.Lock()

    @property
    def secrets(self) -> frozenset[str]:
        """What no message may show, as of now."""
        found = self.authorizer.secrets if self.authorizer else frozenset()
        return found | (self.origin.proxy.secrets if self.origin.proxy else frozenset())

    def close(self) -> None:
        with self._lock:
            connections, self._idle = self._idle, []
        for connection in connections:
            connection.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @contextmanager
    def request(
        self,
        method: str,
        path: str,
        headers: Mapping[str, str] | None = None,
        body: Body | None = None,
        *,
        expect: bool = False,
    ) -> Iterator[Answer]:
        """Send a request; yields its answer, of whatever status, whose body must be read inside the block.

        A refused authorization is renewed once. Redirects within the origin are followed: those that keep the
        method always, others for GET.

        Args:
            path: with the query, encoded.
            expect: ask the server to judge the head before the body is sent (`Expect: 100-continue`).

        Raises:
            Unreachable, TimedOut, Interrupted, NotTrusted, Denied, Misconfigured: no answer could be had.
        """
        expect = expect and self.origin.where not in _without_continue
        answer = self._ask(_Request(method, path, headers or {}, body, expect))
        try:
            yield answer
            self._give_back(answer)
        except BaseException:
            answer.close()
            raise

    def _ask(self, request: _Request) -> Answer:
        renewed, redirects = False, 0
        while True:
            authorization = self.authorizer.header(self.check) if self.authorizer else ""
            answer = self._exchange(replace(request, authorization=authorization) if authorization else request)
            try:
                self._passed(answer)
                if answer.status == 417 and request.expect:
                    request = replace(request, expect=False)
                elif answer.status in (401, 403) and not renewed and self._renewed(authorization):
                    renewed = True
                elif self.follow and answer.status in REDIRECTS and "Location" in answer.headers:
                    redirects += 1
                    request = replace(request, path=self._redirected(answer, request, redirects))
                else:
                    return answer
                self._give_back(answer)
            except BaseException:
                answer.close()
                raise

    def _passed(self, answer: Answer) -> None:
        """Raise Denied if the proxy asks for credentials."""
        if answer.status == 407 and self.origin.forwards:
            raise self.origin.forwards.refusal(answer.status, answer.reason, self.origin.authority)

    def _renewed(self, refused: str) -> bool:
        return self.authorizer is not None and self.authorizer.renew(refused, self.check)

    def _redirected(self, answer: Answer, request: _Request, redirects: int) -> str:
        """Return the path of a redirect, if it is within this origin and the request may follow it."""
        here = self.origin.where
        try:
            target = urlsplit(urljoin(here + request.path, str(answer.headers["Location"])))
            origin = (target.scheme, target.hostname, target.port or PORTS.get(target.scheme))
        except ValueError as exc:
            raise Misconfigured(f"{here}: answers {answer.status} and points to something that is not a URL") from exc
        if origin != (self.origin.scheme, self.origin.host, self.origin.port):
            shown = f"{origin[0]}://{origin[1]}" + (f":{origin[2]}" if origin[2] != PORTS.get(origin[0]) else "")
            raise Misconfigured(
                f"{here}: answers {answer.status} and points to {shown}, which is not followed: "
                "set url to that, if it is the right place"
            )
        path = encoded(target.path, SAFE) or "/"
        if redirects > MAX_REDIRECTS:
            raise Misconfigured(f"{here}{path}: redirected too often: correct url or its prefixes")
        if request.method != "GET" and answer.status not in (307, 308):
            raise Misconfigured(
                f"{here}: answers {answer.status} and points to {path}, where a {request.method} can't follow: "
                "correct url or its prefixes"
            )
        return path + (f"?{encoded(target.query, SAFE)}" if target.query else "")

    def _exchange(self, request: _Request) -> Answer:
        while True:
            # What has a body is not sent twice because a connection was idle: it gets another one.
            fresh = not request.idempotent or request.body is not None
            connection, idle_s = self._connection(fresh=fresh)
            exchange = _Exchange(connection, request)
            try:
                return exchange.run(self.origin)
            except Interrupted:
                connection.close()
                # The server may have closed it just as we began, which says nothing about the request; but what may
                # have been carried out is not sent again (RFC 9110 section 9.2.2).
                again = idle_s >= STALE_S if request.idempotent else not exchange.complete
                if connection.used == 0 or not again:
                    raise
            except BaseException:
                connection.close()
                raise

    def _connection(self, *, fresh: bool) -> tuple[Connection, float]:
        """Return a connection and how long it has been idle.

        Args:
            fresh: no connection that the server may be about to close, because the request can't be repeated.
        """
        while True:
            with self._lock:
                connection = self._idle.pop() if self._idle else None
            if connection is None:
                return self.origin.connect(self.check), 0.0
            idle_s = time.monotonic() - connection.idle_since
            with suppress(OSError):
                if not (fresh and idle_s >= STALE_S) and not connection.heard():
                    return connection, idle_s
            connection.close()  # by the server, or it said something that nobody asked for

    def _give_back(self, answer: Answer) -> None:
        """Keep the connection if it can carry another request; read a short rest of the answer first."""
        if not answer.early and not answer.reusable:
            with suppress(Interrupted, TimedOut, KeyError, ValueError):
                if int(answer.headers["Content-Length"]) <= LEFTOVER_BYTES:
                    answer.read(LEFTOVER_BYTES)
        # A proxy may end every connection after one answer, and say so to nobody (tinyproxy).
        if answer.reusable and (answer.keeps or not self.origin.forwards):
            connection = answer.connection
            connection.idle_since = time.monotonic()
            with self._lock:
                self._idle.append(connection)
        else:
            answer.close()


@dataclass(frozen=True)
class _Request:
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


class _Exchange:
    """One request and its answer, which the server may send at any time.

    Attributes:
        complete: whether the server may have got enough of the request to carry it out.
    """

    def __init__(self, connection: Connection, request: _Request) -> None:
        self.complete = False
        self._connection, self._request = connection, request
        self._final: Answer | None = None  # if it came before everything was sent
        self._broken_off = False  # whether what was sent ends before its announced end
        self._informational, self._first_heard = 0, 0.0
        self._quiet = True  # nothing has come yet on this connection

    def run(self, origin: WebOrigin) -> Answer:
        """Send the request and return its final answer."""
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
