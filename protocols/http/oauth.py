"""Authorization of HTTP requests: fixed (basic, bearer), or a token by OAuth2 client credentials.

Source: RFC 6749 sections 2.3.1 (client authentication), 4.4 (client credentials) and 5 (answers), RFC 6750.
"""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, field
from urllib.parse import quote_plus, urlencode, urlsplit

from protocols.http.answer import Answer
from protocols.http.exchange import Content
from protocols.http.origin import WebOrigin
from protocols.http.session import Session
from protocols.net import words
from protocols.net.connection import SLICE_S
from protocols.net.hiding import secret_forms
from transfer.errors import Busy, Cancelled, DispatchError, Misconfigured, NotFound, Unauthorized

EARLY_S = 60.0  # a token is renewed so long before its end, or after four fifths of a short life
UNTOLD_S = 300.0  # lifetime of a token whose server names none
OTHER_TYPES = ("basic", "dpop", "mac", "n_a", "pop")  # registered for token_type, and not for us
MAX_TOKEN_BYTES = 1 << 20


@dataclass(frozen=True)
class Fixed:
    """The same Authorization field for every request."""

    value: str = field(repr=False)

    @classmethod
    def basic(cls, user: str, password: str) -> Fixed:
        """Return the field for user and password (RFC 7617), in UTF-8."""
        return cls("Basic " + base64.b64encode(f"{user}:{password}".encode()).decode())

    @classmethod
    def bearer(cls, token: str) -> Fixed:
        return cls(f"Bearer {token}")

    def header(self, check: Callable[[], None]) -> str:
        return self.value

    def renew(self, refused: str, check: Callable[[], None]) -> bool:
        return False

    @property
    def secrets(self) -> frozenset[str]:
        """What no message may show."""
        return frozenset((self.value, self.value.partition(" ")[2]))


@dataclass
class _Token:
    value: str
    until: float  # time.monotonic()


class ClientCredentials:
    """A bearer token of an OAuth2 server, fetched when it is first needed and shared by all that use this object.

    Args:
        url: the server's token endpoint.
        origin: that server, and how to talk to it.
    """

    def __init__(self, url: str, client_id: str, client_secret: str, scope: str, origin: WebOrigin) -> None:
        self.url, self.client_id, self.client_secret, self.scope, self.origin = (
            url, client_id, client_secret, scope, origin,
        )  # fmt: skip
        self._lock = threading.Lock()
        self._token: _Token | None = None
        self._failed: tuple[float, DispatchError] | None = (
            None  # when no token could be had (time.monotonic()), and why
        )
        self._in_body = False  # the server wants the client's secret in the form instead of the header

    def header(self, check: Callable[[], None]) -> str:
        """Return the Authorization field, with a token that has not expired.

        Raises:
            Unauthorized: the server refuses the client. Unreachable, TimedOut, Busy, Misconfigured: no token.
        """
        asked = time.monotonic()
        self._acquire(check)
        try:
            if self._token is None or time.monotonic() >= self._token.until:
                self._token = self._fetched(asked, check)
            return f"Bearer {self._token.value}"
        finally:
            self._lock.release()

    def renew(self, refused: str, check: Callable[[], None]) -> bool:
        """Fetch another token, unless another thread has done so already; False if it is the refused one again."""
        asked = time.monotonic()
        self._acquire(check)
        try:
            if self._token is None or f"Bearer {self._token.value}" == refused:
                self._token = self._fetched(asked, check)
            return f"Bearer {self._token.value}" != refused
        finally:
            self._lock.release()

    @property
    def secrets(self) -> frozenset[str]:
        """What no message may show at the moment."""
        token = self._token
        return frozenset((self.client_secret, self._basic, *([token.value] if token else ())))

    @property
    def _basic(self) -> str:
        """Id and secret in the form of a header field (RFC 6749 section 2.3.1)."""
        return base64.b64encode(f"{quote_plus(self.client_id)}:{quote_plus(self.client_secret)}".encode()).decode()

    def _acquire(self, check: Callable[[], None]) -> None:
        while not self._lock.acquire(timeout=SLICE_S):
            check()

    def _fetched(self, asked: float, check: Callable[[], None]) -> _Token:
        """Fetch a token, unless another thread has just failed to: servers lock clients that fail too often."""
        if self._failed and self._failed[0] > asked:
            raise copy(self._failed[1])
        try:
            return self._fetch(check)
        except DispatchError as exc:
            if not isinstance(exc, Cancelled):
                self._failed = time.monotonic(), copy(exc)  # without its traceback, which holds a whole push
            raise

    def _fetch(self, check: Callable[[], None]) -> _Token:
        with Session(self.origin, check=check) as session:
            status, answer, body = self._ask(session)
            if status in (400, 401) and not self._in_body and _error(body) in ("invalid_client", "invalid_request", ""):
                # Servers must know the header form (RFC 6749 2.3.1); some know only the other one.
                self._in_body = True
                status, answer, body = self._ask(session)
                self._in_body = status == 200
        if status != 200:
            raise self._refused(status, answer, body)
        try:
            document = json.loads(body)
            value = document["access_token"]
            kind = str(document.get("token_type", "Bearer"))
            lifetime = float(document.get("expires_in") or UNTOLD_S)
        except (ValueError, TypeError, KeyError, AttributeError) as exc:
            raise Misconfigured(f"{self._where}: the answer holds no access_token: check token_url") from exc
        if not isinstance(value, str) or not value or not value.isascii() or not value.isprintable():
            raise Misconfigured(f"{self._where}: the access_token is not valid in a request")
        if kind.lower() != "bearer":
            named = f" ({kind.lower()})" if kind.lower() in OTHER_TYPES else ""  # else it may be anything
            raise Misconfigured(f"{self._where}: gives a token of another type than Bearer{named}")
        return _Token(value, time.monotonic() + lifetime - min(EARLY_S, lifetime / 5))

    def _ask(self, session: Session) -> tuple[int, Answer, bytes]:
        form = {"grant_type": "client_credentials"} | ({"scope": self.scope} if self.scope else {})
        headers = {"Content-Type": "application/x-www-form-urlencoded", "Accept": "application/json"}
        if self._in_body:
            form |= {"client_id": self.client_id, "client_secret": self.client_secret}
        else:
            headers["Authorization"] = f"Basic {self._basic}"
        parts = urlsplit(self.url)
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        with session.request("POST", path, headers, Content(urlencode(form).encode())) as answer:
            return answer.status, answer, answer.read(MAX_TOKEN_BYTES)

    def _refused(self, status: int, answer: Answer, body: bytes) -> DispatchError:
        hidden = secret_forms(
            self.secrets | (self.origin.proxy.secrets if self.origin.proxy else frozenset()), (self.client_id,)
        )
        said = words.excerpt(body, answer.media_type, hidden)
        text = f"{self._where}: no token: {status} {words.clean(answer.reason, hidden)}" + (
            f": {said!r}" if said else ""
        )
        if status in (408, 425, 429) or status >= 500:
            return Busy(text, retry_after=answer.retry_after)
        if status in (404, 405, 410):
            return NotFound(f"{text}; check token_url")
        if status in (400, 401, 403):
            return Unauthorized(f"{text}; check client_id, client_secret and scope")
        return Misconfigured(text)

    @property
    def _where(self) -> str:
        return self.origin.where + urlsplit(self.url).path


def _error(body: bytes) -> str:
    try:
        return str(json.loads(body).get("error", ""))
    except (ValueError, AttributeError):
        return ""
