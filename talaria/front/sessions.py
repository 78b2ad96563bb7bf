"""Sessions of browsers: a signed cookie, valid until it expires, its user logs out, or its user is changed."""

from __future__ import annotations

import base64
import secrets
import time

from itsdangerous import BadData, URLSafeTimedSerializer

from talaria.front.kept import KeptFile
from talaria.settings import secret
from transfer.home import Home

LIFETIME_S = 12 * 3600  # a working day
COOKIE = "talaria_session"
SAFE_COOKIE = "__Host-talaria_session"  # browsers take this name only with Secure, for this host and all its paths


class Sessions:
    """Makes and reads the cookies; `sessions.json` keeps the sessions that have been logged out."""

    def __init__(self, home: Home) -> None:
        key = secret(home, "session.key", base64.urlsafe_b64encode(secrets.token_bytes(32)).decode("ascii"))
        self._signer = URLSafeTimedSerializer(key, salt="talaria.session")
        self._ended = KeptFile(home, "sessions.json")

    def begin(self, name: str, stamp: str, how: str) -> str:
        """Return the cookie of a new session, which ends when the `stamp` of its user changes."""
        return str(self._signer.dumps([name, stamp, how, secrets.token_urlsafe(16)]))

    def read(self, cookie: str) -> tuple[str, str, str] | None:
        """Return name, stamp and kind of a session, None if it is not one of ours or has ended."""
        found = self._load(cookie)
        if found is None or found[3] in self._ended.read():
            return None
        return found[0], found[1], found[2]

    def end(self, cookie: str) -> None:
        """End a session: no copy of its cookie is valid any more."""
        found = self._load(cookie)
        if found is None:
            return
        now = time.time()
        with self._ended.changing() as ended:
            for key in [key for key, one in ended.items() if one["until"] < now]:
                del ended[key]
            ended[found[3]] = {"until": now + LIFETIME_S}

    def _load(self, cookie: str) -> tuple[str, str, str, str] | None:
        try:
            name, stamp, how, number = self._signer.loads(cookie, max_age=LIFETIME_S)
        except (BadData, ValueError, TypeError):
            return None
        return str(name), str(stamp), str(how), str(number)
