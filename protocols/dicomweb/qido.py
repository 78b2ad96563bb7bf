"""Searches by QIDO-RS (PS3.18 section 10.6): every page, and only what the query really asks for.

Servers differ: some cap a page below the limit that was asked for, some ignore `offset` and send the first page
again, some refuse attributes or filters that they don't know, many ignore those. So pages are fetched until one
brings nothing new; what was sent twice counts once; and everything is compared with the query on this side, by the
rules of `dicommatch`.
"""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Iterator, Sequence
from typing import Any

from imaging import json as dicomjson
from imaging.json import Attributes, keyworded
from imaging.match import in_days
from imaging.query import Match, Query
from protocols.dicomweb import service as dicomweb
from protocols.dicomweb.service import Service
from protocols.net.hiding import forms
from transfer.errors import DispatchError, Misconfigured, NotFound
from transfer.query import series_tests, study_tests

logger = logging.getLogger(__name__)

PAGE = 200  # results; Azure refuses to give more at once
MOST = 100_000  # results that are asked for at once of a server that ignores `offset`
CAPS = frozenset((10, 20, 25, 30, 50, 100, 200, 250, 500, 1000, 2000, 5000, 10_000))  # that servers set themselves

STUDY_UID, SERIES_UID, SOP_UID = "0020000D", "0020000E", "00080018"
STUDY_FIELDS = (
    "StudyDescription", "ModalitiesInStudy", "NumberOfStudyRelatedSeries", "NumberOfStudyRelatedInstances",
)  # fmt: skip
SERIES_FIELDS = ("SeriesDescription", "BodyPartExamined", "NumberOfSeriesRelatedInstances")
# What servers need not match on (PS3.18 table 10.6.1-5), so it may be left out if they refuse.
OPTIONAL = frozenset(("StudyDescription",))

_LEVELS = (("studies", "StudyInstanceUID"), ("series", "SeriesInstanceUID"), ("instances", "SOPInstanceUID"))

_ENCODED = re.compile(r"[^A-Za-z0-9" + re.escape(dicomweb.QUERY_SAFE) + "]+")  # what a URL can't hold as it is

Keys = tuple[tuple[str, str], ...]


def find(service: Service, query: Query) -> Iterator[Match]:
    """Yield the studies or series that match, each once.

    Raises:
        Misconfigured: the query is none, or the server can't answer it in full.
    """
    private = (query.PatientName, query.PatientID, *query.AccessionNumber)
    service = service.hiding({form for value in private for form in forms(value)})
    for study in _studies(service, query):
        if query.level == "series":
            for series in series_of(service, study, query):
                yield Match({**study, **series}, _count(series.get("NumberOfSeriesRelatedInstances")))
        elif _has_series(service, study, query):
            yield Match(study, _count(study.get("NumberOfStudyRelatedInstances")))


def announced(match: Match) -> int | None:
    """How many instances the server says that the match's study has."""
    return _count(match.attributes.get("NumberOfStudyRelatedInstances"))


def series_of(service: Service, study: dict[str, Any], query: Query) -> Iterator[dict[str, Any]]:
    """Yield the series of a study that match a query, as values by keyword."""
    tests = series_tests(query)
    uid = str(study["StudyInstanceUID"])
    for found in _search(service, ("studies", uid, "series"), (), SERIES_FIELDS, SERIES_UID):
        series = keyworded(found)
        if all(test(_text(series.get(keyword))) for keyword, test in tests):
            yield series


def instances(service: Service, study_uid: str, series_uid: str) -> Iterator[str]:
    """Yield the SOP instance UIDs of a series.

    Raises:
        NotFound: the server has no such resource, because it has no such series, or no such service.
    """
    segments = ("studies", study_uid, "series", series_uid, "instances")
    for found in _search(service, segments, (), (), SOP_UID, missing_is_none=False):
        yield dicomjson.text(found, SOP_UID)


def probe(service: Service, *segments: str) -> dict[str, Any] | None:
    """Ask for one study, or one of what is below one; returns it, None if there is none."""
    path = service.path(service.qido, *(segments or ("studies",)), query=[("limit", "1")])
    try:
        found = _page(service, path)[0]
    except _Refused as exc:
        raise exc.error from exc
    return keyworded(found[0]) if found else None


