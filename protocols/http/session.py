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
from dataclasses import replace
from typing import Protocol
from urllib.parse import quote as encoded
from urllib.parse import urljoin, urlsplit

from protocols.http.answer import Answer
from protocols.http.exchange import Body, Exchange, Request, says_continue
from protocols.http.origin import PORTS, WebOrigin
from protocols.net.connection import Connection
from transfer.errors import Interrupted, Misconfigured, TimedOut

STALE_S = 0.5  # a connection idle for so long may have been closed by a server that tires quickly (Orthanc: 1 s)
LEFTOVER_BYTES = 1 << 20  # of an answer that nobody wants: read so that the connection can be used again
REDIRECTS = (301, 302, 303, 307, 308)
MAX_REDIRECTS = 5
SAFE = "/?:@!$&'()*+,;=-._~%"  # stays as it is in a path and a query that a server names (RFC 3986 section 3.3)


class Authorizer(Protocol):
    """Where the Authorization field comes from."""

    def header(self, check: Callable[[], None]) -> str:
        """Return the field's value."""

    def renew(self, refused: str, check: Callable[[], None]) -> bool:
        """Get another value after this one was refused; False if there is none."""

    @property
    def secrets(self) -> frozenset[str]:
        """What no message may show."""


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
        self._forbidden = ""  # an authorization that a resource was refused to, and no other one to be had helped

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
        expect = expect and says_continue(self.origin)
        answer = self._ask(Request(method, path, headers or {}, body, expect))
        try:
            yield answer
            self._give_back(answer)
        except BaseException:
            answer.close()
            raise

    def begin(self, method: str, path: str, headers: Mapping[str, str], body: Body) -> Begun:
        """Send a request whose answer is read later, so that the server works while the next one is prepared.

        Raises as `request`.
        """
        request = self._authorized(Request(method, path, headers, body, expect=False))
        connection, _ = self._connection(fresh=True)
        exchange = Exchange(connection, request)
        try:
            exchange.send(self.origin)
        except BaseException:
            connection.close()
            raise
        return Begun(self, request, exchange)

    def _authorized(self, request: Request) -> Request:
        if self.authorizer is None:
            return request
        return replace(request, authorization=self.authorizer.header(self.check))

    def _ask(self, request: Request, answer: Answer | None = None) -> Answer:
        """Return the answer to a request, after what has to be done again.

        Args:
            answer: the one that it has had, if it was sent already.
        """
        renewed, redirects = False, 0
        while True:
            if answer is None:
                request = self._authorized(request)
                answer = self._exchange(request)
            try:
                self._passed(answer)
                if answer.status == 417 and request.expect:
                    request = replace(request, expect=False)
                elif not renewed and self._renewed(answer, request):
                    renewed = True
                elif self.follow and answer.status in REDIRECTS and "Location" in answer.headers:
                    redirects += 1
                    request = replace(request, path=self._redirected(answer, request, redirects))
                else:
                    self._forbidden = request.authorization if renewed and answer.status == 403 else self._forbidden
                    return answer
                self._give_back(answer)
            except BaseException:
                answer.close()
                raise
            answer = None

    def _passed(self, answer: Answer) -> None:
        """Raise Denied if the proxy asks for credentials."""
        if answer.status == 407 and self.origin.forwards:
            raise self.origin.forwards.refusal(answer.status, answer.reason, self.origin.authority)

    def _renewed(self, answer: Answer, request: Request) -> bool:
        """Return True if there is another authorization now: a right that is lacking needs no look for each request."""
        refused, forbidden = request.authorization, answer.status == 403
        if self.authorizer is None or answer.status not in (401, 403) or (forbidden and refused == self._forbidden):
            return False
        if self.authorizer.renew(refused, self.check):
            return True
        self._forbidden = refused if forbidden else self._forbidden
        return False

    def _redirected(self, answer: Answer, request: Request, redirects: int) -> str:
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

    def _exchange(self, request: Request) -> Answer:
        while True:
            # What has a body is not sent twice because a connection was idle: it gets another one.
            fresh = not request.idempotent or request.body is not None
            connection, idle_s = self._connection(fresh=fresh)
            exchange = Exchange(connection, request)
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


class Begun:
    """A request that was sent, and whose answer is still to be read: `read` or `leave` it, exactly once."""

    def __init__(self, session: Session, request: Request, exchange: Exchange) -> None:
        self._session, self._request, self._exchange = session, request, exchange

    def read(self, limit: int) -> tuple[Answer, bytes]:
        """Return the answer and its body of at most `limit` bytes; raises as `Session.request`."""
        try:
            first = self._exchange.answer()
        except BaseException:
            self.leave()
            raise
        answer = self._session._ask(self._request, first)
        try:
            body = answer.read(limit)
            self._session._give_back(answer)
        except BaseException:
            answer.close()
            raise
        return answer, body

    def leave(self) -> None:
        """Close the connection: nobody waits for the answer any more."""
        self._exchange.close()
