"""All results of one search by QIDO-RS (PS3.18 section 10.6): every page, and the proof that there are no more.

Servers cap a page below the limit that was asked for, send the first page again whatever the offset, or nothing
(Orthanc 1.10 with `ModalitiesInStudy`), refuse attributes and filters that they don't know, or ignore them. So after a
page of more than a few results the next one begins with its last result, which shows whether the server respects the
offset. If it doesn't, a larger page is requested; and if the server may hold results back, one of these must prove that
it doesn't, and where pages end with as many results as any search has had, for the server may count no further:

    an answer of this server, to any search of the level, that had more results; one that stands behind so many
    the count that it gave of them, or a count of all it has that is no larger; where all that it shows is one day's
    (and no more than so many series), identifiers that go on otherwise must bring nothing else
    searches that share the results out (by UID, by date), each answered with fewer

Otherwise the search ends with an error: an absence that isn't proven is not reported.
"""

from __future__ import annotations

import datetime
import string
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile

from imaging import json as dicomjson
from imaging.json import Attributes
from imaging.match import in_days
from protocols.dicomweb.client import DicomwebClient, Keys, Page, RequestRefused
from protocols.dicomweb.service import Service
from transfer.errors import Cancelled, DispatchError, Misconfigured, NotFound

PAGE = 200  # results; Azure refuses to give more at once
SMALL = 50  # results of a page, for servers that refuse so many as `PAGE`
LEAST = 5  # results, of all pages together, behind which a server may stop
FEW = 10  # results: no server's cap is lower, so the last one of so few needn't come again (it costs Orthanc 10 ms)
MOST = 200_000  # results that are asked for at once of a server that has no pages
SHARES = 600  # searches at most that share the results of one out
PAGING, FIELDS = "limit and offset", "includefield"
DATE = "StudyDate"
UID_TAGS = {"studies": "0020000D", "series": "0020000E", "instances": "00080018"}
UID_KEYS = {"studies": "StudyInstanceUID", "series": "SeriesInstanceUID", "instances": "SOPInstanceUID"}
IDENTIFIER_TAGS = {"PatientID": "00100020", "AccessionNumber": "00080050", "PatientName": "00100010"}
DATE_TAG = "00080020"
UID_SIGNS = ".0123456789"
ALPHANUMERIC = string.digits + string.ascii_uppercase
# What servers need not match on (PS3.18 table 10.6.1-5), or were seen to refuse, in this order.
_DOUBTFUL = (FIELDS, "StudyDescription", "ModalitiesInStudy", DATE, "PatientName", "PatientID")


class CutShort(Misconfigured):
    """The server may have more results than it gives."""


@dataclass
class Archive:
    """A server that is searched, and what has been found out about it; for all searches of one query, in one thread.

    Attributes:
        left_out: names of parameters that it refuses.
        closed: whether it takes only dates with both ends.
        page: the most results of a page that it lets us ask for, as far as is known.
        taken: the most that it has let us ask for.
        largest: by level, the most results that came in one answer.
        reached: by level, the most results of one search that are known to come, over all pages.
        tries, waits: as for `DicomwebClient`.
    """

    service: Service
    tries: int = 1
    waits: int = 0
    left_out: set[str] = field(default_factory=set)
    closed: bool = False
    page: int = MOST
    taken: int = 0
    largest: dict[str, int] = field(default_factory=dict)
    reached: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.client = DicomwebClient(self.service, self.tries, self.waits)


