"""The pages of the front door itself: login and logout, and its health. Limits how often somebody may try to log in."""

from __future__ import annotations

import html
import logging
import time
from collections.abc import Callable
from functools import partial

import anyio.to_thread
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import BaseRoute, Route

from talaria.front.access import SCOPE_KEY, Identity, Role, needs
from talaria.front.formdata import NoForm, urlencoded
from talaria.front.keys import KeyRing
from talaria.front.plain import plain
from talaria.front.sessions import COOKIE, LIFETIME_S, SAFE_COOKIE

FORM_BYTES = 8192
FIELDS = 10
WINDOW_S = 300  # in which failed logins count
FROM_ONE_ADDRESS = 20
OF_ONE_NAME = 5
REMEMBERED = 10_000  # addresses and names; then the oldest are forgotten
_logger = logging.getLogger("talaria.front")

LOGIN = """{alert}
<input type="hidden" name="next" value="{next}">
<label>User <input name="user" autocomplete="username" autofocus></label>
<label>Password <input name="password" type="password" autocomplete="current-password" required></label>
<p><small>On this machine without users: leave the user empty; the password is the line in api.auth of the state
directory.</small></p>
<button>Log in</button>"""
LOGOUT = """<p>You are logged in as <strong>{user}</strong> ({role}).</p><button>Log out</button>"""


class Attempts:
    """Failed logins of the last minutes, by address and by name."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._failed: dict[str, list[float]] = {}

    def wait_s(self, address: str, name: str) -> int:
        """Return the seconds until the next attempt from an address, or as a user, is allowed; 0 if now."""
        return max(self._wait(f"from {address}", FROM_ONE_ADDRESS), self._wait(f"of {name}", OF_ONE_NAME))

    def begin(self, address: str, name: str) -> None:
        """Count an attempt before its result is known, so that many at once don't evade the limit."""
        for key in (f"from {address}", f"of {name}"):
            self._failed.setdefault(key, []).append(self.clock())
        while len(self._failed) > REMEMBERED:
            del self._failed[next(iter(self._failed))]

    def forget(self, address: str, name: str) -> None:
        """Forget all attempts with a name, and the last one from an address: that login was successful."""
        self._failed.pop(f"of {name}", None)
        if times := self._failed.get(f"from {address}"):
            times.pop()

    def _wait(self, key: str, most: int) -> int:
        now = self.clock()
        times = [one for one in self._failed.get(key, ()) if now - one < WINDOW_S]
        if times:
            self._failed[key] = times
        else:
            self._failed.pop(key, None)
        return 0 if len(times) < most else max(1, int(WINDOW_S - (now - times[-most])) + 1)


class Pages:
    """Login, logout and health."""

    def __init__(self, keys: KeyRing, state: Callable[[], str], heard: Callable[[str, str, str], None]) -> None:
        """`heard` is called with what happened (`login`, `login refused`, `logout`), the user and their address."""
        self.keys, self.state, self.heard = keys, state, heard
        self.attempts = Attempts()

    def routes(self) -> list[BaseRoute]:
        """Return the routes; all but the logout are for everybody."""
        return [
            Route("/talaria/login", self.show, methods=["GET"]),
            Route("/talaria/login", self.log_in, methods=["POST"]),
            Route("/talaria/logout", self.ask, methods=["GET"]),
            Route("/talaria/logout", self.log_out, methods=["POST"]),
            Route("/talaria/health", self.health, methods=["GET"]),
        ]

    @needs(Role.NOBODY)
    async def health(self, request: Request) -> Response:
        """Answer 200 as soon as this process answers; `prefect` is the state of the Prefect server."""
        return JSONResponse({"status": "ok", "prefect": self.state()})

    @needs(Role.NOBODY)
    async def show(self, request: Request) -> Response:
        """Show the form."""
        return _page(_inside(request.query_params.get("next", "")))

    @needs(Role.NOBODY)
    async def log_in(self, request: Request) -> Response:
        """Begin a session, or show the form again."""
        try:
            form = {name: values[0] for name, values in (await urlencoded(request, FORM_BYTES, FIELDS)).items()}
        except NoForm:
            return _page("/", "This is not the login form.", 400)
        name, password, goal = form.get("user", "").strip(), form.get("password", ""), _inside(form.get("next", ""))
        address = request.client.host if request.client else ""
        if wait := self.attempts.wait_s(address, name):
            self.heard("login refused", name, address)
            answer = _page(goal, f"Too many attempts: wait {wait} seconds.", 429)
            answer.headers["retry-after"] = str(wait)
            return answer
        self.attempts.begin(address, name)
        local = bool(request.scope["talaria.local"])
        who = await anyio.to_thread.run_sync(partial(self.keys.of_login, name, password, local=local))
        cookie = self.keys.session_for(who) if who else None
        if who is None or cookie is None:
            self.heard("login refused", name, address)
            return _page(goal, "User or password is wrong.", 401)
        self.attempts.forget(address, name)
        self.heard("login", who.name, address)
        secure = bool(request.scope["talaria.secure"])
        done = RedirectResponse(goal, 303)
        done.set_cookie(
            SAFE_COOKIE if secure else COOKIE,
            cookie,
            max_age=LIFETIME_S,
            path="/",
            secure=secure,
            httponly=True,
            samesite="strict",
        )
        return done

    @needs(Role.VIEWER)
    async def ask(self, request: Request) -> Response:
        """Show who is logged in, with a button that ends the session: a link of another page ends none."""
        who: Identity = request.scope[SCOPE_KEY]
        inner = LOGOUT.format(user=html.escape(who.name), role=who.role.label)
        return _framed("log out", "/talaria/logout", inner)

    @needs(Role.NOBODY)
    async def log_out(self, request: Request) -> Response:
        """End the session: no copy of its cookie is valid any more."""
        who: Identity = request.scope[SCOPE_KEY]
        if cookie := request.scope["talaria.cookie"]:
            await anyio.to_thread.run_sync(self.keys.sessions.end, cookie)
            self.heard("logout", who.name, request.client.host if request.client else "")
        done = RedirectResponse("/talaria/login", 303)
        for name, secure in ((COOKIE, False), (SAFE_COOKIE, True)):
            done.delete_cookie(name, path="/", secure=secure, httponly=True, samesite="strict")
        return done


def _page(goal: str, alert: str = "", status: int = 200) -> HTMLResponse:
    shown = f'<p role="alert">{html.escape(alert)}</p>' if alert else ""
    inner = LOGIN.format(alert=shown, next=html.escape(goal))
    return _framed("log in", "/talaria/login", inner, status)


def _framed(title: str, action: str, inner: str, status: int = 200) -> HTMLResponse:
    return plain(title, f'<form class="box" method="post" action="{action}"><h1>Talaria</h1>{inner}</form>', status)


def _inside(goal: str) -> str:
    """Return the path to open after the login: always one of this server."""
    plain = goal.startswith("/") and not goal.startswith(("//", "/\\")) and goal.isprintable() and "\\" not in goal
    return goal if plain and goal.isascii() else "/"
