"""The page that takes a file of targets, sources and rules, or mercure's: a preview first, then the change.

What was read is kept in memory between the two, since it may hold secrets, which no page shows again.
"""

from __future__ import annotations

import asyncio
import json
import re
import secrets
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import yaml
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from talaria.front.access import Role, needs
from talaria.front.api.errors import answer_to
from talaria.front.pages.site import Site, shown, who, with_file
from talaria.front.pages.texts import text
from talaria.service import Office
from transfer.errors import Misconfigured, NotFound

PATH = "/talaria/import"
SECTIONS = ("targets", "sources", "notify")  # the order in which they are saved: sources name targets
UNCHANGED = "unchanged"
KEPT_S = 600  # between the preview and the change
MOST = 20  # previews of all users
FILLED = re.compile(r"^file:(?!//)|\$\{")  # what only a command fills in, on the machine where it runs


@dataclass
class Preview:
    """A file that was read, and not taken over yet.

    Attributes:
        sections: entries by name, of each section.
        notes: what does not come along.
    """

    by: str
    sections: dict[str, dict[str, Any]] = field(repr=False)
    notes: list[str]

    def every(self) -> list[tuple[str, str, Any]]:
        """Return section, name and values of each entry."""
        return [(section, *entry) for section in SECTIONS for entry in self.sections.get(section, {}).items()]


@dataclass(frozen=True)
class Row:
    """An entry of a file.

    Attributes:
        kind: its type.
        action: what the import changes.
        saved: whether that was done; None if nobody knows.
    """

    section: str
    name: str
    kind: str
    action: str
    saved: bool | None = True


