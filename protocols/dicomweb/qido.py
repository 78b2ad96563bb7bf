"""Searches by QIDO-RS (PS3.18 section 10.6): everything that a query matches, and nothing else.

Servers match differently, and some ignore filters, so everything is compared with the query on this side, by the
rules of `imaging.match`; and the searches are worded so that servers can't leave out what those rules find. Where an
answer lacks a value to compare, the server's own match counts, if it has been seen to match at all; otherwise an
instance of the study is read.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from imaging import json as dicomjson
from imaging.json import Attributes, keyworded
from imaging.loss import is_hazy, may_be, shape, wanted
from imaging.match import Test, has_wild_cards, in_days, is_universal
from imaging.query import Match, Query, count, listed, text
from protocols.dicomweb import service as dicomweb
from protocols.dicomweb.client import DicomwebClient, Keys, RequestRefused
from protocols.dicomweb.pages import DATE, UID_TAGS, Archive, PagedSearch
from protocols.dicomweb.service import Service
from protocols.net.hiding import forms
from transfer.errors import DispatchError, Misconfigured, NotFound
from transfer.query import AskedNumbers, series_tests, study_tests

INSTANCES = "00201209"  # NumberOfSeriesRelatedInstances
STUDY_UID, SERIES_UID, SOP_UID = UID_TAGS["studies"], UID_TAGS["series"], UID_TAGS["instances"]
STUDY_FIELDS = (
    "StudyDescription", "ModalitiesInStudy", "NumberOfStudyRelatedSeries", "NumberOfStudyRelatedInstances",
)  # fmt: skip
SERIES_FIELDS = ("SeriesDescription", "BodyPartExamined", "NumberOfSeriesRelatedInstances")
CASED = ("StudyDescription", "SeriesDescription")  # match in the case that they are given in; servers may ignore it
# Values that no study has: a server that finds something with them ignores the key.
NO_VALUE, NO_DATE = "NO SUCH VALUE 7Q", "18000101"
NAME_TRIES = 5  # with up to so many empty components less one at its end, as some write names (PS3.5 section 6.2.1)

LIST_TRIES, LIST_WAITS = 3, 4  # of each search of a list

MOST_READ = 500  # instances, for results that are shown without some letters

_LEVELS = (("studies", "StudyInstanceUID"), ("series", "SeriesInstanceUID"), ("instances", "SOPInstanceUID"))

_ENCODED = re.compile(r"[^A-Za-z0-9" + re.escape(dicomweb.QUERY_SAFE) + "]+")  # what a URL can't hold as it is


def find(service: Service, query: Query, *, tries: int = 1) -> Iterator[Match]:
    """Yield the studies or series that match, each once.

    A list takes a search for each of its values: these are repeated each by itself, and none is made again for others.

    Args:
        tries: how often a page is requested over connections that break.

    Raises:
        Misconfigured: the query is malformed, or the server can't answer it in full.
    """
    private = (query.PatientName, query.PatientID, *query.AccessionNumber)
    worded = (*private, *map(_loose, private))  # as servers get them
    service = service.hiding({form for value in worded for form in forms(value)})
    long = max(len(query.AccessionNumber), len(listed(query.StudyInstanceUID))) > 1
    finder = _Finder(Archive(service, LIST_TRIES, LIST_WAITS) if long else Archive(service, tries), query)
    for study in finder.studies():
        if query.level == "series":
            for series in finder.series_of(study):
                yield Match({**study, **series}, count(series.get("NumberOfSeriesRelatedInstances")))
        elif finder.has_series(study):
            yield Match(study, count(study.get("NumberOfStudyRelatedInstances")))


def instances(archive: Archive, study_uid: str, series_uid: str, expected: int | None = None) -> Iterator[str]:
    """Yield the SOP instance UIDs of a series.

    Args:
        expected: how many there are, as far as the server has said so.

    Raises:
        NotFound: the server has no such resource, because it has no such series, or no such service.
        CutShort: it may have more than it gives; what it gives has been yielded.
    """
    segments = ("studies", study_uid, "series", series_uid, "instances")
    for found in PagedSearch(archive, segments, expected=expected):
        yield dicomjson.text(found, SOP_UID)


def holds(archive: Archive, study_uid: str, series_uid: str, uid: str) -> bool | None:
    """Return whether the server has an instance; None if its answer leaves that open."""
    segments = ("studies", study_uid, "series", series_uid, "instances")
    search = PagedSearch(archive, segments, (("SOPInstanceUID", uid),))
    try:
        found = [dicomjson.text(row, SOP_UID) for row in search.page(2, 0).rows]
    except NotFound:
        return None
    return True if uid in found else None if found or not search.sent else False


def probe(service: Service) -> None:
    """Search for one study; raise if that can't be done."""
    try:
        DicomwebClient(service).search(("studies",), limit=1)
    except RequestRefused as exc:
        raise exc.error from None


