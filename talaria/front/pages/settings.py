"""Settings: one's own password; and for admins users, tokens and the audit trail."""

from __future__ import annotations

import asyncio
import json
import re
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlencode

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import BaseRoute, Route

from talaria.front.access import Role, needs
from talaria.front.login import Attempts
from talaria.front.pages.site import Site, fields, said_of, shown, who
from talaria.front.pages.texts import text
from talaria.front.tokens import Tokens, seconds_of
from talaria.front.users import Users
from transfer.audit import AuditResult, Event, Trail, latest, record, verify
from transfer.errors import Misconfigured

PATH = "/talaria/settings"
ROLES = (Role.VIEWER, Role.OPERATOR, Role.ADMIN)
SHOWN = 200  # entries of the audit trail
LOOKED_B = 4 << 20  # of the trail, that one page looks through for those that a filter leaves
AGES = ("30d", "90d", "365d", "never")
SAID = ("added", "removed", "role", "password", "revoked")
_PLAIN = re.compile(r"[A-Za-z0-9@._ -]+")  # what JSON writes as it is


class SettingsPages:
    """Who may log in, and who did what."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.users, self.tokens, self.attempts = Users(site.reach.home), Tokens(site.reach.home), Attempts()

    def routes(self) -> list[BaseRoute]:
        """Return the routes."""
        return [
            Route(PATH, self.own, methods=["GET"]),
            Route(f"{PATH}/password", self.password, methods=["POST"]),
            Route(f"{PATH}/users", self.every_user, methods=["GET"]),
            Route(f"{PATH}/users", self.change_user, methods=["POST"]),
            Route(f"{PATH}/tokens", self.every_token, methods=["GET"]),
            Route(f"{PATH}/tokens", self.change_token, methods=["POST"]),
            Route(f"{PATH}/audit", self.audit, methods=["GET"]),
            Route(f"{PATH}/audit", self.verify, methods=["POST"]),
        ]

    @needs(Role.VIEWER)
    @shown
    async def own(self, request: Request) -> Response:
        """Show who one is and what one may do."""
        return self._own(request)

    def _own(self, request: Request, problem: str = "", status: int = 200) -> Response:
        return self.site.page(
            request,
            "settings.html",
            status=status,
            may=[(role.label, text(f"role.{role.label}")) for role in ROLES],
            has_password=any(one.name == who(request).name and one.password for one in self.users.all()),
            problem=problem,
        )

    @needs(Role.VIEWER)
    @shown
    async def password(self, request: Request) -> Response:
        """Change one's own password; all of one's sessions end, so one logs in again."""
        sent, me = await fields(request), who(request)
        address = request.client.host if request.client else ""
        if me.how != "session":
            return self._own(request, text("settings.no_session"), 422)
        if wait := self.attempts.wait_s(address, me.name):
            return self._own(request, text("settings.wait", seconds=wait), 429)
        self.attempts.begin(address, me.name)
        new = sent.get("new", "")
        if not await asyncio.to_thread(self.users.verify, me.name, sent.get("now", "")):
            await self._record(request, "password", me.name, refused=True)
            return self._own(request, text("settings.wrong_password"), 422)
        self.attempts.forget(address, me.name)
        if new != sent.get("again", ""):
            return self._own(request, text("settings.not_same"), 422)
        try:
            await asyncio.to_thread(lambda: self.users.change(me.name, password=new))
        except ValueError as exc:
            return self._own(request, str(exc), 422)
        await self._record(request, "password", me.name)
        return RedirectResponse(f"/talaria/login?{urlencode({'next': PATH})}", 303)

    # ---- users

    @needs(Role.ADMIN)
    @shown
    async def every_user(self, request: Request) -> Response:
        """Show the users."""
        return self._users(request)

    def _users(self, request: Request, problem: str = "", status: int = 200, **sent: str) -> Response:
        return self.site.page(
            request,
            "users.html",
            status=status,
            users=self.users.all(),
            roles=[role.label for role in ROLES],
            sent={"name": sent.get("name", ""), "role": sent.get("role", "viewer")},
            said=said_of(request, "settings.said", SAID),
            problem=problem,
        )

    @needs(Role.ADMIN)
    @shown
    async def change_user(self, request: Request) -> Response:
        """Add a user, give one another role or password, or remove one; nobody does that to himself."""
        sent = await fields(request)
        name, action = sent.get("name", "").strip(), sent.get("do", "")
        given = sent.get("password", "")
        try:
            if action in ("role", "password", "remove") and name == who(request).name:
                return self._users(
                    request, text("settings.yours" if action == "password" else "settings.yourself"), 422
                )
            if action == "add":
                role, secret = Role.of(sent.get("role", "")), None if sent.get("proxy") else given
                await asyncio.to_thread(self.users.add, name, role, secret)
                await self._record(request, "added", name, role=role.label)
            elif action == "role":
                role = Role.of(sent.get("role", ""))
                self.users.change(name, role=role)
                await self._record(request, "role", name, role=role.label)
            elif action == "password":
                await asyncio.to_thread(lambda: self.users.change(name, password=given))
                await self._record(request, "password", name)
            elif action == "remove":
                self.users.remove(name)
                await self._record(request, "removed", name)
            else:
                return self._users(request, text("error"), 422)
        except ValueError as exc:
            sent.pop("password", None)
            return self._users(request, str(exc), 422, **sent)
        said = {"add": "added", "remove": "removed"}.get(action, action)
        return RedirectResponse(f"{PATH}/users?{urlencode({'said': said})}", 303)

    # ---- tokens

    @needs(Role.ADMIN)
    @shown
    async def every_token(self, request: Request) -> Response:
        """Show the tokens, without their secrets."""
        return self._tokens(request)

    def _tokens(self, request: Request, problem: str = "", status: int = 200, secret: str = "") -> Response:
        now = datetime.now(UTC).timestamp()
        return self.site.page(
            request,
            "tokens.html",
            status=status,
            tokens=[
                {"id": one.id, "name": one.name, "role": one.role.label, "created": _time(one.created)}
                | {"expires": _time(one.expires), "over": one.expires is not None and one.expires <= now}
                for one in self.tokens.all()
            ],
            roles=[role.label for role in ROLES],
            ages=[(one, text(f"age.{one}")) for one in AGES],
            secret=secret,
            said=said_of(request, "settings.said", SAID),
            problem=problem,
        )

    @needs(Role.ADMIN)
    @shown
    async def change_token(self, request: Request) -> Response:
        """Make a token, which this page shows once, or revoke one."""
        sent = await fields(request)
        try:
            if sent.get("do") == "revoke":
                one = self.tokens.revoke(sent.get("id", ""))
                await self._record(request, "token revoked", one.name, token=one.id)
                return RedirectResponse(f"{PATH}/tokens?{urlencode({'said': 'revoked'})}", 303)
            role, seconds = Role.of(sent.get("role", "")), seconds_of(sent.get("expires", ""))
            one, secret = self.tokens.create(role, seconds, sent.get("name", "").strip())
        except ValueError as exc:
            return self._tokens(request, str(exc), 422)
        await self._record(request, "token created", one.name, role=role.label, token=one.id)
        return self._tokens(request, secret=secret)

    # ---- audit

    @needs(Role.ADMIN)
    @shown
    async def audit(self, request: Request) -> Response:
        """Show who did what, the newest first."""
        return await self._audit(request)

    @needs(Role.ADMIN)
    @shown
    async def verify(self, request: Request) -> Response:
        """Check that no entry of the trail was altered or removed."""
        number, head, faults = await asyncio.to_thread(verify, Trail(self.site.reach.home))
        shown_faults = [f"{text('audit.line', line=one.line)}: {one.what}" if one.line else one.what for one in faults]
        return await self._audit(request, checked=(number, head, shown_faults))

    async def _audit(self, request: Request, checked: tuple[int, str, list[str]] | None = None) -> Response:
        given = {name: request.query_params.get(name, "").strip() for name in ("who", "event")}
        if given["event"] and given["event"] not in set(Event):
            raise Misconfigured(text("audit.nothing"))
        before = request.query_params.get("before", "")
        end = int(before) if before.isdecimal() and before.isascii() else None
        found, older = await asyncio.to_thread(_newest, Trail(self.site.reach.home), given, end)
        return self.site.page(
            request,
            "audit.html",
            entries=found,
            older=older,
            query=urlencode({key: value for key, value in given.items() if value}),
            earlier=end is not None,
            given=given,
            events=sorted(Event),
            checked=checked,
        )

    async def _record(self, request: Request, what: str, name: str, *, refused: bool = False, **details: Any) -> None:
        address = request.client.host if request.client else ""
        by = who(request).name
        event, result = (Event.USER_CHANGED, AuditResult.SUCCESS)
        if refused:
            event, result = (Event.REFUSED, AuditResult.SERIOUS)
        await asyncio.to_thread(lambda: record(event, by, result, address=address, change=what, name=name, **details))


def _newest(trail: Trail, given: dict[str, str], end: int | None) -> tuple[list[dict[str, str]], int]:
    """Return the newest entries that a filter leaves, the newest first, as the page shows them; and where to go on."""
    found, older = latest(
        trail,
        lambda one: all(not value or one.get(key) == value for key, value in given.items()),
        SHOWN,
        LOOKED_B,
        end,
        [value for value in given.values() if _PLAIN.fullmatch(value)],
    )
    return [_shown(one) for one in found], older


def _shown(entry: dict[str, Any]) -> dict[str, str]:
    """Return an entry as text; where the trail was altered, anything may be in it, or missing."""
    row = {name: str(entry.get(name, "")) for name in ("time", "event", "who", "result", "source")}
    try:
        datetime.fromisoformat(row["time"])
    except ValueError:
        row["time"] = ""
    words = json.dumps(entry.get("details", {}), ensure_ascii=False, separators=(", ", ": "))
    return row | {"more": words[1:-1].replace('"', "")}


def _time(seconds: float | None) -> str:
    return "" if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