class ImportPages:
    """Import: what a file would change, and the change."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self._previews: dict[str, Preview] = {}

    def routes(self) -> list[BaseRoute]:
        """Return the routes."""
        return [
            Route(PATH, self.empty, methods=["GET"]),
            Route(PATH, self.preview, methods=["POST"]),
            Route(f"{PATH}/{{id}}", self.take_over, methods=["POST"]),
        ]

    @needs(Role.ADMIN)
    @shown
    async def empty(self, request: Request) -> Response:
        """Show the form; with `source`, with that source as the file has it."""
        name = request.query_params.get("source", "")
        return self._form(request, await self._entry(request, name) if name else "")

    async def _entry(self, request: Request, name: str) -> str:
        from talaria.service import sources

        known = await sources.show_source(await self.site.office(request), name, given=True)
        return yaml.safe_dump({"sources": {name: known["settings"]}}, sort_keys=False, allow_unicode=True)

    def _form(self, request: Request, content: str = "", problem: str = "", status: int = 200) -> Response:
        return self.site.page(request, "import.html", status=status, content=content, problem=problem)

    @needs(Role.ADMIN)
    @shown
    async def preview(self, request: Request) -> Response:
        """Show what a file would change."""
        sent, uploaded = await with_file(request, "file")
        content = sent.get("content", "")
        try:
            sections, notes = read(uploaded.decode("utf-8-sig") if uploaded else content)
            changes = await looked(await self.site.office(request), sections)
        except UnicodeDecodeError:
            return self._form(request, content, text("import.no_text"), 422)
        except Exception as exc:
            status, words = answer_to(exc)
            return self._form(request, content, words, status)
        key = secrets.token_urlsafe(16)
        while len(self._previews) >= MOST:
            del self._previews[next(iter(self._previews))]
        self._previews[key] = Preview(who(request).name, sections, notes)
        asyncio.get_running_loop().call_later(KEPT_S, self._previews.pop, key, None)
        return self._shown(request, changes, notes, key, preview=True)

    @needs(Role.ADMIN)
    @shown
    async def take_over(self, request: Request) -> Response:
        """Change what the preview has shown: all of it, or say what was saved and what was not."""
        key = request.path_params["id"]
        kept = self._previews.get(key)
        if kept is None or kept.by != who(request).name:
            raise NotFound(text("import.gone"))
        office = await self.site.office(request)
        try:
            before = await looked(office, kept.sections)
        except Exception as exc:  # something has changed since the preview
            status, words = answer_to(exc)
            rows = [Row(section, name, kind(values), "", False) for section, name, values in kept.every()]
            return self._shown(request, rows, kept.notes, key, words, status)
        try:
            for section in SECTIONS:
                if kept.sections.get(section):
                    await calls()[section](office, kept.sections[section])
        except Exception as exc:
            status, words = answer_to(exc)
            return self._shown(request, await _what_was_saved(office, kept, before), kept.notes, key, words, status)
        self._previews.pop(key, None)
        return self._shown(request, before, kept.notes)

    def _shown(
        self,
        request: Request,
        rows: list[Row],
        notes: list[str],
        key: str = "",
        problem: str = "",
        status: int = 200,
        *,
        preview: bool = False,
    ) -> Response:
        page: dict[str, Any] = {"changes": rows, "notes": notes, "key": key, "problem": problem, "preview": preview}
        return self.site.page(request, "imported.html", status=status, **page)


def calls() -> dict[str, Callable[..., Awaitable[dict[str, Any]]]]:
    """Return what saves the entries of each section."""
    from talaria.service import rules, sources, targets

    return {"targets": targets.apply_targets, "sources": sources.apply_sources, "notify": rules.apply_rules}


def kind(values: Any) -> str:
    """Return the type that an entry names."""
    return str(values.get("type", "")) if isinstance(values, dict) else ""


async def looked(office: Office, sections: Mapping[str, dict[str, Any]]) -> list[Row]:
    """Return what each entry of a file would change, sources looked at as if the file's targets were saved.

    Raises:
        Misconfigured: all that is wrong, each in a line; as it is looked at, nothing is saved.
    """
    from talaria.service import targets

    found, wrong, coming = list[Row](), list[str](), list[Any]()
    for section in SECTIONS:
        entries = sections.get(section)
        if not entries:
            continue
        more = {"beside": coming} if section == "sources" else {}
        try:
            coming = [*targets.made(entries).values()] if section == "targets" else coming
            done = await calls()[section](office, entries, True, **more)
        except Misconfigured as exc:
            wrong.append(exc.message)
            continue
        rows = done["rules" if section == "notify" else section]
        found += [Row(section, row["name"], kind(entries.get(row["name"])), row["action"]) for row in rows]
    if wrong:
        raise Misconfigured("\n".join(wrong))
    return found


async def _what_was_saved(office: Office, kept: Preview, before: list[Row]) -> list[Row]:
    """Return the rows of an import that was not done wholly: an entry that would change nothing any more is saved."""
    try:
        now = {(row.section, row.name): row.action for row in await looked(office, kept.sections)}
    except Exception:  # the server is away: nobody knows
        return [replace(row, saved=None) for row in before]
    return [replace(row, saved=now.get((row.section, row.name)) == UNCHANGED) for row in before]


def read(content: str) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Return the sections of a file, YAML or mercure's JSON, and what does not come along.

    Raises:
        Misconfigured: it is neither, or wants something of this machine filled in.
    """
    from talaria import configfile, mercure

    if not content.strip():
        raise Misconfigured(text("import.nothing"))
    try:
        document = json.loads(content)
    except ValueError:
        document = None
    if mercure.is_mercure(document):
        found, notes = mercure.targets(document)
        if not found:
            raise Misconfigured(text("import.nothing"))
        return {"targets": found}, notes
    sections = configfile.sections(content, text("import.file"))
    whole = {section: {str(name): values for name, values in entries.items()} for section, entries in sections.items()}
    for entries in whole.values():
        for name, values in entries.items():
            _check(name, values)
    return whole, []


def _check(name: str, values: Any) -> None:
    """Raise Misconfigured if an entry is none, or names a variable or file of this machine."""
    if not isinstance(values, dict):
        raise Misconfigured(text("import.no_entry", name=name))
    for key, value in values.items():
        if isinstance(value, str) and FILLED.search(value):
            raise Misconfigured(text("import.filled", name=name, field=key))
        try:
            json.dumps(value)
        except (TypeError, ValueError) as exc:
            raise Misconfigured(text("import.quotes", name=name, field=key)) from exc
