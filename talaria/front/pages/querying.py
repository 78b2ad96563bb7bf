"""The Query page: ask a target for studies, pick from what it has, and fetch that to targets or a folder.

Patients' identifiers stand here only. What is asked comes in by POST, so that it is in no address, title or log.
"""

from __future__ import annotations

import functools
import secrets
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import BaseRoute, Route

from talaria.front.access import Role, needs
from talaria.front.api.errors import answer_to
from talaria.front.lasting import gone
from talaria.front.pages.searches import Search, Searches
from talaria.front.pages.sending import browse
from talaria.front.pages.site import Site, fields, saved_as, shown, who, with_file
from talaria.front.pages.texts import text
from talaria.service import Office
from transfer import roots
from transfer.accessions import accessions, from_bytes, pasted
from transfer.errors import NotFound
from transfer.tables import csv_text

PATH = "/talaria/query"
KEYS = ("patient_id", "patient_name", "study_date", "modality", "study_uid")
LINES = ("study_description", "series_description")  # any of several, a line each
WHERE = ("to", "into", "off_peak", "studies_per_hour")
FIELDS = ("source", "accessions", *KEYS, *LINES, "level", *WHERE, "key")
LEVELS = ("study", "series")
SHOWN = 1000  # matches on a page
MOST_FIELDS = SHOWN + 100  # one for each match that is picked
COLUMNS = {
    "study": (
        "AccessionNumber", "PatientName", "PatientID", "StudyDate", "ModalitiesInStudy", "StudyDescription", "instances"
    ),
    "series": (
        "AccessionNumber", "PatientName", "PatientID", "StudyDate", "Modality", "StudyDescription", "SeriesDescription",
        "instances",
    ),
}  # fmt: skip
UIDS = ("StudyInstanceUID", "SeriesInstanceUID")