def samples(service: Service, most: int) -> Iterator[tuple[str, ...]]:
    """Yield the UIDs (study, series, instance) of the first instance of some studies.

    Those of study and series only, where the server does not list instances; nothing, where it can't be searched.
    """
    archive = Archive(service)
    for study in _first(archive, most, "studies"):
        for series in _first(archive, 1, "studies", study, "series"):
            instances = _first(archive, 1, "studies", study, "series", series, "instances")
            yield (study, series, *instances)


def _first(archive: Archive, most: int, *segments: str) -> list[str]:
    """Return the first UIDs of a list."""
    try:
        rows = PagedSearch(archive, segments).page(most, 0).rows
    except (NotFound, Misconfigured):
        return []
    return [uid for row in rows[:most] if (uid := dicomjson.text(row, UID_TAGS[segments[-1]]))]


class _Finder:
    """One query to one server, and what has been found out about the server meanwhile."""

    def __init__(self, archive: Archive, query: Query) -> None:
        self.archive, self.query = archive, query
        self._study_tests, self._series_tests = study_tests(query), series_tests(query)
        self._wanted = wanted(query)
        self._there: bool | None = None
        self._read = 0  # instances that were read, as results didn't show all letters
        self._matched: dict[tuple[str, ...], bool] = {}  # whether the server matches a key, by level and key
        self._stars: dict[str, bool] = {}  # whether it takes wild cards in a key

    # ---- studies

    def studies(self) -> Iterator[dict[str, Any]]:
        """Yield the studies whose own attributes match, each once; under each number that was asked for it."""
        seen: set[str] = set()
        numbers = AskedNumbers(self.query)
        asked: set[Keys] = set()
        for keys in self._study_keys():
            for wording in self._wordings(keys):
                search = PagedSearch(self.archive, ("studies",), wording, STUDY_FIELDS)
                if search.sent in asked:  # all that it found was compared with the whole query
                    break
                found = 0
                for study in self._studies_of(search, keys):
                    found += 1
                    uid, number = str(study["StudyInstanceUID"]), text(study.get("AccessionNumber"))
                    if uid not in seen or numbers.is_another(uid, number):
                        seen.add(uid)
                        numbers.show(uid, number)
                        yield study
                asked.add(search.sent)
                if found:
                    break

    def _studies_of(self, search: PagedSearch, keys: Keys) -> Iterator[dict[str, Any]]:
        try:
            yield from self._passed(search, "StudyInstanceUID", self._study_tests, keys)
        except NotFound:  # what some servers say where nothing matches
            if not (search.sent and self._has_studies()):
                raise

    def _has_studies(self) -> bool:
        """Return whether the server shows any study: then it can be searched."""
        if self._there is None:
            try:
                self._there = bool(PagedSearch(self.archive, ("studies",)).page(1, 0).rows)
            except (NotFound, Misconfigured):
                self._there = False
        return self._there

    def _passed(
        self, search: PagedSearch, uid: str, tests: Iterable[tuple[str, Test]], keys: Keys = ()
    ) -> Iterator[dict[str, Any]]:
        """Yield the results of a search that pass all tests, as values by keyword.

        Args:
            keys: those of the search as the query has them: in this form the server's own match counts.
        """
        given: set[str] = set()  # keywords that the server answers
        open_: list[tuple[dict[str, Any], list[tuple[str, Test]]]] = []
        for found in search:
            values = keyworded(found)
            given.update(values)
            failed = [(keyword, test) for keyword, test in tests if not test(text(values.get(keyword)))]
            if not failed:
                yield values
            elif not any(keyword in values for keyword, _ in failed):
                open_.append((values, failed))
            elif self._shows_less(values, failed):
                yield from self._as_stored(search, values, failed)
        for values, failed in open_:
            if any(keyword in given for keyword, _ in failed):
                continue  # it answers that of others, so this one has no value
            sent = [key for key, value in search.sent if (key, value) in keys and not has_wild_cards(value)]
            trusted = [keyword for keyword in sent if keyword not in CASED]
            if all(keyword in trusted and self._matches(search.segments, keyword) for keyword, _ in failed):
                yield values
                continue
            below = self._below(search.segments, str(values.get(uid, "")))
            if below is None:
                below = self._by_key(search, str(values.get(uid, "")), [keyword for keyword, _ in failed])
            if all(test(text(below.get(keyword))) for keyword, test in failed):
                yield values | {keyword: below.get(keyword, "") for keyword, _ in failed}

    def _wordings(self, keys: Keys) -> Iterator[Keys]:
        """Yield searches that together miss nothing; each is made only if those before it found nothing.

        Names are looked for with wild cards, as servers don't agree on what stands between and behind their parts.
        The second is for servers that don't decode what a URL can't hold (Orthanc's plugin 1.7), the others are for
        those that take a wild card for a letter.
        """
        first = tuple((key, _LOOSENED.get(key, str)(value)) for key, value in keys)
        yield first
        loose = tuple((key, _loose(value)) for key, value in first)
        if loose != first:
            yield loose
        wild = [key for key, value in keys if has_wild_cards(value) and not self._takes_wild_cards(key)]
        keys = tuple((key, value) for key, value in keys if key not in wild)
        name = dict(keys).get("PatientName", "")
        if name and not self._takes_wild_cards("PatientName"):
            others = tuple((key, value) for key, value in keys if key != "PatientName")
            for count in range(NAME_TRIES):
                yield (*others, ("PatientName", name.rstrip("^ ") + "^" * count))
        elif wild:
            yield keys

    def _takes_wild_cards(self, key: str) -> bool:
        """Return True if `*` alone finds something: a server that takes it for a letter finds nothing."""
        if key not in self._stars:
            try:
                found = PagedSearch(self.archive, ("studies",), ((key, "*"),)).page(1, 0)
                self._stars[key] = bool(found.rows)
            except NotFound:
                self._stars[key] = False
        return self._stars[key]

    def _matches(self, segments: tuple[str, ...], key: str) -> bool:
        """Return True if a value that nothing has finds nothing: a server that ignores the key finds something."""
        known = (segments[-1], key)
        if known not in self._matched:
            search = PagedSearch(self.archive, segments, ((key, NO_DATE if key == DATE else NO_VALUE),))
            try:
                self._matched[known] = not search.page(1, 0).rows and bool(search.sent)
            except NotFound:
                self._matched[known] = True
        return self._matched[known]

    def _study_keys(self) -> Iterator[Keys]:
        """Yield the searches that together find every study of the query: one value of each key that is a list."""
        query = self.query
        for values in (query.AccessionNumber, query.StudyDescription, query.SeriesDescription):
            if values and not any(value.strip() for value in values):
                return  # blanks match nothing: not worth a list of all that there is
        common = [
            (keyword, value.strip())
            for keyword, value in (
                ("PatientID", query.PatientID),
                ("PatientName", query.PatientName.strip().rstrip("^ =")),
                ("StudyDate", query.StudyDate.strip() and in_days(query.StudyDate)),
            )
            if value.strip() and not is_universal(value)
        ]
        modalities = listed(query.Modality)
        if len(modalities) == 1 and not is_universal(modalities[0]):
            common.append(("ModalitiesInStudy", modalities[0].upper()))  # as all code strings are (PS3.5 section 6.2)
        studies = listed(query.StudyInstanceUID)
        if not studies and query.SeriesInstanceUID.strip():
            known = self._studies_of_series(listed(query.SeriesInstanceUID))
            if known is not None and not known:
                return
            studies = known or []
        lists = [
            [("AccessionNumber", value.strip()) for value in dict.fromkeys(query.AccessionNumber) if value.strip()],
            [("StudyInstanceUID", value) for value in studies],
        ]
        if all(lists) and len(lists[0]) > 1:
            lists = lists[1:]  # each is narrow enough; what it finds is compared with the other
        if not any(lists):  # else the search is narrow enough
            lists.append([("StudyDescription", value.strip()) for value in query.StudyDescription if value.strip()])
        for choice in itertools.product(*(values for values in lists if values)):
            yield (*common, *choice)

    def _studies_of_series(self, series: list[str]) -> list[str] | None:
        """Return the studies that series belong to; None if the server can't search for series without their study.

        Where it finds nothing, a series that it has shows whether it can.
        """
        try:
            found = [uid for one in series for uid in self._studies_of_one(one)]
            if found:
                return list(dict.fromkeys(found))
            some = PagedSearch(self.archive, ("series",)).page(1, 0).rows
            return [] if some and self._studies_of_one(dicomjson.text(some[0], SERIES_UID)) else None
        except (Misconfigured, NotFound):
            return None

    def _studies_of_one(self, uid: str) -> list[str]:
        rows = PagedSearch(self.archive, ("series",), (("SeriesInstanceUID", uid),))
        found = [dicomjson.text(row, STUDY_UID) for row in rows if dicomjson.text(row, SERIES_UID) == uid]
        return [study for study in found if study]

    # ---- series

    def series_of(self, study: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield the series of a study that match, as values by keyword."""
        uid = str(study["StudyInstanceUID"])
        expected = count(study.get("NumberOfStudyRelatedSeries"))
        segments = ("studies", uid, "series")
        search = PagedSearch(self.archive, segments, (), SERIES_FIELDS, expected, self._series_of_instances(uid))
        try:
            yield from self._passed(search, "SeriesInstanceUID", self._series_tests)
        except NotFound:  # what some servers say where there is none
            return

    def _series_of_instances(self, study: str) -> Callable[[DispatchError | None], list[Attributes]]:
        """Return what reads the series of a study in the metadata of its instances."""

        def read(error: DispatchError | None) -> list[Attributes]:
            try:
                found = self.archive.client.metadata(study)
            except (NotFound, Misconfigured, RequestRefused):
                if error:
                    raise error from None
                return []
            every: dict[str, list[Attributes]] = {}
            for one in found:
                every.setdefault(dicomjson.text(one, SERIES_UID), []).append(one)
            return [some[0] | {INSTANCES: {"vr": "IS", "Value": [len(some)]}} for some in every.values()]

        return read

    def has_series(self, study: dict[str, Any]) -> bool:
        """Return True if one series of a study passes all tests that the query has for series."""
        tests = dict(self._series_tests)
        if not tests:
            return True
        modalities = study.get("ModalitiesInStudy")
        if set(tests) == {"Modality"} and modalities:
            return any(
                tests["Modality"](str(one)) for one in ([modalities] if isinstance(modalities, str) else modalities)
            )
        return next(self.series_of(study), None) is not None

    # ---- what an answer lacks

    def _shows_less(self, values: dict[str, Any], failed: Iterable[tuple[str, Test]]) -> bool:
        """Return True if letters that a result can't show may be all that it lacks (Orthanc leaves them out)."""
        charset = text(values.get("SpecificCharacterSet"))
        return all(
            may_be(keyword, self._wanted.get(keyword, ()), text(values.get(keyword)), charset) for keyword, _ in failed
        )

    def _as_stored(
        self, search: PagedSearch, values: dict[str, Any], failed: list[tuple[str, Test]]
    ) -> Iterator[dict[str, Any]]:
        """Yield a result with the values of one of its instances, if these match.

        Raises:
            Misconfigured: the server shows none, or there are too many of such results.
        """
        uid = str(values.get(_LEVELS[len(search.segments) // 2][1], ""))
        if any(self._has_no_more(uid, keyword, text(values.get(keyword))) for keyword, _ in failed):
            return
        self._read += 1
        below = self._below(search.segments, uid) if self._read <= MOST_READ else None
        keywords = [keyword for keyword, _ in failed]
        if below is None:
            service = self.archive.service
            raise Misconfigured(
                f"{service.where}{service.path(service.qido, *search.segments)}: the server shows "
                f"{', '.join(keywords)} without some letters: narrow the query, by date for instance"
            )
        if all(test(text(below.get(keyword))) for keyword, test in failed):
            yield values | {keyword: below[keyword] for keyword in keywords}

    def _has_no_more(self, uid: str, keyword: str, shown: str) -> bool:
        """Return True if the server finds a study by the number of letters that it shows: then there are no others."""
        if not any(is_hazy(keyword, value) for value in self._wanted[keyword]) or not shape(shown).strip("^="):
            return False

        def finds(pattern: str) -> bool:
            keys = (("StudyInstanceUID", uid), (keyword, pattern))
            rows = PagedSearch(self.archive, ("studies",), keys).page(1, 0).rows
            return any(dicomjson.text(row, STUDY_UID) == uid for row in rows)

        try:
            return finds(shape(shown)) and not finds(f"?{shape(shown)}")
        except (NotFound, Misconfigured, RequestRefused):
            return False

    def _below(self, segments: tuple[str, ...], uid: str) -> dict[str, Any] | None:
        """Return the values of one instance of a study or series; None if the server doesn't show any."""
        uids = [*segments[1::2], uid]
        try:
            for level, keyword in _LEVELS[len(uids) :]:
                above = [part for pair in zip(("studies", "series"), uids, strict=False) for part in pair]
                rows = PagedSearch(self.archive, (*above, level)).page(1, 0).rows
                uids.append(str(keyworded(rows[0]).get(keyword, "")) if rows else "")
                if not uids[-1]:
                    return None
            found = self.archive.client.metadata(*uids)
        except (NotFound, Misconfigured, RequestRefused):
            return None
        return keyworded(found[0]) if found else None

    def _by_key(self, search: PagedSearch, uid: str, keywords: list[str]) -> dict[str, Any]:
        """Return the query's values by which the server finds a result, if it shows the values nowhere.

        Raises:
            Misconfigured: it doesn't match them either.
        """
        found: dict[str, Any] = {}
        for keyword in keywords:
            values = getattr(self.query, keyword)
            hazy = isinstance(values, str) or any(map(has_wild_cards, values))
            if hazy or not self._matches(search.segments, keyword):
                service = self.archive.service
                raise Misconfigured(
                    f"{service.where}{service.path(service.qido, *search.segments)}: the server neither matches nor "
                    f"shows {keyword}: leave it out of the query"
                )
            for value in values:
                rows = PagedSearch(self.archive, search.segments, ((keyword, value.strip()),))
                if any(keyworded(row).get(_LEVELS[len(search.segments) // 2][1]) == uid for row in rows):
                    found[keyword] = value
        return found


def _loose(value: str) -> str:
    return _ENCODED.sub("*", value)


def _loose_name(value: str) -> str:
    """Return a pattern that finds all that a name, or a pattern of names, matches, whatever follows its parts."""
    return re.sub(r"\*+", "*", _any_sign(_loose(value)) + "*")


def _any_sign(value: str) -> str:
    """Return a pattern without `?`: servers that drop letters beyond ASCII (Orthanc) don't find one there."""
    return value.replace("?", "*")


_LOOSENED: dict[str, Callable[[str], str]] = {"PatientName": _loose_name, "PatientID": _any_sign}
