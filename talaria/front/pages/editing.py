"""Pages that add, change and duplicate a target, source or rule, and test it before it is saved."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlencode

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import BaseRoute, Route

from talaria.front.access import Role, needs
from talaria.front.api.errors import answer_to
from talaria.front.pages.checks import Checks, begun
from talaria.front.pages.site import Site, fields, is_part, kind_of, ref_of, render, shown, who
from talaria.front.pages.texts import text
from transfer.errors import DispatchError, NotFound

if TYPE_CHECKING:
    from blocks.named import NamedBlock
    from talaria.service import Office
    from talaria.service.editing import Draft, Editable

FIELDS = 1000  # of a form with rows
SPARE = 1  # empty rows of a field that has rows; "more" brings as many again


@dataclass(frozen=True)
class Subject:
    """What is edited: targets, sources or rules.

    Attributes:
        word: what its texts, and `service.editing.KINDS`, call it.
        pages: address of the list; that of one is below it.
        add: address of the page that adds one.
    """

    word: str
    pages: str
    add: str

    @property
    def kind(self) -> Editable:
        from talaria.service import editing

        return editing.KINDS[self.word]

    def type_of(self, name: str) -> type[NamedBlock]:
        """Return a type by its name.

        Raises:
            NotFound: there is none.
        """
        types = self.kind.saved.types
        if name not in types:
            raise NotFound(f"no type named {name}: there are {', '.join(types)}")
        found: type[NamedBlock] = types[name]
        return found

    def one(self, name: str, kind: str = "", **words: str) -> str:
        """Return the address of one; `kind` is its type, where several have the name."""
        query = urlencode(words | ({"type": kind} if kind else {}))
        return f"{self.pages}/{quote(name, safe='')}" + (f"?{query}" if query else "")


TARGET = Subject("target", "/talaria/targets", "/talaria/add-target")
SOURCE = Subject("source", "/talaria/sources", "/talaria/add-source")
RULE = Subject("rule", "/talaria/notifications", "/talaria/add-rule")


class EditingPages:
    """Add, Edit and Duplicate: one page with the form that a type's fields make, without steps between."""

    def __init__(self, site: Site, checks: Checks, subject: Subject) -> None:
        self.site, self.checks, self.subject = site, checks, subject

    def routes(self) -> list[BaseRoute]:
        """Return the routes."""
        add, one = self.subject.add, f"{self.subject.pages}/{{name}}"
        return [
            Route(add, self.types, methods=["GET"]),
            Route(f"{add}/{{type}}", self.empty, methods=["GET"]),
            Route(f"{add}/{{type}}", self.add, methods=["POST"]),
            Route(f"{one}/edit", self.filled, methods=["GET"]),
            Route(f"{one}/edit", self.change, methods=["POST"]),
            Route(f"{one}/duplicate", self.copied, methods=["GET"]),
        ]

    @needs(Role.ADMIN)
    @shown
    async def types(self, request: Request) -> Response:
        """Show what kinds there are."""
        from talaria.front.pages.shown_settings import tiles

        subject = self.subject
        return self.site.page(request, "types.html", kinds=tiles(subject.kind.saved.types), subject=subject)

    @needs(Role.ADMIN)
    @shown
    async def empty(self, request: Request) -> Response:
        """Show the form of a new one."""
        return await self._form(request, self.subject.type_of(request.path_params["type"]), name="", values={})

    @needs(Role.ADMIN)
    @shown
    async def filled(self, request: Request) -> Response:
        """Show the form of what is saved, though it be broken."""
        return await self._saved(request, copy=False)

    @needs(Role.ADMIN)
    @shown
    async def copied(self, request: Request) -> Response:
        """Show the form of a new one with the settings of a saved one."""
        return await self._saved(request, copy=True)

    async def _saved(self, request: Request, *, copy: bool) -> Response:
        from talaria.service import editing

        office, ref = await self.site.office(request), ref_of(request)
        stored = await editing.stored(office, self.subject.kind, ref)
        return await self._form(
            request,
            self.subject.type_of(stored.type_name),
            name="" if copy else stored.name,
            values=stored.values,
            stored=stored.secrets,
            base=ref,
            version="" if copy else stored.version,
            action=f"{self.subject.add}/{quote(stored.type_name, safe='')}" if copy else "",
        )

    @needs(Role.ADMIN)
    @shown
    async def add(self, request: Request) -> Response:
        """Save a new one, or test it."""
        return await self._sent(request, self.subject.type_of(request.path_params["type"]), "")

    @needs(Role.ADMIN)
    @shown
    async def change(self, request: Request) -> Response:
        """Save a changed one, or test it."""
        from talaria.service import editing

        stored = await editing.stored(await self.site.office(request), self.subject.kind, ref_of(request))
        return await self._sent(request, self.subject.type_of(stored.type_name), stored.name)

    async def _sent(self, request: Request, cls: type[NamedBlock], name: str) -> Response:
        from talaria.front.pages import forms
        from talaria.service import editing

        sent = await fields(request, forms.several(cls), FIELDS)
        draft = self._draft(cls, sent, name, request)
        office, do = await self.site.office(request), sent.get("do", "")
        if do == "more":
            return await self._again(request, cls, sent, draft, name, {}, status=200, spare=SPARE + 3)
        if empty := forms.unwritten(cls, sent):
            return await self._again(request, cls, sent, draft, name, empty)
        try:
            if do == "test":
                return await self._tested(request, office, cls, sent, draft, name)
            await editing.save_draft(office, draft)
        except editing.NotValid as exc:
            return await self._again(request, cls, sent, draft, name, forms.by_field(cls, exc.errors))
        except editing.Outdated as exc:
            return await self._conflict(request, cls, sent, draft, exc)
        said = "changed" if name else "added"
        return RedirectResponse(self.subject.one(draft.name, kind_of(request), said=said), 303)

    async def _tested(
        self, request: Request, office: Office, cls: type[NamedBlock], sent: dict[str, str], draft: Draft, name: str
    ) -> Response:
        """Test what a form holds: a target step by step, others while it is waited for."""
        from talaria.front.pages.shown_settings import in_labels
        from talaria.service import editing, rules, sources, targets

        block = await editing.drafted(office, draft, named=False)
        if self.subject is TARGET:
            back = request.url.path + (f"?{request.url.query}" if request.url.query else "")
            events = targets.test_unsaved(block)
            shown_as = draft.name or cls.type_name
            by, words = who(request).name, in_labels(cls)
            return begun(request, self.checks.start(shown_as, by, back, block.contact, events, words))
        tested: dict[str, Any] = {}
        try:
            if problems := await self.subject.kind.problems(office, block):
                tested = {"ok": False, "problems": problems}
            elif self.subject is SOURCE:
                tested = await sources.test_unsaved(office, block)
            else:
                tested = await rules.test_unsaved(office, block)
        except (DispatchError, ValueError) as exc:
            tested = {"ok": False, "problems": [answer_to(exc)[1]]}
        if is_part(request):
            return render("tested.html", tested=tested, whole=True)
        return await self._again(request, cls, sent, draft, name, {}, status=200, tested=tested)

    async def _again(
        self,
        request: Request,
        cls: type[NamedBlock],
        sent: dict[str, str],
        draft: Draft,
        name: str,
        problems: dict[str, list[str]],
        *,
        status: int = 422,
        **more: Any,
    ) -> Response:
        """Show a form again with what was typed, and what is wrong with it."""
        from talaria.front.pages import forms

        return await self._form(
            request,
            cls,
            name=draft.name,
            values=forms.typed(cls, sent),
            stored=_stored(sent),
            base=draft.base,
            version=draft.version,
            fixed=name,
            problems=problems,
            status=status,
            **more,
        )

    async def _conflict(
        self, request: Request, cls: type[NamedBlock], sent: dict[str, str], draft: Draft, exc: Any
    ) -> Response:
        """Show a form again beside what somebody else has saved meanwhile."""
        from talaria.front.pages.shown_settings import differences

        theirs = differences(cls, draft.values, exc.theirs)
        now = replace(draft, version=exc.version)
        return await self._again(request, cls, sent, now, draft.name, {}, status=409, conflict=theirs)

    async def _form(
        self,
        request: Request,
        cls: type[NamedBlock],
        *,
        name: str,
        values: dict[str, Any],
        stored: Any = (),
        base: str = "",
        version: str = "",
        fixed: str | None = None,
        problems: dict[str, list[str]] | None = None,
        conflict: Any = None,
        tested: dict[str, Any] | None = None,
        spare: int = SPARE,
        action: str = "",
        status: int = 200,
    ) -> Response:
        from talaria.front.pages import forms, shown_settings

        problems, subject = problems or {}, self.subject
        edits = fixed if fixed is not None else (name if version else "")
        around = forms.Around(problems, await self._names(request, cls), spare)
        kind = shown_settings.title_of(cls)
        return self.site.page(
            request,
            "target_form.html",
            status=status,
            type=cls.type_name,
            about=shown_settings.first_line(cls),
            title=text("form.edit", name=edits) if edits else text(f"form.add_type.{subject.word}", type=kind),
            name=name,
            fixed=bool(edits),
            tabs=forms.tabs(forms.form(cls, values, stored, around)),
            problems=forms.summary(cls, problems),
            name_problems=problems.get("name", []),
            stored=sorted(stored),
            base=base,
            version=version,
            conflict=conflict,
            tested=tested,
            subject=subject,
            action=action,
            back=subject.one(edits, kind_of(request)) if edits else subject.add,
        )

    async def _names(self, request: Request, cls: type[NamedBlock]) -> dict[str, list[str]]:
        """Return the names that a form's fields may hold, by what they name."""
        from blocks.fields import facts

        if self.subject is TARGET:
            return {}
        office = await self.site.office(request)
        found = {"target": [row["name"] for row in await self.site.rows(office)]}
        if any(facts(cls, name).names == "source" for name in cls.model_fields):
            documents = await SOURCE.kind.saved.documents(office.client)
            found["source"] = sorted(str(one.name) for one in documents)
        return found

    def _draft(self, cls: type[NamedBlock], sent: dict[str, str], name: str, request: Request) -> Draft:
        from talaria.front.pages import forms
        from talaria.service.editing import Draft

        values, secrets = forms.read(cls, sent)
        base = ref_of(request) if name else sent.get("base", "")
        new, version = name or sent.get("name", "").strip(), sent.get("version", "")
        return Draft(self.subject.kind, new, cls.type_name, values, secrets, base, version, new=not name)


def with_paths(subject: Subject, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return rows of a list, each with the address of its page, which names the type where several have the name."""
    names = [row["name"] for row in rows]
    return [
        row | {"path": subject.one(row["name"], row["type"] if names.count(row["name"]) > 1 else "")} for row in rows
    ]


def _stored(sent: dict[str, str]) -> list[str]:
    return [one for one in sent.get("stored", "").split(",") if one]
