"""What pages of sources and of notifications have in common: their lists, the page of each, and its buttons."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, ClassVar
from urllib.parse import urlencode

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import BaseRoute, Route

from talaria.front.access import Role, needs
from talaria.front.pages.editing import Subject, with_paths
from talaria.front.pages.site import Site, fields, kind_of, ref_of, said_of, shown
from talaria.front.pages.texts import text
from talaria.service import Office
from transfer.errors import DispatchError, NotFound

if TYPE_CHECKING:
    from blocks.named import NamedBlock

Row = dict[str, Any]


class NamedPages(ABC):
    """Pages of one kind of things that are saved under names. Add and Edit are in `editing.py`.

    Attributes:
        subject: what they are.
        texts: the beginning of the names of their texts; `TEXTS.html` shows the list.
        template: of the page of one.
        said: what may have been done just now, as its text is named.
    """

    subject: ClassVar[Subject]
    texts: ClassVar[str]
    template: ClassVar[str]
    said: ClassVar[tuple[str, ...]] = ("added", "changed", "paused", "resumed", "removed")

    def __init__(self, site: Site) -> None:
        self.site = site

    def routes(self) -> list[BaseRoute]:
        """Return the routes."""
        one = f"{self.subject.pages}/{{name}}"
        return [
            Route(self.subject.pages, self.every, methods=["GET"]),
            Route(one, self.one, methods=["GET"]),
            Route(f"{one}/test", self.test, methods=["POST"]),
            Route(f"{one}/enable", self.enable, methods=["POST"]),
            Route(f"{one}/remove", self.remove, methods=["POST"]),
            *self.more(one),
        ]

    def more(self, one: str) -> list[BaseRoute]:
        """Return the routes that only this kind has, below the address of one."""
        return []

    @abstractmethod
    async def rows(self, office: Office) -> list[Row]:
        """Return all of them as lists show them, each with its `state`."""

    @abstractmethod
    async def loaded(self, office: Office, ref: str) -> NamedBlock:
        """Return one that is not broken, its secrets masked."""

    @abstractmethod
    async def about(self, office: Office, ref: str, row: Row) -> dict[str, Any]:
        """Return what else the page of one shows."""

    @abstractmethod
    async def tested(self, office: Office, ref: str, sent: dict[str, str]) -> dict[str, Any]:
        """Test one; return what was found.

        Args:
            sent: the fields of the button's form.
        """

    @abstractmethod
    async def enabled(self, office: Office, ref: str, on: bool) -> dict[str, Any]:
        """Pause one, or let it go on."""

    @abstractmethod
    async def removed(self, office: Office, ref: str) -> dict[str, Any]:
        """Remove one."""

    @needs(Role.VIEWER)
    @shown
    async def every(self, request: Request) -> Response:
        """Show all of them."""
        rows = with_paths(self.subject, await self.rows(await self.site.office(request)))
        said = said_of(request, f"{self.texts}.said", self.said)
        return self.site.page(request, f"{self.texts}.html", rows=rows, said=said)

    @needs(Role.VIEWER)
    @shown
    async def one(self, request: Request) -> Response:
        """Show one of them."""
        return await self._shown(request)

    async def _shown(
        self, request: Request, problem: str = "", status: int = 200, tested: dict[str, Any] | None = None
    ) -> Response:
        from talaria.front.pages.shown_settings import settings, title_of

        office, ref = await self.site.office(request), ref_of(request)
        kind, _, name = ref.rpartition("/")
        alike = [one for one in await self.rows(office) if one["name"] == name and kind in ("", one["type"])]
        if not alike:
            raise NotFound(text(f"{self.texts}.no_such", name=ref))
        row = alike[0]
        block = None if row["broken"] else await self.loaded(office, ref)
        return self.site.page(
            request,
            self.template,
            status=status,
            row=row,
            block=block,
            path=self.subject.one(name),
            query=f"?{urlencode({'type': kind})}" if kind else "",
            type_title=title_of(type(block)) if block else row["type"],
            groups=settings(block) if block else [],
            texts=self.texts,
            tested=tested,
            said=said_of(request, f"{self.texts}.said", self.said),
            problem=problem,
            **await self.about(office, ref, row),
        )

    @needs(Role.OPERATOR)
    @shown
    async def test(self, request: Request) -> Response:
        """Test one, and show what was found."""
        office, sent = await self.site.office(request), await fields(request)
        try:
            tested = await self.tested(office, ref_of(request), sent)
        except (DispatchError, ValueError) as exc:
            return await self._shown(request, str(exc), 422)
        return await self._shown(request, tested=tested)

    @needs(Role.ADMIN)
    @shown
    async def enable(self, request: Request) -> Response:
        """Pause one, or let it go on."""
        on = (await fields(request)).get("enabled") == "true"
        return await self.done(request, self.enabled, "resumed" if on else "paused", on)

    @needs(Role.ADMIN)
    @shown
    async def remove(self, request: Request) -> Response:
        """Remove one; where that can't be, its page says why."""
        return await self.done(request, self.removed, "removed")

    async def done(
        self, request: Request, call: Callable[..., Awaitable[dict[str, Any]]], word: str, *arguments: Any
    ) -> Response:
        """Do something with one of them.

        Args:
            call: does it; gets the office, what names it, and the arguments.
            word: of `said`, for the page that follows.

        Returns:
            The way to its page, or to the list where it is there no more; its page with the reason, where its state
            does not allow that.
        """
        try:
            await call(await self.site.office(request), ref_of(request), *arguments)
        except DispatchError as exc:
            return await self._shown(request, exc.message, 409)
        if word == "removed":
            return RedirectResponse(f"{self.subject.pages}?{urlencode({'said': word})}", 303)
        return RedirectResponse(self.subject.one(request.path_params["name"], kind_of(request), said=word), 303)