def any_instance(service: Service) -> tuple[str, str, str] | None:
    """Return the UIDs (study, series, instance) of some instance, None if none is to be found."""
    uids: list[str] = []
    segments: list[str] = []
    for level, keyword in _LEVELS:
        segments.append(level)
        found = probe(service, *segments)
        if not found or not found.get(keyword):
            return None
        uids.append(str(found[keyword]))
        segments.append(uids[-1])
    return uids[0], uids[1], uids[2]


def _studies(service: Service, query: Query) -> Iterator[dict[str, Any]]:
    tests = study_tests(query)
    seen: set[str] = set()
    for keys in _study_keys(service, query):
        for wording in _wordings(keys):
            any_found = False
            for found in _search(service, ("studies",), wording, STUDY_FIELDS, STUDY_UID):
                any_found = True
                study = keyworded(found)
                uid = str(study.get("StudyInstanceUID", ""))
                if uid and uid not in seen and all(test(_text(study.get(keyword))) for keyword, test in tests):
                    seen.add(uid)
                    yield study
            if any_found:
                break


def _wordings(keys: Keys) -> Iterator[Keys]:
    """The search as it is, and one for servers that don't decode `%5E` (Orthanc's plugin 1.7): wild cards instead."""
    yield keys
    loose = tuple((key, _ENCODED.sub("*", value)) for key, value in keys)
    if loose != keys:
        yield loose


def _study_keys(service: Service, query: Query) -> Iterator[Keys]:
    """The searches that together find every study of a query: one value of each key that is a list."""
    for values in (query.AccessionNumber, query.StudyDescription, query.SeriesDescription):
        if values and not any(value.strip() for value in values):
            return  # blanks match nothing: not worth a list of all that there is
    common = [
        (keyword, value.strip())
        for keyword, value in (
            ("PatientID", query.PatientID),
            ("PatientName", query.PatientName),
            ("StudyDate", query.StudyDate.strip() and in_days(query.StudyDate)),
        )
        if value.strip()
    ]
    modalities = _listed(query.Modality)
    if len(modalities) == 1:
        common.append(("ModalitiesInStudy", modalities[0]))
    studies = _listed(query.StudyInstanceUID)
    if not studies and query.SeriesInstanceUID.strip():
        studies = _studies_of_series(service, _listed(query.SeriesInstanceUID))
    lists = [
        [("AccessionNumber", value.strip()) for value in dict.fromkeys(query.AccessionNumber) if value.strip()],
        [("StudyInstanceUID", value) for value in studies],
    ]
    if not any(lists):  # else the search is narrow enough
        lists.append([("StudyDescription", value.strip()) for value in query.StudyDescription if value.strip()])
    for choice in itertools.product(*(values for values in lists if values)):
        yield (*common, *choice)


def _studies_of_series(service: Service, series: list[str]) -> list[str]:
    """The studies that series belong to; none if the server can't search for series without their study."""
    found: list[str] = []
    try:
        for uid in series:
            keys = (("SeriesInstanceUID", uid),)
            for one in _search(service, ("series",), keys, (), SERIES_UID):
                if dicomjson.text(one, SERIES_UID) == uid:
                    found.append(dicomjson.text(one, STUDY_UID))
    except (Misconfigured, NotFound):
        return []
    return [uid for uid in dict.fromkeys(found) if uid]


def _has_series(service: Service, study: dict[str, Any], query: Query) -> bool:
    """Whether one series of a study passes all tests that a query has for series."""
    tests = dict(series_tests(query))
    if not tests:
        return True
    modalities = study.get("ModalitiesInStudy")
    if set(tests) == {"Modality"} and modalities:
        return any(tests["Modality"](str(one)) for one in ([modalities] if isinstance(modalities, str) else modalities))
    return next(series_of(service, study, query), None) is not None


