"""The gate: lets a request or websocket in, or refuses it, before anything behind sees it. Pure ASGI.

In this order: Host (421), Origin (403), who asks (401, or the login page), what their role may do (403). Requests to
Prefect carry Prefect's own credential instead of the client's.
"""

from __future__ import annotations

import asyncio
import base64
import json
import logging
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import BaseRoute

from talaria.front import prefect_rules
from talaria.front.access import ACTING, NOBODY, SCOPE_KEY, Identity, Role, bounds_body, found, role_of
from talaria.front.changed import change_for, changed
from talaria.front.dress import dressed, safe_host
from talaria.front.keys import Door, KeyRing, header_of
from talaria.front.lasting import STILL, run_while
from talaria.front.origin import forwarded_for, host_is_ours, proves_same_origin, why_foreign
from talaria.front.plain import refusal, wants_page
from talaria.listener import is_loopback

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Message, Receive, Send], Awaitable[None]]

OWN = "/talaria"
METRICS = "/metrics"  # where scrapers look for it
MOST_BYTES = 16 << 20  # of a person's or script's request; a list of 100,000 paths takes half of it
FIRST_WORD_S = 20  # of a websocket, which says who opens it
_NOT_VALID = "the token is not valid here: it is misspelt, has expired or was revoked"
_SAFE = ("GET", "HEAD", "OPTIONS")
_AUTOMATION = {b"prefect-automation-id", b"prefect-automation-name"}  # would stand in `created_by` as who made a run
_logger = logging.getLogger("talaria.front")


class _Refused(Exception):
    """A request that is not let in."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status, self.why = status, why


@dataclass(frozen=True)
class _Asker:
    """Who sent a request, and how it came.

    Attributes:
        ambient: whether the browser identifies them by itself (cookie, proxy), whichever page made the request.
        local: whether the request came over loopback, and through no proxy.
        secure: whether it was TLS, here or at the proxy.
    """

    who: Identity
    ambient: bool
    local: bool
    secure: bool
    cookie: str = ""


@dataclass
class _FirstWord:
    """What the first message of a websocket has said: by which token it is opened; "" before that, or for none."""

    token: str = ""


def is_own(path: str) -> bool:
    """Return True for a path of Talaria's own pages and API, and of its metrics."""
    return path in (OWN, METRICS) or path.startswith(f"{OWN}/")


