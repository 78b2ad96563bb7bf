"""The page that takes a file of targets, sources and rules, or mercure's: a preview first, then the change.

What was read is kept in memory between the two, since it may hold secrets, which no page shows again.
"""

from __future__ import annotations

import asyncio
import json
import re
import secrets
from dataclasses import dataclass, field
from typing import Any

import yaml
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from talaria.front.access import Role, needs
from talaria.front.api.errors import answer_to
from talaria.front.pages.site import Site, shown, who, with_file
from talaria.front.pages.texts import text
from transfer.errors import Misconfigured, NotFound

PATH = "/talaria/import"
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
            changes = await self._applied(request, sections, dry_run=True)
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
        return self.site.page(request, "imported.html", changes=changes, notes=notes, key=key)

    @needs(Role.ADMIN)
    @shown
    async def take_over(self, request: Request) -> Response:
        """Change what the preview has shown."""
        kept = self._previews.get(request.path_params["id"])
        if kept is None or kept.by != who(request).name:
            raise NotFound(text("import.gone"))
        changes = await self._applied(request, kept.sections, dry_run=False)
        self._previews.pop(request.path_params["id"], None)
        return self.site.page(request, "imported.html", changes=changes, notes=kept.notes, key="")

    async def _applied(
        self, request: Request, sections: dict[str, dict[str, Any]], *, dry_run: bool
    ) -> list[tuple[str, str, str, str]]:
        """Return section, name, type and action of each entry; without `dry_run`, it has been made so.

        Sources and rules of a file that also names new targets can only be looked at whole once those are there.
        """
        from talaria.service import rules, sources, targets

        office = await self.site.office(request)
        calls = {"targets": targets.apply_targets, "sources": sources.apply_sources, "notify": rules.apply_rules}
        new = set(sections.get("targets", {}))
        found: list[tuple[str, str, str, str]] = []
        for section, call in calls.items():
            entries = sections.get(section)
            if not entries:
                continue
            kinds = {name: str(values.get("type", "")) for name, values in entries.items()}
            if section == "sources" and dry_run and new:
                found += [(section, name, kinds[name], text("import.later")) for name in entries]
                continue
            done = await call(office, entries, dry_run)
            rows = done["rules" if section == "notify" else section]
            found += [(section, row["name"], kinds.get(row["name"], ""), row["action"]) for row in rows]
        return found


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