def _search(
    service: Service,
    segments: tuple[str, ...],
    keys: Keys,
    fields: Sequence[str],
    uid_tag: str,
    *,
    missing_is_none: bool = True,
) -> Iterator[Attributes]:
    """Yield all results of a search, page by page, each once."""
    search = _Pages(service, segments, keys, fields)
    seen: set[str] = set()
    offset, limit = 0, PAGE
    turns = False  # whether the server has ever turned to another page
    first: list[str] = []  # the UIDs on the first page, and in order those on all
    pages: list[list[str]] = []
    while True:
        try:
            results, more = search.page(limit, offset)
        except NotFound:
            if seen and search.paged:  # what some servers say beyond the last page; all at once shows it
                search.paged = False
                continue
            if missing_is_none and len(segments) > 1:
                return
            raise
        fresh = 0
        uids = [dicomjson.text(result, uid_tag) for result in results]
        for uid, result in zip(uids, results, strict=True):
            if uid and uid not in seen:
                seen.add(uid)
                fresh += 1
                yield result
        if offset == 0:
            first = sorted(uids)
        turns = turns or (offset > 0 and sorted(uids) != first)
        if not results or not search.paged:
            if more:
                raise search.cut_short(len(seen))
            return
        # Some servers give a row for each instance of a study: pages that bring nothing new, and are no others again.
        repeated = uids in pages and set(uids) != set(pages[-1][-1:])
        pages.append(uids)
        if fresh or (turns and not repeated and offset < MOST):
            offset += len(results)
        elif turns and not more:  # beyond the end it gives some page again
            return
        elif len(results) >= limit and limit < MOST:
            # Full, and nothing new: `offset` means nothing to this server, so all must come at once.
            offset, limit = 0, limit * 10
        elif more or (limit > PAGE and len(results) <= limit // 10) or search.may_be_capped(len(results)):
            raise search.cut_short(len(seen))
        else:
            if limit == PAGE and len(seen) > 1:
                text = "%s: gives %d results and ignores offset: whether it has more can't be told"
                logger.warning(text, service.where, len(seen))
            return


class _Pages:
    """One search, in the words that the server takes.

    Attributes:
        paged: whether it takes `limit` and `offset`.
    """

    def __init__(self, service: Service, segments: tuple[str, ...], keys: Keys, fields: Sequence[str]) -> None:
        self.service, self.segments, self.keys, self.fields = service, segments, keys, fields
        self.paged = True
        self._all = True  # whether it takes our optional keys, and includefield

    def page(self, limit: int, offset: int) -> tuple[list[Attributes], bool]:
        """Fetch a page; returns the results, and whether the server says that there are more."""
        while True:
            query = [(key, value) for key, value in self.keys if self._all or key not in OPTIONAL]
            query += [("includefield", field) for field in self.fields if self._all]
            query += [("limit", str(limit)), ("offset", str(offset))] if self.paged else []
            try:
                return _page(self.service, self.service.path(self.service.qido, *self.segments, query=query))
            except _Refused as exc:
                # It doesn't say which parameter it doesn't like: those that we can do without go first.
                if self._all and (self.fields or any(key in OPTIONAL for key, _ in self.keys)):
                    self._all = False
                elif self.paged:
                    self.paged = False
                else:
                    raise exc.error from exc

    def may_be_capped(self, count: int) -> bool:
        """Whether a server that ignores `offset` may have held results back.

        One that ignores `limit` too has no pages at all. One that doesn't may have a limit of its own.
        """
        if count not in CAPS:
            return False
        return len(self.page(count // 2, 0)[0]) <= count // 2

    def cut_short(self, count: int) -> Misconfigured:
        path = self.service.path(self.service.qido, *self.segments)
        return Misconfigured(
            f"{self.service.where}{path}: the server gives {count} results, and may have more, but ignores offset: "
            "narrow the query"
        )


class _Refused(Exception):
    """The server doesn't take this search (400)."""

    def __init__(self, error: DispatchError) -> None:
        super().__init__(error.message)
        self.error = error


def _page(service: Service, path: str) -> tuple[list[Attributes], bool]:
    """Fetch one page; returns the results, and whether the server says that there are more."""
    status, answer, body = service.get(path, f"{dicomweb.JSON}, application/json;q=0.9")
    if status == 416:  # no such page
        raise NotFound(service.error(answer, body, path).message)
    if status == 204 or (status in (200, 206) and not body.strip()):
        return [], False
    if status == 400:
        raise _Refused(service.error(answer, body, path))
    if status not in (200, 206):
        raise service.error(answer, body, path)
    try:
        results = dicomjson.parse(body)
    except ValueError as exc:
        raise dicomweb.unexpected(service, answer, body, path) from exc
    # PS3.18 section 8.3.4.4: "Warning: 299 ...: There are additional results that can be requested".
    more = any(warning.strip().startswith("299") for warning in answer.headers.get_all("Warning") or ())
    return [result for result in results if result], more


def _listed(value: str) -> list[str]:
    return [part.strip() for part in value.replace("\\", ",").split(",") if part.strip()]


def _text(value: Any) -> str:
    return "\\".join(str(one) for one in value) if isinstance(value, list) else "" if value is None else str(value)


def _count(value: Any) -> int | None:
    try:
        return int(str(value))
    except ValueError:
        return None