class PagedSearch:
    """One search.

    Args:
        expected: how many results there are, as far as the server has said so.
        otherwise: returns all results from elsewhere, where the server gives no more than some, or none.
    """

    def __init__(
        self,
        archive: Archive,
        segments: Sequence[str],
        keys: Keys = (),
        fields: Sequence[str] = (),
        expected: int | None = None,
        otherwise: Callable[[DispatchError | None], list[Attributes]] | None = None,
    ) -> None:
        self.archive, self.segments, self.keys, self.fields = archive, tuple(segments), keys, fields
        self.level = segments[-1]
        self.expected, self._otherwise = expected, otherwise
        self._seen: set[str] = set()
        self._undated = 0  # results without a study date

    def __iter__(self) -> Iterator[Attributes]:
        """Yield all results, each once.

        Raises:
            NotFound: the server has no such resource. Misconfigured: it may have more than it gives.
        """
        try:
            yield from self._proven()
        except (NotFound, Misconfigured) as exc:
            if self._otherwise is None:
                raise
            yield from self._fresh(self._otherwise(exc))
        if self._otherwise and not self._seen:
            yield from self._fresh(self._otherwise(None))

    def _proven(self) -> Iterator[Attributes]:
        limit = PAGE
        while (count := (yield from self._walk(limit))) is not None:
            if count < limit or limit >= MOST or not self.paged:
                yield from self._prove(count)
                return
            limit *= 10
        yield from self._look_beyond()

    @property
    def sent(self) -> Keys:
        """The keys that are sent: without those that the server refuses."""
        return tuple((key, self._date(value) if key == DATE else value) for key, value in self.keys if self._takes(key))

    @property
    def paged(self) -> bool:
        return self._takes(PAGING)

    def _takes(self, name: str) -> bool:
        return name not in self.archive.left_out

    def _date(self, value: str) -> str:
        if self.archive.closed and value[:1] == "-":
            return f"00010101{value}"
        return f"{value}99991231" if self.archive.closed and value[-1:] == "-" else value

    # ---- one page

    def page(self, limit: int, offset: int, extra: Keys = ()) -> Page:
        """Fetch a page, without the parameters that the server refuses."""
        try:
            found = self._ask(limit, offset, extra)
        except RequestRefused as exc:
            if offset or extra:
                raise
            found = self._learned(limit, exc)
        if found.rows and not any(map(self._uid, found.rows)):
            service = self.archive.service
            where = f"{service.where}{service.path(service.qido, *self.segments)}"
            raise Misconfigured(f"{where}: the server's answer has results, and none has a {UID_KEYS[self.level]}")
        largest = self.archive.largest
        largest[self.level] = max(largest.get(self.level, 0), len(found.rows))
        return found

    def _ask(self, limit: int, offset: int, extra: Keys = ()) -> Page:
        names = [key for key, _ in extra]
        keys = (*((key, value) for key, value in self.sent if key not in names), *extra)
        fields = self.fields if self._takes(FIELDS) else ()
        if not self.paged:
            return self.archive.client.search(self.segments, keys, fields)
        limit = min(limit, self.archive.page)
        page = self.archive.client.search(self.segments, keys, fields, limit=limit, offset=offset)
        self.archive.taken = max(limit, self.archive.taken)
        return page

    def _learned(self, limit: int, refusal: RequestRefused) -> Page:
        """Find out which parameters the server refuses, as it doesn't name them; return the first page without them.

        Raises:
            DispatchError: it refuses the search whatever is left out.
        """
        archive = self.archive
        present = [*([FIELDS] if self.fields else []), *(key for key, _ in self.keys)]
        doubtful = [name for name in _DOUBTFUL if name in present and name not in archive.left_out]
        doubtful += [name for name in present if name not in doubtful and name not in archive.left_out]
        doubtful += [PAGING] if self.paged else []
        if not archive.closed and any(key == DATE and "-" in (value[:1], value[-1:]) for key, value in self.keys):
            archive.closed = True
            if found := self._taken(limit):
                return found
            archive.closed = False
        if found := self._smaller(limit):
            return found
        for name in doubtful:  # most servers that refuse anything refuse one
            archive.left_out.add(name)
            if found := self._taken(limit):
                return found
            archive.left_out.discard(name)
        for at, name in enumerate(doubtful):
            archive.left_out.add(name)
            if at and (found := self._taken(limit)):
                for other in doubtful[:at]:
                    archive.left_out.discard(other)
                    if narrower := self._taken(limit):
                        found = narrower
                    else:
                        archive.left_out.add(other)
                return found
        archive.left_out.difference_update(doubtful)
        raise refusal.error from None

    def _smaller(self, limit: int) -> Page | None:
        """Return the first page if it is not refused in a smaller size."""
        archive, known = self.archive, self.archive.page
        for size in (archive.taken, SMALL):
            archive.page = size
            if self.paged and 0 < size < min(limit, known) and (found := self._taken(limit)):
                return found
        archive.page = known
        return None

    def _taken(self, limit: int) -> Page | None:
        """Return the first page; None if this form of the search is refused."""
        try:
            return self._ask(limit, 0)
        except RequestRefused:
            return None

    def _fresh(self, rows: list[Attributes]) -> Iterator[Attributes]:
        """Yield the results that have not been yielded before."""
        for row in rows:
            uid = self._uid(row)
            if uid and uid not in self._seen:
                self._seen.add(uid)
                self._undated += not dicomjson.text(row, DATE_TAG)
                yield row

    def _uid(self, row: Attributes) -> str:
        return dicomjson.text(row, UID_TAGS[self.level])

    # ---- one page after the other

    def _walk(self, limit: int) -> Generator[Attributes, None, int | None]:
        """Yield what pages bring; return None if that is all, else the largest number of results in one answer."""
        known = self.archive.largest.get(self.level, 0)
        page = self.page(limit, 0)
        count, first = len(page.rows), sorted(self._uid(row) for row in page.rows)
        yield from self._fresh(page.rows)
        if not page.more and (count == 0 or count < min(known, limit) or self._is_expected()):
            return None
        if not self.paged:
            return count
        end, size = count, count  # of all that came so far, and of the page before
        turned = False  # whether another page than the first has come
        few = FEW
        while True:
            offset = end if size < few else end - 1
            rows, more = self._beyond(limit, offset)
            before = len(self._seen)
            yield from self._fresh(rows)
            fresh = len(self._seen) - before
            if not rows:  # though the last one should have come again
                return None if offset == end and not page.more else count
            if sorted(self._uid(row) for row in rows) == first:
                if turned and not more:
                    return None
                if offset < end or size == 1:
                    return count
                few = 2  # it ignores the offset, or begins again behind the end
                continue
            if not fresh and not turned and count >= limit:
                return count  # a server that counts the offset within the limit
            turned = turned or fresh > 0
            short = len(rows) < min(limit, self.archive.largest[self.level]) or (len(rows) == 1 and not fresh)
            if short and not more:
                return None
            if not fresh and (end >= MOST or (more and offset + len(rows) <= end)):
                return count
            end, size = max(end + 1, offset + len(rows)), len(rows)

    def _beyond(self, limit: int, offset: int) -> tuple[list[Attributes], bool]:
        try:
            page = self.page(limit, offset)
        except (NotFound, RequestRefused):  # what some servers say to an offset beyond the last result, others to any
            return [], False
        return page.rows, page.more

    def _is_expected(self) -> bool:
        return self.expected is not None and len(self._seen) >= self.expected

    # ---- proof

    def _look_beyond(self) -> Iterator[Attributes]:
        """Yield what a server held back that counts no further than it did, if parts of the search bring it.

        Such a server (an Orthanc with `LimitFindResults`) has pages, and none behind its limit.

        Raises:
            Misconfigured: it does so, and no parts bring all.
        """
        total, reached = len(self._seen), self.archive.reached
        known = max(reached.get(self.level, 0), self.archive.largest.get(self.level, 0))
        reached[self.level] = max(total, reached.get(self.level, 0))
        if total < max(known, LEAST) or self._is_expected() or not self.paged:
            return
        all_of_them = not self.keys and len(self.segments) == 1
        if not all_of_them and self._everything(1, total):
            reached[self.level] = total + 1
            return
        split = self.level == "studies" and (yield from self._by_date(total))
        more = len(self._seen) > total
        whole = split and (not more or any(key == DATE for key, _ in self.sent))
        if not whole and not more:  # of what it shows at all, is there anything else?
            whole = all_of_them or all(self._uid(row) in self._seen for row in self._everything(total + 1, 0))
            if whole and (yield from self._by_identifier(total)):
                raise self._cut_short(total)
        if whole and not more:
            reached[self.level] = total + 1
        elif not (whole or (yield from self._by_uid(total))):
            raise self._cut_short(total, "; it gives all of a range of study dates" if split else "")

    def _everything(self, limit: int, offset: int, level: str = "") -> list[Attributes]:
        """Return results of a search for all that the server has of this, or another, level; none where it refuses."""
        try:
            return PagedSearch(self.archive, (level or self.level,)).page(limit, offset).rows
        except Cancelled:
            raise
        except (DispatchError, RequestRefused):
            return []

    def _prove(self, count: int) -> Iterator[Attributes]:
        """Yield what the server held back, if other searches bring it.

        Raises:
            Misconfigured: nothing shows that it holds nothing back.
        """
        if self._is_expected() or count < self.archive.largest.get(self.level, 0):
            return
        if self._is_all(count) or (yield from self._by_uid(count)):
            return
        before = len(self._seen)
        if self.level == "studies" and (yield from self._by_date(count)):
            dated = any(key == DATE for key, _ in self.sent)
            # Those without a date are in no share. Were any held back, it would be all of them, and nothing else.
            if dated or (before == len(self._seen) and not self._undated):
                return
            raise self._cut_short(count, "; it gives all of a range of study dates")
        if before != len(self._seen) or not (count <= 1 or self._is_fewer_than_below(count)):
            raise self._cut_short(count)

    def _is_all(self, count: int) -> bool:
        """Return True if a search for all that the server has gives more, or no more than that."""
        if not self.keys and len(self.segments) == 1:
            return False
        everything = PagedSearch(self.archive, (self.level,))
        try:
            if len(everything.page(count + 1, 0).rows) > count:
                return True
            rows = everything.page(count + 1, count - 1).rows if count > 1 and everything.paged else []
            return len(rows) == 1 and self._uid(rows[0]) in self._seen
        except Cancelled:
            raise
        except (DispatchError, RequestRefused):
            return False

    def _is_fewer_than_below(self, count: int) -> bool:
        """Return True if the server gives more series, or instances, at once than these results."""
        above = self.segments[:-1]
        for level in ("series", "instances"):
            if level == self.level or (level == "series" and self.level == "instances"):
                continue
            try:
                if len(PagedSearch(self.archive, (*above[:2], level)).page(count + 1, 0).rows) > count:
                    return True
            except Cancelled:
                raise
            except (DispatchError, RequestRefused):
                continue
        return False

    def _by_uid(self, count: int) -> Generator[Attributes, None, bool]:
        """Split the results by the beginnings of their UIDs; return True if that brought all of them.

        DICOM has no wild cards in UIDs, but some servers accept them, which the parts show.
        """
        key, came = UID_KEYS[self.level], set[str]()
        wanted = set(self._seen)
        if any(name == key for name, _ in self.sent):
            return False
        begins = ["0*", "1*", "2*"]  # PS3.5 section 9.1
        for _ in range(SHARES):
            if not begins:
                return wanted <= came
            begin = begins.pop()
            rows = self._share(count, (key, begin))
            uids = [self._uid(row) for row in rows or []]
            if rows is None or not all(uid.startswith(begin.rstrip("*")) for uid in uids):
                return False
            yield from self._fresh(rows)
            came.update(uids)
            if len(rows) >= count:
                if begin[-1:] != "*":
                    return False
                begins += [begin[:-1], *(f"{begin[:-1]}{sign}*" for sign in UID_SIGNS)]
        return False

    def _by_identifier(self, count: int) -> Generator[Attributes, None, bool]:
        """Ask for studies by how their identifiers may go on where those of the results differ; return True, once there
        is one more: a search for everything may end at the same limit.
        """
        if self.level != "studies" or self._everything(1, count, "series"):
            return False
        results = self._whole(count) or []
        for key, tag in IDENTIFIER_TAGS.items():
            values = {_value(row, tag) for row in results} - {""}
            if len(values) < 2 or any(name == key for name, _ in self.sent) or not self._takes(key):
                continue
            alike = takewhile(lambda pair: pair[0] == pair[1], zip(min(values), max(values), strict=False))
            begin = "".join(sign for sign, _ in alike)
            following = {value[len(begin) :][:1] for value in values}
            for sign in string.digits if "".join(following).isdigit() else ALPHANUMERIC:
                rows = self._share(count, (key, f"{begin}{sign}*"))
                if rows is None or not all(_begins(_value(row, tag), begin + sign) for row in rows):
                    break  # it takes no wild cards there, or looks at none
                before = len(self._seen)
                yield from self._fresh(rows)
                if len(self._seen) > before:
                    return True
        return False

    def _by_date(self, count: int) -> Generator[Attributes, None, bool]:
        """Split the results by study date; return True if that brought all that have one."""
        period = next((in_days(value) for key, value in self.sent if key == DATE), "-")
        first, _, last = period.partition("-")
        shares = [(first, last)] if "-" in period else []
        for _ in range(SHARES):
            if not shares:
                return "-" in period
            first, last = shares.pop()
            if first and last and first > last:
                continue
            wanted = f"{first}-{last}" if first != last else first
            rows = self._share(count, (DATE, self._date(wanted))) if wanted else self._whole(count)
            dates = sorted(dicomjson.text(row, DATE_TAG) for row in rows or [])
            if wanted:
                if rows is None or not all(date and first <= date <= (last or date) for date in dates):
                    return False
                yield from self._fresh(rows)
                if len(rows) < count:
                    continue
            dates = [date for date in dates if len(date) == 8 and date.isdigit()]
            if not dates or (first == last and first):
                return False
            middle = dates[len(dates) // 2]
            shares += [(first, _days_from(middle, -1)), (middle, middle), (_days_from(middle, 1), last)]
        return False

    def _whole(self, count: int) -> list[Attributes] | None:
        """Return the results of the unsplit search, which decide where the first cut is made."""
        try:
            return self.page(count, 0).rows
        except (NotFound, RequestRefused):
            return None

    def _share(self, count: int, key: tuple[str, str]) -> list[Attributes] | None:
        """Return the results of one part; None if the server refuses it or has more."""
        try:
            page = self.page(max(count + 1, PAGE), 0, (key,))
        except (NotFound, RequestRefused, Misconfigured):
            return None
        return None if page.more else page.rows

    def _cut_short(self, count: int, remedy: str = "") -> CutShort:
        service = self.archive.service
        path = service.path(service.qido, *self.segments)
        return CutShort(
            f"{service.where}{path}: the server gives {count} results at once, and may have more, but has no pages for "
            f"them: narrow the query{remedy}"
        )


def _value(row: Attributes, tag: str) -> str:
    """Return an identifier, or a name's first form."""
    value = next(iter(dicomjson.values(row, tag)), "")
    return str(value.get("Alphabetic", "") if isinstance(value, dict) else value).strip(" \0")


def _begins(value: str, begin: str) -> bool:
    return value.casefold().startswith(begin.casefold())


def _days_from(date: str, days: int) -> str:
    """Return the date so many days after another; one beyond the calendar where that ends or the date is not valid."""
    try:
        day = datetime.date(int(date[:4]), int(date[4:6]), int(date[6:])) + datetime.timedelta(days)
        return day.strftime("%Y%m%d").rjust(8, "0")
    except (ValueError, OverflowError):
        return f"{int(date) + days:08}"