class Gate:
    """The whole application, behind the checks.

    Args:
        app: what answers: Talaria's routes, and Prefect for all other paths.
        routes: Talaria's own routes, which declare the role that they need.
        credential: what Prefect's server expects, `user:password`; "" for nothing.
        refused: called with who, what and why for each refusal that is to be recorded.
    """

    def __init__(
        self,
        app: Application,
        routes: Sequence[BaseRoute],
        keys: KeyRing,
        door: Door,
        credential: str,
        refused: Callable[[Identity, str, str], None] = lambda who, what, why: None,
    ) -> None:
        self.app, self.routes, self.keys, self.door = app, routes, keys, door
        self.credential, self.refused = credential, refused

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self._http(scope, receive, send)
        elif scope["type"] == "websocket":
            await self._websocket(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    # ---- http

    async def _http(self, scope: Message, receive: Receive, send: Send) -> None:
        inner = self._inner(scope)
        out = dressed(scope, send, tls=self.door.tls and not inner)
        method, path = scope["method"], scope["path"]
        who = NOBODY
        try:
            asker = self._asker(scope)
            who = asker.who
            route = found(self.routes, dict(scope)) if is_own(path) else None
            need = role_of(route) if route else Role.VIEWER if is_own(path) else prefect_rules.role_for(method, path)
            self._admit(scope, asker, Role.VIEWER if need is None else need)
            passed = {**scope, SCOPE_KEY: who, "talaria.secure": asker.secure, "talaria.local": asker.local}
            passed["talaria.cookie"] = asker.cookie
            if self.door.peers and not inner and (address := forwarded_for(scope["headers"])):
                passed["client"] = (address, 0)  # who is behind the proxy, not the proxy, which is that of all
            if who.role < Role.WORKER and not bounds_body(route):
                receive = _bounded(scope["headers"], receive)
            if not is_own(path):
                passed["headers"] = self._with_credential(scope["headers"], who)
                if prefect_rules.inspected(method, path, who.role):
                    body = await self._inspected(scope, receive, who)
                    receive, passed["headers"] = _again(body, receive), _of_length(len(body), passed["headers"])
                if change := change_for(path, who.role, _base(scope, secure=asker.secure)):
                    passed["headers"] = [one for one in passed["headers"] if one[0] != b"accept-encoding"]
                    out = changed(out, change)
        except _Refused as exc:
            if exc.status == 403:
                self.refused(who, f"{method} {path}", exc.why)
            await self._refuse(scope, receive, out, exc)
            return
        token, before = ACTING.set(who), STILL.set(lambda: self._is_still(scope, who))
        try:
            await self.app(passed, receive, out)
        except HTTPException as exc:  # of `_bounded`, where what is behind doesn't answer it
            await self._refuse(scope, receive, out, _Refused(exc.status_code, exc.detail))
        finally:
            ACTING.reset(token)
            STILL.reset(before)

    def _is_still(self, scope: Message, who: Identity) -> bool:
        """Return True if a request that goes on would be let in now as the one that it was."""
        try:
            return self._asker(scope).who == who
        except _Refused:
            return False

    def _asker(self, scope: Message) -> _Asker:
        """Return who sends the request.

        Raises:
            _Refused: nobody may send such a request.
        """
        headers, inner = scope["headers"], self._inner(scope)
        peer = scope["client"][0] if scope.get("client") else ""
        proxied = bool(self.door.peers) and not inner
        secure = (self.door.tls or proxied) and not inner
        if not _is_plain(scope["path"]):
            raise _Refused(400, "the path has dots for folders, double slashes or backslashes")
        try:
            host = header_of(headers, b"host")
            if not host_is_ours(host, scope["server"][0] if scope.get("server") else "", self.door):
                raise _Refused(421, "this Host is not one of ours: TALARIA_HOSTS names those that are")
            schemes = ("http", "https") if proxied else ("https",) if secure else ("http",)
            if why := why_foreign(headers, scope.get("method", "GET"), schemes):
                raise _Refused(403, why)
            if proxied and not self.door.trusts(peer):
                raise _Refused(403, "only the proxy may connect here")
            return self._identified(headers, peer, proxied=proxied, secure=secure)
        except ValueError as exc:
            raise _Refused(400, str(exc)) from exc
        except OSError as exc:
            _logger.exception("the users or tokens can't be read")
            raise _Refused(500, "the users or tokens of this server can't be read") from exc

    def _identified(self, headers: list[tuple[bytes, bytes]], peer: str, *, proxied: bool, secure: bool) -> _Asker:
        local = not proxied and is_loopback(peer)
        if (authorization := header_of(headers, b"authorization")) is not None:
            who = self.keys.of_header(authorization, local=local)
            if who:
                return _Asker(who, False, local, secure)
        if proxied and self.door.user_header:
            name = header_of(headers, self.door.user_header.lower().encode())
            who = self.keys.of_proxy(name.strip(), self.door) if name else None
            if who:
                return _Asker(who, True, local, secure)
        cookies = "; ".join(value.decode("latin-1") for key, value in headers if key == b"cookie")
        if cookies and (session := self.keys.of_cookies(cookies, tls=secure, local=local)):
            return _Asker(session[0], True, local, secure, session[1])
        if not self.door.auth and local:
            return _Asker(Identity("local", Role.ADMIN, "open"), False, local, secure)
        return _Asker(NOBODY, False, local, secure)

    def _admit(self, scope: Message, asker: _Asker, need: Role) -> None:
        method = scope["method"]
        if asker.who.role < need:
            if asker.who is NOBODY:
                sent = header_of(scope["headers"], b"authorization") is not None
                raise _Refused(401, _NOT_VALID if sent else "log in, or send a token")
            raise _Refused(403, f"needs the role {need.label}: {asker.who.name} has {asker.who.role.label}")
        if asker.ambient and method not in _SAFE and not proves_same_origin(scope["headers"]):
            raise _Refused(403, "a change with a session must come from one of our pages (no Origin)")
        if not is_own(scope["path"]) and (why := prefect_rules.why_not(scope.get("query_string", b""), asker.who.role)):
            raise _Refused(403, why)

    async def _inspected(self, scope: Message, receive: Receive, who: Identity) -> bytes:
        """Check the body of a request; return the one to pass on."""
        body, more = bytearray(), True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise _Refused(400, "the request broke off")
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > prefect_rules.BODY_BYTES:
                raise _Refused(413, f"a body of more than {prefect_rules.BODY_BYTES} bytes")
        if why := prefect_rules.why_not_body(scope["path"], bytes(body), who.role):
            raise _Refused(403, why)
        return prefect_rules.signed(scope["path"], bytes(body), who.name)

    def _with_credential(self, headers: list[tuple[bytes, bytes]], who: Identity) -> list[tuple[bytes, bytes]]:
        """Return the headers to pass on: with Prefect's credential in the place of the client's own."""
        private = {b"authorization", b"cookie", self.door.user_header.lower().encode()}
        if who.role < Role.WORKER:
            private |= _AUTOMATION
        kept = [(key, value) for key, value in headers if key not in private]
        if self.credential:
            kept.append((b"authorization", b"Basic " + base64.b64encode(self.credential.encode())))
        return kept

    async def _refuse(self, scope: Message, receive: Receive, send: Send, exc: _Refused) -> None:
        answer: Response = JSONResponse({"error": exc.why, "detail": exc.why}, exc.status)
        if exc.status == 401:
            if wants_page(scope):
                asked = scope["path"] + (f"?{scope['query_string'].decode('latin-1')}" if scope["query_string"] else "")
                answer = RedirectResponse(f"{OWN}/login?next={quote(asked, safe='')}", 303)
            else:
                answer.headers["www-authenticate"] = 'Bearer realm="talaria"'
        elif exc.status == 403 and is_own(scope["path"]) and wants_page(scope) and not is_api(scope["path"]):
            answer = refusal(exc.why, exc.status)
        answer.headers["connection"] = "close"  # else a body that was not read would be taken for the next request
        await answer(scope, receive, send)

    def _inner(self, scope: Message) -> bool:
        server = scope.get("server") or ("", 0)
        return bool(self.door.inner_port) and (server[0], server[1]) == ("127.0.0.1", self.door.inner_port)

    # ---- websockets

    async def _websocket(self, scope: Message, receive: Receive, send: Send) -> None:
        path = scope["path"]
        need = prefect_rules.role_for_websocket(path)
        try:
            asker = self._asker(scope)
            known = self._may_open(scope, asker, need)
        except (_Refused, ValueError) as exc:
            self.refused(NOBODY, f"WEBSOCKET {path}", str(exc))
            await receive()
            await send({"type": "websocket.close", "code": 1008, "reason": ""})
            return
        passed = {**scope, SCOPE_KEY: asker.who, "headers": self._with_credential(scope["headers"], asker.who)}
        word = _FirstWord()

        def still() -> bool:
            if known:
                return self._is_still(scope, asker.who)
            return not word.token or self._may(word.token, asker.local, need)

        opened = self.app(passed, self._first_word(receive, asker, need, word, known=known), send)
        if not await run_while(opened, still):
            with suppress(Exception):  # it has just been closed
                await send({"type": "websocket.close", "code": 1008, "reason": ""})

    def _may_open(self, scope: Message, asker: _Asker, need: Role) -> bool:
        """Return True if the client may open the websocket, False if the first message decides that.

        Raises:
            _Refused: they may not.
        """
        headers = scope["headers"]
        if is_own(scope["path"]):
            raise _Refused(403, "there are no websockets here")
        if asker.ambient and not proves_same_origin(headers):
            raise _Refused(403, "a session's websocket must come from one of our pages (no Origin)")
        if asker.who.role >= need:
            return True
        if header_of(headers, b"origin") is not None:  # a browser that has not logged in may not try credentials
            raise _Refused(403, f"needs the role {need.label}")
        return False

    def _first_word(self, receive: Receive, asker: _Asker, need: Role, first: _FirstWord, *, known: bool) -> Receive:
        """Return a `receive` that puts Prefect's credential into the first message, if its sender has the role.

        By this message, `{"type": "auth", "token": …}`, Prefect's clients identify themselves; without a valid token
        Prefect closes the websocket.
        """
        done = False

        async def received() -> Message:
            nonlocal done
            try:
                # The first message is that it connects. An open websocket without a login is nobody's for long.
                message = await asyncio.wait_for(receive(), None if done else FIRST_WORD_S)
            except TimeoutError:
                return {"type": "websocket.disconnect", "code": 1008}
            if done or message["type"] != "websocket.receive":
                return message
            done = True
            text = message.get("text") or (message.get("bytes") or b"").decode("utf-8", "replace")
            try:
                word = json.loads(text)
                first.token = str(word.get("token") or "")
                may = known or self._may(first.token, asker.local, need)
            except (ValueError, AttributeError, OSError, RecursionError):
                word, may = {}, False
            auth = {"type": "auth", "token": (self.credential or "none") if may else ""}
            kept = {"type": str(word.get("type"))} if not may else word | auth
            return {"type": "websocket.receive", "text": json.dumps(kept)}

        return received

    def _may(self, text: str, local: bool, need: Role) -> bool:
        who = self.keys.of_text(text, local=local) if text else None
        return who is not None and who.role >= need


def is_api(path: str) -> bool:
    """Return True for paths of our own API, which answers no pages."""
    return path.startswith(f"{OWN}/api/")


def _bounded(headers: list[tuple[bytes, bytes]], receive: Receive) -> Receive:
    """Return a `receive` that ends a body which would fill the server's memory.

    Raises:
        _Refused: the body says that it is too long. HTTPException: while it is received, which every route answers.
    """
    why = f"a body of more than {MOST_BYTES} bytes"
    length = next((value for key, value in headers if key == b"content-length"), b"0")
    if length.isdigit() and int(length) > MOST_BYTES:
        raise _Refused(413, why)
    count = 0

    async def received() -> Message:
        nonlocal count
        message = await receive()
        count += len(message.get("body", b""))
        if count > MOST_BYTES:
            raise HTTPException(413, why)
        return message

    return received


def _again(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that delivers a body that has been received already."""
    pieces: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return pieces.pop() if pieces else await receive()

    return again


def _of_length(length: int, headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Return headers that say how long a body is, where they did before."""
    return [(key, str(length).encode() if key == b"content-length" else value) for key, value in headers]


def _is_plain(path: str) -> bool:
    """Return True for a path that every server reads as the same one.

    A server elsewhere, or a proxy before it, may resolve dots, merge slashes, and take backslashes for slashes.
    """
    return path.startswith("/") and not {".", ".."} & {*path.split("/")} and "//" not in path and "\\" not in path


def _base(scope: Message, *, secure: bool) -> str:
    """Return where the client reaches this server; "" if it doesn't say."""
    host = safe_host(scope)
    return f"{'https' if secure else 'http'}://{host}" if host else ""