class QueryPages:
    """The form, what a search finds, and the retrieval of what is picked."""

    def __init__(self, site: Site) -> None:
        self.site, self.searches = site, Searches()

    def routes(self) -> list[BaseRoute]:
        """Return the routes."""
        one = f"{PATH}/{{id}}"
        return [
            Route(PATH, self.empty, methods=["GET"]),
            Route(PATH, self.sent, methods=["POST"]),
            Route(one, self.found, methods=["GET"]),
            Route(one, self.picked, methods=["POST"]),
            Route(f"{one}/csv", self.table, methods=["GET"]),
        ]

    @needs(Role.OPERATOR)
    @shown
    async def empty(self, request: Request) -> Response:
        """Show the form; with `again`, filled as a search was asked."""
        before = self.searches.find(request.query_params.get("again", ""), who(request).name)
        return await self._form(request, before.asked if before else {})

    @needs(Role.OPERATOR)
    @shown
    async def sent(self, request: Request) -> Response:
        """Start a search, or fetch all that the list names without looking."""
        sent, uploaded = await with_file(request, "list", several=("to",))
        asked = {name: sent.get(name, "").strip() for name in FIELDS}
        asked["level"] = asked["level"] if asked["level"] in LEVELS else LEVELS[0]
        office = await self.site.office(request)
        if "open" in sent or "add" in sent:
            asked["into"] = sent.get("add", asked["into"])
            return await self._form(request, asked, browsed=sent.get("open"))
        try:
            numbers = _numbers(asked, uploaded)
            if sent.get("do") == "fetch":
                return await self._fetch(request, office, asked, _keys(asked) | {"numbers": numbers})
            keys = _keys(asked) | {"accession": asked["accessions"], "level": asked["level"]}
            search = self._start(request, office, asked, numbers, keys)
        except Exception as exc:
            status, words = answer_to(exc)
            return await self._form(request, asked, problem=words, status=status)
        return RedirectResponse(f"{PATH}/{search.id}", 303)

    def _start(
        self, request: Request, office: Any, asked: Mapping[str, str], numbers: tuple[str, ...], keys: dict[str, Any]
    ) -> Search:
        from talaria.service import retrievals

        answer = retrievals.find_matches(office, asked["source"], **keys)
        try:
            return self.searches.start(who(request).name, asked, numbers, answer)
        except Exception:
            answer.close()
            raise

    @needs(Role.OPERATOR)
    @shown
    async def found(self, request: Request) -> Response:
        """Show a page of what a search has found, or that it still asks."""
        return await self._matches(request, self._search(request), first=_first(dict(request.query_params)))

    @needs(Role.OPERATOR)
    @shown
    async def picked(self, request: Request) -> Response:
        """Fetch the matches that were picked, on all pages; or show their series, or another page."""
        search, office = self._search(request), await self.site.office(request)
        sent = await fields(request, several=("to", "pick"), most=MOST_FIELDS)
        first = _first(sent)
        search.pick(
            first,
            first + SHOWN,
            (int(one) for one in sent.get("pick", "").split() if one.isdecimal() and len(one) < 10),
        )
        if "page" in sent:
            return await self._matches(request, search, self._asked(search, sent), first=_first(sent, "page"))
        everything = sent.get("do") == "all"
        chosen = [one for at, one in enumerate(search.matches) if everything or at in search.picked]
        asked = self._asked(search, sent)
        if "open" in sent or "add" in sent:
            asked["into"] = sent.get("add", asked["into"])
            return await self._matches(request, search, asked, first=first, browsed=sent.get("open"))
        try:
            keys = _of_picked(chosen, search.level, asked)
            if sent.get("do") == "series":
                asked |= {"level": "series"}
                found = dict.fromkeys(str(one.get("AccessionNumber") or "") for one in chosen)
                again = self._start(
                    request, office, asked, tuple(found) if search.numbers else (), keys | {"level": "series"}
                )
                return RedirectResponse(f"{PATH}/{again.id}", 303)
            return await self._fetch(request, office, asked, keys)
        except Exception as exc:
            status, words = answer_to(exc)
            return await self._matches(request, search, asked, first=first, problem=words, status=status)

    def _asked(self, search: Search, sent: Mapping[str, str]) -> dict[str, str]:
        """Return the fields of a search, with where its form says that the matches are to go."""
        return {**search.asked, **{name: sent.get(name, "").strip() for name in (*WHERE, "key")}}

    @needs(Role.OPERATOR)
    @shown
    async def table(self, request: Request) -> Response:
        """Return what a search has found as CSV."""
        search = self._search(request)
        columns = [*COLUMNS[search.level], *UIDS[: 1 + (search.level == "series")]]
        lines = [{name: _shown(one.get(name)) for name in columns} for one in search.matches]
        return saved_as("matches.csv", "text/csv", csv_text(columns, lines))

    def _search(self, request: Request) -> Search:
        found = self.searches.find(request.path_params["id"], who(request).name)
        if found is None:
            raise NotFound(text("query.gone"))
        return found

    async def _fetch(
        self, request: Request, office: Office, asked: Mapping[str, str], keys: dict[str, Any]
    ) -> Response:
        from talaria.service import retrievals

        to = [one for one in asked["to"].split("\n") if one]
        if bool(to) == bool(asked["into"]):
            raise ValueError(text("query.no_place"))
        hourly = asked["studies_per_hour"]
        if hourly and not hourly.isdecimal():
            raise ValueError(text("query.per_hour_wrong"))
        done = await retrievals.create_retrieval(
            replace(office, gone=functools.partial(gone, request)),
            asked["source"],
            targets=to,
            into=asked["into"],
            off_peak=bool(asked["off_peak"]),
            studies_per_hour=int(hourly or 0),
            key=asked["key"],  # a double click fetches once
            **keys,
        )
        self.site.fetched.note()
        return RedirectResponse(f"/talaria/retrievals/{done['flow_run_id']}", 303)

    async def _form(
        self,
        request: Request,
        asked: Mapping[str, str],
        *,
        problem: str = "",
        status: int = 200,
        browsed: str | None = None,
    ) -> Response:
        office = await self.site.office(request)
        every = await self.site.rows(office)
        listing, wrong = await browse(office, roots.places, browsed)
        return self.site.page(
            request,
            "query.html",
            status=status,
            values={name: asked.get(name, "") for name in FIELDS} | {"key": secrets.token_urlsafe(12)},
            sources=[row for row in every if row["enabled"] and row["direction"] in ("query", "both")],
            targets=_destinations(every, asked.get("to", "")),
            levels=[(one, text(f"query.{one}")) for one in LEVELS],
            browsable=office.embedded,
            listing=listing,
            problem=problem or wrong,
            jobs=await self.site.retrievals(office),
        )

    async def _matches(
        self,
        request: Request,
        search: Search,
        asked: Mapping[str, str] | None = None,
        *,
        first: int = 0,
        problem: str = "",
        status: int = 200,
        browsed: str | None = None,
    ) -> Response:
        office = await self.site.office(request)
        listing, wrong = await browse(office, roots.places, browsed)
        asked, columns = search.asked if asked is None else asked, COLUMNS[search.level]
        every = await self.site.rows(office) if search.over else []
        first = first if first < len(search.matches) else 0
        lines = [
            (at, at in search.picked, [_read(one, name) for name in columns])
            for at, one in enumerate(search.matches[first : first + SHOWN], first)
        ]
        answer = self.site.page(
            request,
            "matches.html",
            status=status,
            search=search,
            columns=[text(f"dicom.{name}") for name in columns],
            lines=lines,
            first=first,
            size=SHOWN,
            elsewhere=sum(not first <= at < first + SHOWN for at in search.picked),
            missing=search.missing if search.over and not search.problem else [],
            notes=Counter(one["note"] for one in search.matches if "note" in one),
            doubtful=sorted(search.doubtful) if search.numbers else [],
            values={name: asked.get(name, "") for name in WHERE} | {"key": secrets.token_urlsafe(12)},
            targets=_destinations(every, asked.get("to", "")),
            browsable=office.embedded,
            listing=listing,
            problem=problem or wrong,
        )
        if not search.over:
            answer.headers["refresh"] = "2"  # without scripts
        return answer


