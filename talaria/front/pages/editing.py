"""Pages that add, change and duplicate a target, and test it before it is saved."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from talaria.front.access import Role, needs
from talaria.front.pages.checks import Checks
from talaria.front.pages.site import Site, fields, shown, who
from talaria.front.pages.targets import LIST, begun, kind_of, ref_of, to
from talaria.front.pages.texts import text
from transfer.errors import NotFound

if TYPE_CHECKING:
    from blocks import Target
    from talaria.service.editing import Draft

ADD = "/talaria/add-target"


class EditingPages:
    """Add, Edit and Duplicate: one page with the form that a type's fields make, without steps between."""

    def __init__(self, site: Site, checks: Checks) -> None:
        self.site, self.checks = site, checks

    def routes(self) -> list[BaseRoute]:
        """Return the routes."""
        return [
            Route(ADD, self.types, methods=["GET"]),
            Route(f"{ADD}/{{type}}", self.empty, methods=["GET"]),
            Route(f"{ADD}/{{type}}", self.add, methods=["POST"]),
            Route(f"{LIST}/{{name}}/edit", self.filled, methods=["GET"]),
            Route(f"{LIST}/{{name}}/edit", self.change, methods=["POST"]),
            Route(f"{LIST}/{{name}}/duplicate", self.copied, methods=["GET"]),
        ]

    @needs(Role.ADMIN)
    @shown
    async def types(self, request: Request) -> Response:
        """Show what kinds of target there are."""
        from talaria.front.pages.forms import kinds

        return self.site.page(request, "types.html", kinds=kinds())

    @needs(Role.ADMIN)
    @shown
    async def empty(self, request: Request) -> Response:
        """Show the form of a new target."""
        return self._form(request, _type(request.path_params["type"]), name="", values={})

    @needs(Role.ADMIN)
    @shown
    async def filled(self, request: Request) -> Response:
        """Show the form of a saved target, one that is broken too."""
        return await self._saved(request, copy=False)

    @needs(Role.ADMIN)
    @shown
    async def copied(self, request: Request) -> Response:
        """Show the form of a new target with the settings of a saved one."""
        return await self._saved(request, copy=True)

    async def _saved(self, request: Request, *, copy: bool) -> Response:
        from talaria.service import editing

        office, ref = await self.site.office(request), ref_of(request)
        stored = await editing.stored(office, ref)
        return self._form(
            request,
            _type(stored.type_name),
            name="" if copy else stored.name,
            values=stored.values,
            stored=stored.secrets,
            base=ref,
            version="" if copy else stored.version,
        )

    @needs(Role.ADMIN)
    @shown
    async def add(self, request: Request) -> Response:
        """Save a new target, or test it."""
        return await self._sent(request, _type(request.path_params["type"]), "")

    @needs(Role.ADMIN)
    @shown
    async def change(self, request: Request) -> Response:
        """Save a changed target, or test it."""
        from talaria.service import editing

        stored = await editing.stored(await self.site.office(request), ref_of(request))
        return await self._sent(request, _type(stored.type_name), stored.name)

    async def _sent(self, request: Request, cls: type[Target], name: str) -> Response:
        from talaria.front.pages import forms
        from talaria.service import editing, targets

        sent = await fields(request)
        draft = _draft(cls, sent, name, request)
        office = await self.site.office(request)
        if empty := forms.unwritten(cls, sent):
            return self._again(request, cls, sent, draft, name, empty)
        try:
            if sent.get("do") == "test":
                target = await editing.drafted(office, draft, named=False)
                events = targets.test_unsaved(target)
                back = request.url.path + (f"?{request.url.query}" if request.url.query else "")
                shown_as = draft.name or cls.type_name
                return begun(request, self.checks.start(shown_as, who(request).name, back, target.contact, events))
            await editing.save_draft(office, draft)
        except editing.NotValid as exc:
            return self._again(request, cls, sent, draft, name, forms.by_field(cls, exc.errors))
        except editing.Outdated as exc:
            return self._conflict(request, cls, sent, draft, exc)
        return to(draft.name, kind_of(request), said="changed" if name else "added")

    def _again(
        self,
        request: Request,
        cls: type[Target],
        sent: dict[str, str],
        draft: Draft,
        name: str,
        problems: dict[str, list[str]],
    ) -> Response:
        """Show a form again with what was typed, and what is wrong with it."""
        from talaria.front.pages import forms

        return self._form(
            request,
            cls,
            name=draft.name,
            values=forms.typed(cls, sent),
            stored=_stored(sent),
            base=draft.base,
            version=draft.version,
            fixed=name,
            problems=problems,
            status=422,
        )

    def _conflict(self, request: Request, cls: type[Target], sent: dict[str, str], draft: Draft, exc: Any) -> Response:
        """Show a form again beside what somebody else has saved meanwhile."""
        from talaria.front.pages import forms

        return self._form(
            request,
            cls,
            name=draft.name,
            values=forms.typed(cls, sent),
            stored=_stored(sent),
            base=draft.base,
            version=exc.version,
            fixed=draft.name,
            conflict=forms.differences(cls, draft.values, exc.theirs),
            status=409,
        )

    def _form(
        self,
        request: Request,
        cls: type[Target],
        *,
        name: str,
        values: dict[str, Any],
        stored: Any = (),
        base: str = "",
        version: str = "",
        fixed: str | None = None,
        problems: dict[str, list[str]] | None = None,
        conflict: Any = None,
        status: int = 200,
    ) -> Response:
        from talaria.front.pages import forms

        problems = problems or {}
        edits = fixed if fixed is not None else (name if version else "")
        return self.site.page(
            request,
            "target_form.html",
            status=status,
            type=cls.type_name,
            about=forms.first_line(cls),
            title=text("form.edit", name=edits) if edits else text("form.add_type", type=forms.kind(cls)),
            name=name,
            fixed=bool(edits),
            tabs=forms.tabs(forms.form(cls, values, stored, problems)),
            problems=forms.summary(cls, problems),
            name_problems=problems.get("name", []),
            stored=sorted(stored),
            base=base,
            version=version,
            conflict=conflict,
            back=to(edits, kind_of(request)).headers["location"] if edits else ADD,
        )


def _draft(cls: type[Target], sent: dict[str, str], name: str, request: Request) -> Draft:
    from talaria.front.pages import forms
    from talaria.service.editing import Draft

    values, secrets = forms.read(cls, sent)
    base = ref_of(request) if name else sent.get("base", "")
    new = name or sent.get("name", "").strip()
    return Draft(new, cls.type_name, values, secrets, base, sent.get("version", ""), new=not name)


def _stored(sent: dict[str, str]) -> list[str]:
    return [one for one in sent.get("stored", "").split(",") if one]


def _type(name: str) -> type[Target]:
    from blocks import TYPES

    if name not in TYPES:
        raise NotFound(f"no type named {name}: there are {', '.join(TYPES)}")
    return TYPES[name]