def _first(sent: Mapping[str, str], name: str = "first") -> int:
    """Return the number of the first match of a page, counted from 0."""
    given = sent.get(name, "")
    return int(given) // SHOWN * SHOWN if given.isdecimal() and len(given) < 10 else 0


def _keys(asked: Mapping[str, str]) -> dict[str, Any]:
    """Return what was asked for as an operation takes it, but for the list of accession numbers."""
    return {name: asked[name] for name in KEYS} | {name: asked[name].split("\n") for name in LINES}


def _numbers(asked: dict[str, str], uploaded: bytes) -> tuple[str, ...]:
    """Return the accession numbers that are asked for; those of an uploaded list are added to the field.

    Raises:
        ValueError, Misconfigured: nothing is asked for, or of nobody.
    """
    if not asked["source"]:
        raise ValueError(text("query.no_source"))
    if uploaded:
        added = from_bytes(uploaded, text("query.file"))
        asked["accessions"] = pasted((*accessions(asked["accessions"]), *added))
    numbers = accessions(asked["accessions"])
    if not numbers and not any(asked[name] for name in (*KEYS, *LINES)):
        raise ValueError(text("query.nothing_asked"))
    return numbers


def _of_picked(chosen: list[dict[str, Any]], level: str, asked: Mapping[str, str]) -> dict[str, Any]:
    """Return the keys of what was picked: of studies, the series that the search asked for.

    Raises:
        ValueError: nothing was.
    """
    if not chosen:
        raise ValueError(text("query.none_picked"))
    studies, series = (",".join(dict.fromkeys(str(one.get(name) or "") for one in chosen)) for name in UIDS)
    if level == "series":
        return {"study_uid": studies, "series_uid": series}
    descriptions = asked["series_description"].split("\n")
    return {"study_uid": studies, "modality": asked["modality"], "series_description": descriptions}


def _destinations(every: list[dict[str, Any]], chosen: str) -> list[tuple[str, str, str, bool]]:
    """Return the targets that studies can be sent to: name, type, where it leads, and whether it is chosen."""
    marked = chosen.split("\n")
    may = [row for row in every if row["enabled"] and row["direction"] != "query"]
    return [(row["name"], row["type"], row["leads_to"], row["name"] in marked) for row in may]


def _read(match: Mapping[str, Any], name: str) -> str:
    """Return a value as people read it."""
    value = _shown(match.get(name))
    plain = name == "StudyDate" and len(value) == 8 and value.isdecimal()
    return f"{value[:4]}-{value[4:6]}-{value[6:]}" if plain else value


def _shown(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else "" if value is None else str(value)
