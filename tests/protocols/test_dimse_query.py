"""C-FIND against a scripted archive: whole answers, filtered here, in every character set."""

from __future__ import annotations

import re
import struct
from contextlib import AbstractContextManager
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset

from imaging.query import Match, Query
from protocols.dimse import identifier, parts, unsaid
from protocols.dimse.get import PATIENT_ROOT_GET, STUDY_ROOT_GET
from protocols.dimse.message import C_STORE_RQ, RELEASE_RQ_PDU
from protocols.dimse.query import finder
from protocols.dimse.search import PeerSearch
from protocols.dimse.transport import Peer
from protocols.dimse.whole import MOST_DOUBTED
from talaria.testing import studies
from tests.servers import wire
from tests.servers.qr import FIND, GET, Archive, Last, Request, archive
from tests.servers.steps import REFUSED_CLASS, Abort, Raw, Reset, Silence, Step
from transfer.errors import Busy, Cancelled, DispatchError, Interrupted, Misconfigured

STUDY_ROOT = "1.2.840.10008.5.1.4.1.2.2.1"
IDENTIFIERS = frozenset(("ModalitiesInStudy", "PatientID", "PatientName", "AccessionNumber"))


def found(peer: Archive, query: Query) -> list[Match]:
    with finder(Peer("127.0.0.1", peer.port, idle_timeout_s=5)) as asked:
        return list(PeerSearch(asked).find(query))


def files(count: int, **changes: object) -> list[bytes]:
    """Studies of one instance each; a callable value is called with the study's number."""
    return [
        studies.encoded(
            studies.dataset(
                **{"AccessionNumber": f"A{n:04}", "PatientID": f"{n:02}"}
                | {key: value(n) if callable(value) else value for key, value in changes.items()}  # type: ignore[arg-type]
            )
        )
        for n in range(count)
    ]


def accessions(matches: list[Match]) -> list[str]:
    return sorted(str(match.attributes["AccessionNumber"]) for match in matches)


def series(count: int, **changes: object) -> list[bytes]:
    """One study of so many series, of one instance each."""
    return files(count, StudyInstanceUID=studies.uid(), AccessionNumber="A", PatientID="P", **changes)


@pytest.mark.parametrize("limit", [1, 3, 7, 11])
def test_series_beyond_a_limit_that_a_peer_does_not_mention_are_found_by_number(limit: int) -> None:
    made = series(12, SeriesNumber=lambda n: n + 1)
    with archive(made, limit=limit) as peer:
        assert len(found(peer, Query(level="series"))) == 12
        assert len(found(peer, Query(level="series", Modality="CT"))) == 12


def test_series_beyond_a_limit_are_found_by_modality() -> None:
    made = series(12, SeriesNumber="", Modality=lambda n: ("CT", "MR", "PT", "US")[n % 4])
    with archive(made, limit=5) as peer:
        assert len(found(peer, Query(level="series"))) == 12
        assert len(peer.asked(FIND)) == 6  # studies, series, each modality


@pytest.mark.parametrize("odd", ["00000000", "20241301", "99991231", "2024.01.02"])
def test_a_date_that_is_none_costs_a_search_no_more_than_others(odd: str) -> None:
    made = files(9, StudyDate=lambda n: f"2024010{n + 1}" if n else odd)
    with archive(made) as peer:
        assert len(found(peer, Query())) == 9
        assert len(peer.asked(FIND)) == 3
        peer.limit = 7
        assert len(found(peer, Query(StudyDate="2023-2025"))) == 9 - (odd in ("00000000", "99991231"))


def test_a_uid_of_a_peer_that_is_none_is_an_error_in_words() -> None:
    with archive(files(2, StudyInstanceUID=lambda n: "\u00fc" if n else "1.2.3")) as peer:
        assert len(found(peer, Query())) == 2
        with pytest.raises(Misconfigured, match="has other letters than ASCII"):
            found(peer, Query(level="series"))


UNCOUNTED = frozenset(("NumberOfStudyRelatedSeries", "NumberOfStudyRelatedInstances"))


@pytest.mark.parametrize("limit", [5, 7, 11])
def test_series_beyond_a_limit_are_found_though_the_peer_counts_none(limit: int) -> None:
    made = [file for count in (limit, 12) for file in series(count, SeriesNumber=lambda n: n + 1)]
    with archive(made, limit=limit, leaves_out=UNCOUNTED) as peer:
        assert len(found(peer, Query(level="series"))) == limit + 12


def test_that_uncounted_series_are_all_is_asked_twice_for_as_many() -> None:
    made = [file for count in (6, 6, 4, 6) for file in series(count, SeriesNumber=lambda n: n + 1)]
    with archive(made, leaves_out=UNCOUNTED) as peer:
        assert len(found(peer, Query(level="series"))) == 22
        assert (
            len([one for one in peer.asked(FIND) if one.level == "SERIES"]) == 4 + 2 * 2
        )  # two numbers behind the last


@pytest.mark.parametrize("ignored", ["SeriesNumber", ""])
def test_series_that_a_peer_does_not_give_are_an_error(ignored: str) -> None:
    # All of one number, two of another: that shows the limit, and no key tells the others apart.
    made = series(14, SeriesNumber=lambda n: 7 if n < 12 else 9) if not ignored else series(12, SeriesNumber="1")
    with archive(made, limit=5, ignores=frozenset((ignored,))) as peer:
        with pytest.raises(Misconfigured, match=r"gives [57] series of a study and has more: it announces 1[24]"):
            found(peer, Query(level="series"))
        with pytest.raises(Misconfigured, match="has more"):
            found(peer, Query(SeriesDescription=("nowhere",)))


@pytest.mark.parametrize("count", [3, 5])
def test_series_that_are_announced_and_not_there_are_no_error_and_cost_little(count: int) -> None:
    made = [
        file for hour in range(10) for file in series(count, SeriesNumber=lambda n: n + 1, StudyTime=f"{hour:02}0000")
    ]
    with archive(made, announced_series=50) as peer:
        assert len(found(peer, Query(level="series"))) == 10 * count
        asked = len([one for one in peer.asked(FIND) if one.level == "SERIES"])
        # Three studies show that the counts are wrong, but where there are as many series as peers stop at.
        assert asked == 10 + 2 * (10 if count == 5 else 3)


@pytest.mark.parametrize("status", [0xA700, 0xFE00, 0x0000])
@pytest.mark.parametrize("limit", [5, 7])
def test_more_matches_than_a_peer_gives_are_asked_for_by_date(limit: int, status: int) -> None:
    days = [f"2024{month:02}{day:02}" for month in range(1, 6) for day in range(1, 9)]
    with archive(files(40, StudyDate=lambda n: days[n]), limit=limit, limit_status=status) as peer:
        assert len(found(peer, Query())) == 40
        assert len(found(peer, Query(StudyDate="20240101-20240131"))) == 8


@pytest.mark.parametrize("status", [0xA700, 0x0000])
def test_a_study_without_a_date_beyond_what_a_peer_gives_is_found(status: int) -> None:
    days = [f"2024{month:02}01" for month in range(1, 9)]
    made = files(9, StudyDate=lambda n: days[n] if n < 8 else "", PatientID=lambda n: "ABCDEFGHI"[n])
    with archive(made, limit=5, limit_status=status) as peer:
        assert len(found(peer, Query())) == 9
        assert len(found(peer, Query(StudyDate="2024-2024"))) == 8


@pytest.mark.parametrize("heeded", ["PatientID", "AccessionNumber", "PatientName"])
def test_studies_without_a_date_are_found_by_the_identifier_that_a_peer_looks_at(heeded: str) -> None:
    changes: dict[str, object] = {"StudyDate": lambda n: f"2024{n:02}01" if 0 < n < 9 else "", "PatientID": "P"}
    changes[heeded] = lambda n: "ABCDEFGHI#&("[n - 1]
    with archive(files(12, **changes)[1:], limit=5, limit_status=0xA700, ignores=IDENTIFIERS - {heeded}) as peer:
        assert len(found(peer, Query())) == 11


def test_a_study_without_date_and_patient_id_is_found_by_what_else_it_has() -> None:
    changes: dict[str, object] = {"StudyDate": lambda n: f"2024{n + 1:02}01" if n < 8 else ""}
    made = files(9, **changes, PatientID=lambda n: f"{n}" if n < 8 else "", AccessionNumber=lambda n: f"{n}")
    with archive(made, limit=5, limit_status=0xA700) as peer:
        assert len(found(peer, Query())) == 9


@pytest.mark.parametrize("status", [0xA700, 0x0000])
def test_where_studies_without_a_date_may_be_hidden_the_search_fails_and_asks_for_a_period(status: int) -> None:
    made = files(9, StudyDate=lambda n: f"2024{n + 1:02}01" if n < 8 else "")

    def refuses(request: Request) -> int:
        return 0xA900 if "*" in str(request.keys) else 0

    for settings_ in ({"ignores": IDENTIFIERS}, {"refuses": refuses}):
        with archive(made, limit=5, limit_status=status, **settings_) as peer:
            with pytest.raises(Misconfigured, match="without a date can't be found out: give a study date"):
                found(peer, Query())
            assert len(found(peer, Query(StudyDate="2024-"))) == 8


def test_studies_without_a_date_of_one_patient_are_found_by_uid_where_nothing_else_tells_them_apart() -> None:
    changes: dict[str, object] = {"PatientID": "P", "AccessionNumber": "", "PatientName": "N"}
    changes["StudyInstanceUID"] = lambda n: f"1.{n % 3}.{n}"
    made = files(14, StudyDate=lambda n: f"2024{n + 1:02}01" if n < 6 else "", **changes)
    with archive(made, limit=5, limit_status=0xA700, wild_uids=True) as peer:
        assert len(found(peer, Query())) == 14


def test_a_peer_that_reads_wild_cards_as_letters_is_not_taken_to_have_no_study_without_a_date() -> None:
    def as_it_is(keys: Dataset) -> None:
        for key in IDENTIFIERS - {"ModalitiesInStudy"}:
            if "*" in str(keys.get(key, "")):
                setattr(keys, key, "no such thing")

    made = files(9, StudyDate=lambda n: f"2024{n + 1:02}01" if n < 8 else "")
    with archive(made, limit=5, limit_status=0xA700, misreads=as_it_is) as peer:
        with pytest.raises(Misconfigured, match="without a date can't be found out: give a study date"):
            found(peer, Query())
        assert len(found(peer, Query(StudyDate="2024-"))) == 8


def test_rare_modalities_are_not_lost_where_a_search_is_split_by_modality() -> None:
    changes: dict[str, object] = {"StudyDate": "20240101", "StudyTime": "120000", "PatientID": "P"}
    changes["Modality"] = lambda n: "HC" if n > 7 else ("CT", "MR")[n % 2]
    ignored = IDENTIFIERS - {"ModalitiesInStudy"}
    with archive(files(10, **changes), limit=5, limit_status=0xA700, ignores=ignored) as peer:
        assert len(found(peer, Query(StudyDate="2024-"))) == 10


@pytest.mark.parametrize("key", ["StudyTime", "Modality", "PatientID"])
def test_more_matches_of_one_day_than_a_peer_gives_are_asked_for_by_what_else_there_is(key: str) -> None:
    changes: dict[str, object] = {"StudyDate": "20240101", "PatientID": "P1"}
    changes[key] = {
        "StudyTime": lambda n: f"{n:02}0000",
        "Modality": lambda n: ("CT", "MR", "US", "CR")[n % 4],
        "PatientID": lambda n: f"{n:02}",
    }[key]
    ignored = {"StudyTime", "ModalitiesInStudy", "PatientID", "PatientName", "AccessionNumber"} - {
        "ModalitiesInStudy" if key == "Modality" else key
    }
    with archive(files(20, **changes), limit=5, limit_status=0xA700, ignores=frozenset(ignored)) as peer:
        assert len(found(peer, Query(StudyDate="2024-"))) == 20


@pytest.mark.parametrize("limit", [5, 7])
def test_matches_beyond_a_limit_that_a_peer_does_not_mention_are_found_though_its_first_are_of_one_day(
    limit: int,
) -> None:
    made = files(12, StudyDate=lambda n: f"202401{max(n, 8) + 1:02}", StudyTime=lambda n: f"{n:02}0000")
    with archive(made, limit=limit) as peer:
        assert len(found(peer, Query(StudyDate="20240101-20240131"))) == 12


@pytest.mark.parametrize("limit", [5, 7])
@pytest.mark.parametrize("query", [Query(StudyDate="20240101"), Query(PatientID="P")])
def test_matches_of_one_day_beyond_a_limit_that_a_peer_does_not_mention_are_found_by_time(
    limit: int, query: Query
) -> None:
    made = files(12, StudyDate="20240101", PatientID="P", StudyTime=lambda n: f"{n:02}0000")
    with archive(made, limit=limit) as peer:
        assert len(found(peer, query)) == 12


@pytest.mark.parametrize("limit", [5, 7])
@pytest.mark.parametrize(("key", "day"), [("Modality", "20240101"), ("PatientID", "20240101"), ("PatientID", "")])
def test_matches_of_one_time_beyond_a_limit_are_found_by_what_else_there_is(key: str, day: str, limit: int) -> None:
    changes: dict[str, object] = {"StudyDate": day, "StudyTime": "120000" if day else "", "PatientID": "P"}
    changes[key] = (lambda n: ("CT", "MR", "US", "CR")[n % 4]) if key == "Modality" else lambda n: f"{n:02}"
    ignored = IDENTIFIERS - {"ModalitiesInStudy" if key == "Modality" else key}
    with archive(files(12, **changes), limit=limit, ignores=ignored) as peer:
        assert len(found(peer, Query(StudyDate=day))) == 12


def test_matches_beyond_a_limit_are_found_by_uid_where_nothing_else_tells_them_apart() -> None:
    changes = {"StudyTime": "120000", "PatientID": "P", "AccessionNumber": "A", "PatientName": "N"}
    made = files(12, StudyDate="20240101", StudyInstanceUID=lambda n: f"1.2.840.{n % 5}.{n}", **changes)
    with archive(made, limit=7, limit_status=0xA700, wild_uids=True) as peer:
        assert len(found(peer, Query(StudyDate="20240101"))) == 12


@pytest.mark.parametrize("limit", [5, 7])
def test_matches_beyond_a_limit_are_found_though_the_peer_looks_at_no_dates(limit: int) -> None:
    made = files(12, StudyDate=lambda n: f"202401{n % 3 + 1:02}", StudyTime="")
    with archive(made, limit=limit, ignores=frozenset(("StudyDate",))) as peer:
        assert len(found(peer, Query())) == 12
        assert len(found(peer, Query(StudyDate="20240101-20240102"))) == 8


def test_matches_beyond_a_limit_are_found_where_only_a_day_in_the_middle_has_more() -> None:
    days = ["20240101", "20240103", *(["20240102"] * 10)]
    with archive(files(12, StudyDate=lambda n: days[n], StudyTime=lambda n: f"{n:02}"), limit=7) as peer:
        assert len(found(peer, Query(StudyDate="2024-"))) == 12


def test_matches_that_nothing_tells_apart_cost_little_where_the_peer_gives_more_for_the_days_around() -> None:
    made = files(17, StudyDate=lambda n: "20240101" if n < 7 else "20240102", StudyTime="")
    with archive(made) as peer:
        assert len(found(peer, Query(StudyDate="20240101"))) == 7
        assert len(peer.asked(FIND)) == 2


def test_matches_that_nothing_tells_apart_are_an_error_where_the_peer_was_seen_to_stop_at_as_many() -> None:
    changes = {"StudyTime": "120000", "PatientID": "P", "AccessionNumber": "A", "PatientName": "N"}
    made = files(12, StudyDate=lambda n: "20240101" if n < 8 else "20240102", **changes)
    with archive(made, limit=7) as peer, pytest.raises(Misconfigured, match="gives 7 answers and has more"):
        found(peer, Query(StudyDate="2024-"))


def test_as_many_matches_of_one_time_as_a_usual_limit_are_no_error() -> None:
    with archive(files(5, StudyDate="20240101", StudyTime="120000"), ignores=IDENTIFIERS) as peer:
        assert len(found(peer, Query(StudyDate="20240101"))) == 5
        assert len(peer.asked(FIND)) < 60
    alike = files(5, StudyDate="20240101", StudyTime="120000", PatientID="P", AccessionNumber="A", PatientName="N")
    with archive(alike) as peer:
        assert len(found(peer, Query(StudyDate="20240101"))) == 5
        assert len(peer.asked(FIND)) < MOST_DOUBTED + 200
    with archive(files(5, StudyDate="20240101", StudyTime=lambda n: f"{n + 8:02}0000")) as peer:
        assert len(found(peer, Query(StudyDate="20240101"))) == 5
        assert len(peer.asked(FIND)) < 12


def test_times_between_two_seconds_are_in_one_half() -> None:
    """Halving 10:00:00 to 10:00:01 leaves nothing between the halves."""
    times = [f"1000{second:02}.{part}" for second in range(10) for part in ("0", "5", "999999")]
    changes: dict[str, object] = {"StudyDate": "20240101", "StudyTime": lambda n: times[n], "PatientID": "P"}
    with archive(files(30, **changes), limit=5, limit_status=0xA700, ignores=IDENTIFIERS) as peer:
        assert len(found(peer, Query(StudyDate="2024-"))) == 30


def test_dates_of_other_centuries_are_in_one_half() -> None:
    days = [f"{year}0101" for year in (*range(1795, 1810), *range(2190, 2205))]
    with archive(files(30, StudyDate=lambda n: days[n]), limit=4, limit_status=0xA700) as peer:
        assert len(found(peer, Query())) == 30


def test_a_peer_that_refuses_open_periods_is_asked_for_closed_ones() -> None:
    days = [f"{year}0101" for year in range(1890, 1920)]

    def refuses(request: Request) -> int:
        period = str(request.keys.get("StudyDate", ""))
        return 0xA900 if period[:1] == "-" or period[-1:] == "-" else 0

    with archive(files(30, StudyDate=lambda n: days[n]), limit=4, limit_status=0xA700, refuses=refuses) as peer:
        assert len(found(peer, Query())) == 30


@settings(max_examples=300)
@given(
    found=st.lists(st.dates().map(lambda day: f"{day.year:04}{day:%m%d}"), max_size=4),
    day=st.dates().map(lambda day: f"{day.year:04}{day:%m%d}"),
    period=st.sampled_from(["", "-", "-19000101", "18991231-", "19500101-20101231", "00010101-00010102"]),
)
def test_halves_of_a_period_hold_every_day_of_it(found: list[str], day: str, period: str) -> None:
    keys = {"StudyDate": period} if period not in ("", "-") else {}
    for splitter in (parts.by_date, parts.by_closed_date):
        made = [one["StudyDate"] for one in splitter(keys, [{"StudyDate": each} for each in found])]
        if made and _within(day, period or "-"):
            assert any(_within(day, one) for one in made)


@settings(max_examples=300)
@given(
    second=st.integers(0, 86_399),
    fraction=st.sampled_from(["", ".5", ".000001", ".999999"]),
    cut=st.sampled_from([2, 4, 6]),
    depth=st.integers(1, 20),
)
def test_halves_of_a_day_hold_every_time_of_it(second: int, fraction: str, cut: int, depth: int) -> None:
    """As the standard compares them, and as text: what is cut short stands for the full hour or minute."""
    clock = f"{second // 3600:02}{second // 60 % 60:02}{second % 60:02}"
    value = clock + fraction if cut == 6 else clock[:cut]
    keys = {"StudyDate": "20240101"}
    for _ in range(depth):
        made = parts.by_time(keys, [{"StudyTime": value}])
        if not made:
            break
        as_text = [one for one in made if _within(value, one["StudyTime"])]
        assert as_text
        keys = as_text[-1]


def _within(value: str, period: str) -> bool:
    low, dash, high = period.partition("-")
    return value == low if not dash else (not low or low <= value) and (not high or value <= high)


def test_a_single_wild_card_is_matched_here() -> None:
    """To Orthanc a ? is one byte, and so it misses letters of two."""
    names = ["Müller^A", "Muller^B", "Mueller^C", "Møller^D"]
    data = files(4, PatientName=lambda n: names[n], SpecificCharacterSet="ISO_IR 192")
    with archive(data) as peer:
        peer.refuses = lambda request: 0xC000 if "?" in str(request.keys.get("PatientName", "")) else 0
        assert accessions(found(peer, Query(PatientName="M?ller*"))) == ["A0000", "A0001", "A0003"]
    with archive(data, leaves_out=frozenset(("PatientName",))) as peer, pytest.raises(Misconfigured):
        found(peer, Query(PatientName="M?ller*"))


def test_what_cannot_be_split_is_an_error_that_says_so() -> None:
    alike = files(12, StudyDate="20240101", StudyTime="120000", PatientID="P", AccessionNumber="A", PatientName="N")
    with archive(alike, limit=5, limit_status=0xA700) as peer, pytest.raises(DispatchError, match="gives 5 answers"):
        found(peer, Query())


def test_an_archive_without_room_is_busy() -> None:
    with archive(files(2), refuses=lambda request: 0xA700) as peer, pytest.raises(Busy):
        found(peer, Query())


def test_keys_that_a_peer_ignores_are_matched_here() -> None:
    ignored = frozenset(("PatientID", "StudyDate", "ModalitiesInStudy", "StudyDescription", "AccessionNumber"))
    data = files(6, StudyDescription=lambda n: "Thorax" if n % 2 else "Kopf", StudyDate=lambda n: f"202401{n + 1:02}")
    with archive(data, ignores=ignored) as peer:
        assert accessions(found(peer, Query(PatientID="03"))) == ["A0003"]
        assert accessions(found(peer, Query(StudyDate="20240103-20240104"))) == ["A0002", "A0003"]
        assert accessions(found(peer, Query(StudyDescription=("Thorax",)))) == ["A0001", "A0003", "A0005"]
        assert accessions(found(peer, Query(AccessionNumber=("A0001", "A0004")))) == ["A0001", "A0004"]


def no_get(context: wire.Context) -> str | int:
    return REFUSED_CLASS if context.abstract_syntax in (STUDY_ROOT_GET, PATIENT_ROOT_GET) else context.offered[0]


def described() -> list[bytes]:
    """Four studies of one series each, of which half are said to be of the thorax; one series has no description."""
    series = ("T1", "T2 axial", "", "T1")
    return files(4, StudyDescription=lambda n: "Thorax" if n % 2 else "Kopf", SeriesDescription=lambda n: series[n])


@pytest.mark.parametrize("way", ["leaves_out", "blanks"])
def test_descriptions_that_answers_lack_are_read_in_an_instance(way: str) -> None:
    with archive(described(), ignores=frozenset(unsaid.DESCRIPTIONS), **{way: frozenset(unsaid.DESCRIPTIONS)}) as peer:
        matches = found(peer, Query(SeriesDescription=("T1", "T3"), level="series"))
        assert accessions(matches) == ["A0000", "A0003"]
        assert {one.attributes["SeriesDescription"] for one in matches} == {"T1"}
        assert {one.note for one in matches} == {"the peer doesn't show SeriesDescription: it was read in an instance"}
        assert len(peer.asked(GET)) == 4 and {one.level for one in peer.asked(GET)} == {"IMAGE"}
        assert accessions(found(peer, Query(SeriesDescription=("T2 axial",)))) == ["A0001"]
        assert accessions(found(peer, Query(StudyDescription=("Thorax",)))) == ["A0001", "A0003"]
        both = Query(StudyDescription=("Thorax",), SeriesDescription=("T1",), AccessionNumber=("A0000", "A0003"))
        assert accessions(found(peer, both)) == ["A0003"]
        assert not found(peer, Query(SeriesDescription=("t1",), StudyDescription=("Thorax",)))
        before = len(peer.asked(GET))
        assert not found(peer, Query(SeriesDescription=("T1",), Modality="MR", AccessionNumber=("A0000",)))
        assert not found(peer, Query(StudyDescription=("Kopf",), StudyDate="19000101"))
        assert len(peer.asked(GET)) == before  # what another key leaves out need not be read
        assert peer.most_open == 1  # the peer may allow one association, and a target one at a time
        assert len(found(peer, Query(level="series"))) == 4


def test_descriptions_that_are_empty_where_others_are_shown_are_not_looked_for() -> None:
    with archive(described()) as peer:
        assert accessions(found(peer, Query(SeriesDescription=("T1",), level="series"))) == ["A0000", "A0003"]
        assert not peer.asked(GET)


def test_some_instances_without_description_show_that_empty_ones_are_empty() -> None:
    with archive(series(30, SeriesDescription="")) as peer:
        assert not found(peer, Query(SeriesDescription=("T1",)))
        assert len(peer.asked(GET)) == unsaid.AT_ONCE


def test_a_few_series_without_description_in_one_study_say_nothing_of_the_next() -> None:
    first = series(3, SeriesDescription="")
    with archive([*first, *files(2, SeriesDescription="T1")], blanks=frozenset(("SeriesDescription",))) as peer:
        assert accessions(found(peer, Query(SeriesDescription=("T1",)))) == ["A0000", "A0001"]


def test_a_filter_on_what_neither_answers_nor_instances_show_is_an_error_not_nothing_found() -> None:
    lacking = frozenset(unsaid.DESCRIPTIONS)
    with archive(files(2, StudyDescription="Kopf"), leaves_out=lacking, accept=no_get) as peer:
        with pytest.raises(Misconfigured, match="have no SeriesDescription, and it gives no instance to read it in"):
            found(peer, Query(SeriesDescription=("x",), level="series"))
        assert len(found(peer, Query(level="series"))) == 2
        # What it is asked to match, and does not show, it is trusted with.
        assert len(found(peer, Query(StudyDescription=("Kopf",)))) == 2
        assert not found(peer, Query(StudyDescription=("Thorax",)))


def test_more_instances_than_can_be_read_for_a_filter_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unsaid, "MOST_READ", 3)
    with archive(described(), leaves_out=frozenset(("SeriesDescription",))) as peer:
        with pytest.raises(Misconfigured, match="more than 3 instances would have to be read for it: narrow the query"):
            found(peer, Query(SeriesDescription=("T1",), AccessionNumber=("A0000", "A0001", "A0002", "A0003")))
        assert accessions(found(peer, Query(SeriesDescription=("T1",), AccessionNumber=("A0000", "A0001")))) == [
            "A0000"
        ]


def test_a_series_that_is_nowhere_costs_a_few_queries() -> None:
    with archive(made := files(60)) as peer:
        assert found(peer, Query(SeriesInstanceUID="1.2.3")) == []
        assert len(peer.asked(FIND)) < 12
        # Where a date narrows it, too.
        assert found(peer, Query(SeriesInstanceUID="1.2.3", StudyDate=studies.STUDY_DATE)) == []
        some = [str(one.ds.SeriesInstanceUID) for one in peer.instances[:2]]
        assert len(found(peer, Query(SeriesInstanceUID=",".join((*some, "1.2.3"))))) == 2

    def within_studies(keys: Dataset) -> None:
        if keys.QueryRetrieveLevel == "SERIES" and not keys.get("StudyInstanceUID"):
            keys.SeriesInstanceUID = "0"

    # One that finds series within their study only, or whatever it is asked for, shows that by one that it has.
    for odd in ({"misreads": within_studies}, {"ignores": frozenset(("SeriesInstanceUID",)), "limit": 10}):
        with archive(made[:12], **odd) as peer:
            last = str(peer.instances[-1].ds.SeriesInstanceUID)
            assert len(found(peer, Query(SeriesInstanceUID=last))) == 1


def test_counts_that_answers_lack_are_not_known() -> None:
    lacking = frozenset(("NumberOfStudyRelatedInstances", "NumberOfSeriesRelatedInstances", "ModalitiesInStudy"))
    with archive(files(2), leaves_out=lacking) as peer:
        assert [match.instances for match in found(peer, Query(Modality="CT"))] == [None, None]


def test_answers_without_uids_are_an_error() -> None:
    lacking = frozenset(("StudyInstanceUID",))
    with archive(files(1), leaves_out=lacking) as peer, pytest.raises(Misconfigured, match="without Study Instance"):
        found(peer, Query())


def test_a_list_of_accession_numbers_is_found_whether_or_not_the_peer_takes_lists_or_wild_cards() -> None:
    wanted = (*(f"A{n:04}" for n in range(0, 60, 2)), "NONE1", "NONE2")

    def has(request: Request, signs: str) -> bool:
        value = str(request.keys.get("AccessionNumber", ""))
        return any(sign in value for sign in signs)

    with archive(files(60)) as peer:  # matches a list as one value: "success, nothing", as dcmqrscp does
        assert accessions(found(peer, Query(AccessionNumber=wanted))) == sorted(wanted[:-2])
        assert len(peer.asked(FIND)) < 13
        for missing in wanted[-2:]:
            assert any(request.keys.AccessionNumber == missing for request in peer.asked(FIND))
    with archive(files(60), refuses=lambda request: 0xC320 if has(request, "[*") else 0) as peer:
        assert accessions(found(peer, Query(AccessionNumber=wanted))) == sorted(wanted[:-2])


def test_wild_cards_that_are_refused_are_an_error() -> None:
    def refuses(request: Request) -> int:
        return 0xC000 if "*" in str(request.keys.get("PatientName", "")) else 0

    with archive(files(2), refuses=refuses) as peer, pytest.raises(Misconfigured, match="C000"):
        found(peer, Query(PatientName="A*"))


def test_optional_keys_that_are_refused_are_left_out() -> None:
    def refuses(request: Request) -> int:
        return 0xA900 if request.keys.get("ModalitiesInStudy") else 0

    with archive(files(4, Modality=lambda n: "CT" if n else "MR"), refuses=refuses) as peer:
        assert accessions(found(peer, Query(Modality="MR"))) == ["A0000"]


NAMES = {
    "ISO_IR 100": "Müller^Jörg",
    "ISO_IR 192": "Łukasz^Żółć",
    "ISO 2022 IR 6\\ISO 2022 IR 87": "Yamada^Tarou=山田^太郎=やまだ^たろう",
    "ISO 2022 IR 6\\ISO 2022 IR 149": "Hong^Gildong=洪^吉洞=홍^길동",
    "GB18030": "Wang^XiaoDong=王^小东",
}


@pytest.mark.parametrize("charset", NAMES)
def test_names_are_shown_right_and_found_in_every_character_set(charset: str) -> None:
    name = NAMES[charset]
    data = files(2, SpecificCharacterSet=charset.split("\\"), PatientName=lambda n: name if n else "Doe^J")
    with archive(data) as peer:
        assert [match.attributes["PatientName"] for match in found(peer, Query(AccessionNumber=("A0001",)))] == [name]
        assert accessions(found(peer, Query(PatientName=name))) == ["A0001"]


@pytest.mark.parametrize("charset", ["ISO_IR 192", "\\ISO 2022 IR 87", "GB18030"])
def test_a_name_is_asked_for_in_the_character_set_that_the_peer_takes(charset: str) -> None:
    term = charset.split("\\")
    data = files(2, SpecificCharacterSet=term, PatientName=lambda n: "山田^太郎" if n else "Doe^J")

    def refuses(request: Request) -> int:
        asked = request.charset.replace("['', '", "\\").replace("']", "")
        return 0 if asked in ("", charset) else 0xA900

    with archive(data, refuses=refuses) as peer:
        assert accessions(found(peer, Query(PatientName="山田^太郎"))) == ["A0001"]


@pytest.mark.parametrize(
    ("encoded", "called"),
    [("ISO_IR 192", "ISO_IR 100"), ("ISO_IR 192", None), ("ISO_IR 100", "ISO_IR 192"), ("ISO_IR 100", None)],
)
def test_names_are_shown_right_though_the_character_set_is_called_another(encoded: str, called: str | None) -> None:
    data = files(1, SpecificCharacterSet="ISO_IR 100", PatientName="Müller^Jörg")
    with archive(data, answer_charset=(encoded, called)) as peer:
        assert [match.attributes["PatientName"] for match in found(peer, Query())] == ["Müller^Jörg"]


def shown_in_latin_1(**settings: Any) -> AbstractContextManager[Archive]:
    """An archive that writes ? for letters that Latin-1 doesn't have; two of its studies have such names."""
    names = ("Павлов^Иван", "Doe^Jane", "Петров^Илья", "")
    made = files(4, SpecificCharacterSet="ISO_IR 192", PatientName=lambda n: names[n])
    return archive(made, answer_charset=("ISO_IR 100", "ISO_IR 100"), **settings)


@pytest.mark.parametrize("lists", [True, False])
def test_names_that_a_peer_matches_and_does_not_show_are_found(lists: bool) -> None:
    def refuses(request: Request) -> int:
        many = request.keys.get("StudyInstanceUID", "")
        return 0 if lists or isinstance(many, str) else 0xC320

    with shown_in_latin_1(refuses=refuses) as peer:
        assert accessions(found(peer, Query(PatientName="Павлов^Иван"))) == ["A0000"]
        assert accessions(found(peer, Query(PatientName="П*"))) == ["A0000", "A0002"]
        assert accessions(found(peer, Query(PatientName="Жуков*"))) == []
        asked = len(peer.asked(FIND))
        assert accessions(found(peer, Query(PatientName="Doe*"))) == ["A0001"]
        assert len(peer.asked(FIND)) == asked + 1  # what shows all that it was asked for costs nothing


@pytest.mark.parametrize("how", ["ignored", "dropped", "replaced"])
def test_letters_that_a_peer_neither_shows_nor_looks_at_are_an_error_not_nothing_found(how: str) -> None:
    def misread(keys: Dataset) -> None:
        pattern = str(keys.get("PatientName", ""))
        if not pattern.isascii():
            keys.PatientName = re.sub(r"[^\x00-\x7f]", "?" if how == "replaced" else "", pattern)

    settings_ = {"ignores": frozenset(("PatientName",))} if how == "ignored" else {"misreads": misread}
    with shown_in_latin_1(**settings_) as peer:
        for name in ("Павлов^Иван", "П*"):
            with pytest.raises(Misconfigured, match="shows PatientName without some of its letters"):
                found(peer, Query(PatientName=name))
        assert accessions(found(peer, Query(PatientName="Doe^Jane"))) == ["A0001"]
        assert accessions(found(peer, Query(PatientName="Müller"))) == []


def test_a_peer_of_patient_root_only_is_asked_below_its_patients() -> None:
    def refuses(request: Request) -> int:
        return 0xA900 if request.level != "PATIENT" and not request.keys.get("PatientID") else 0

    def accept(context: wire.Context) -> str | int:
        return REFUSED_CLASS if context.abstract_syntax == STUDY_ROOT else context.offered[0]

    foreign = studies.dataset(PatientID="Ä1", AccessionNumber="A9", SpecificCharacterSet="ISO_IR 100")
    with archive([*files(3), studies.encoded(foreign)], refuses=refuses, accept=accept) as peer:
        assert accessions(found(peer, Query(level="series"))) == ["A0000", "A0001", "A0002", "A9"]
        assert accessions(found(peer, Query(PatientID="01"))) == ["A0001"]


@pytest.mark.parametrize("status", [0xA700, 0])
def test_patients_beyond_a_limit_of_a_peer_of_patient_root_only_are_found(status: int) -> None:
    def accept(context: wire.Context) -> str | int:
        return REFUSED_CLASS if context.abstract_syntax == STUDY_ROOT else context.offered[0]

    days: dict[str, object] = {
        "StudyDate": lambda n: f"2024{n % 12 + 1:02}01",
        "PatientID": lambda n: f"{n % 3}P{n:02}",
    }
    settings: dict[str, Any] = {"limit": 5, "limit_status": status, "limited": ("PATIENT",), "accept": accept}
    with archive(files(14, **days), **settings) as peer:
        assert len(found(peer, Query(StudyDate="20240101-20240131"))) == 2
        assert len(found(peer, Query(PatientID="1*"))) == 5
    with archive(files(14, **days), ignores=frozenset(("PatientID",)), **settings) as peer:
        if status:
            with pytest.raises(Misconfigured, match="gives 5 patients and has more"):
                found(peer, Query(StudyDate="20240101"))
    with archive(files(12, **days), accept=accept) as peer:  # no limit, and not asked more than once for each sign
        assert len(found(peer, Query())) == 12
        assert sum(one.level == "PATIENT" for one in peer.asked(FIND)) <= 100


def test_a_peer_that_cannot_be_queried_says_so() -> None:
    with archive([], accept=lambda context: REFUSED_CLASS) as peer, pytest.raises(Misconfigured, match="neither"):
        found(peer, Query())


def test_no_message_names_the_patient() -> None:
    with archive(files(1), refuses=lambda request: 0xC000) as peer, pytest.raises(DispatchError) as caught:
        found(peer, Query(PatientName=studies.PATIENT_NAME, PatientID=studies.PATIENT_ID))
    assert not any(value in str(caught.value) for value in studies.PHI)


def test_an_answer_that_ends_midway_is_no_answer() -> None:
    with archive(files(3), max_pdu=16_384) as peer:
        peer.write_size = 40
        assert len(found(peer, Query())) == 3
    with archive(files(3), refuses=lambda request: 0xFE00) as peer, pytest.raises(Busy):
        found(peer, Query())


def test_identifiers_are_read_whatever_is_in_them() -> None:
    def element(tag: int, vr: bytes, value: bytes) -> bytes:
        return struct.pack("<HH2sH", tag >> 16, tag & 0xFFFF, vr, len(value)) + value

    sequence = struct.pack("<HH2sHI", 0x0008, 0x1115, b"SQ", 0, 0xFFFFFFFF)
    item = struct.pack("<HHI", 0xFFFE, 0xE000, 0xFFFFFFFF) + element(0x00080060, b"CS", b"MR")
    ends = struct.pack("<HHI", 0xFFFE, 0xE00D, 0) + struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)
    data = element(0x00080060, b"CS", b"CT") + sequence + item + ends + element(0x00091001, b"LO", b"private ")
    data += (
        element(0x00201208, b"IS", b"12") + element(0x00280010, b"US", b"\1\0") + element(0x00100010, b"PN", b"A^B ")
    )
    data = data[: data.index(b"PN") - 4] + element(0x00100010, b"PN", b"A^B ") + data[data.index(b"PN") + 8 :]
    read = identifier.read(data, identifier.EXPLICIT_LITTLE)
    assert read == {"Modality": "CT", "PatientName": "A^B", "NumberOfStudyRelatedInstances": 12, "Rows": 1}
    for cut in range(len(data)):
        identifier.read(data[:cut], identifier.EXPLICIT_LITTLE)
        identifier.read(data[:cut], wire.IMPLICIT)
        for syntax in (identifier.EXPLICIT_LITTLE, wire.IMPLICIT):
            answers = identifier.Answers(syntax)
            for some in (data[:cut], data, data[cut:], data[:cut]):
                assert answers.read(some) == identifier.read(some, syntax)


@pytest.mark.parametrize("syntax", [identifier.EXPLICIT_LITTLE, wire.IMPLICIT])
def test_answers_of_one_query_may_each_have_a_character_set(syntax: str) -> None:
    answers = identifier.Answers(syntax)
    for _ in range(2):
        for charset, name in (
            ("ISO_IR 192", "Müller^Zoë"), ("ISO_IR 100", "Müller^Zoë"), ("GB18030", "王^小东"), ("", "A^B"),
            ("ISO_IR 144", "Жюль"), ("ISO_IR 126", "Διονυσιος"),
        ):  # fmt: skip
            keys = {"PatientName": name, "StudyDate": "20240101", "StudyInstanceUID": "1.2.3"}
            data = identifier.built(keys, charset, syntax)
            found = answers.read(data)
            assert found == identifier.read(data, syntax) and found["PatientName"] == name


def test_what_stands_for_a_single_wild_card_is_read_in_an_instance_where_it_is_not_shown() -> None:
    names = ("Łukasz^A", "ukasz^B", "ŁŻukasz^C", "aukasz^D")
    made = files(4, SpecificCharacterSet="ISO_IR 192", PatientName=lambda n: names[n])
    with archive(made, answer_charset=("ISO_IR 100", "ISO_IR 100")) as peer:
        peer.refuses = lambda request: 0xC000 if "?" in str(request.keys.get("PatientName", "")) else 0
        assert accessions(found(peer, Query(PatientName="?ukasz*"))) == ["A0000", "A0003"]
        assert accessions(found(peer, Query(PatientName="?Żukasz*"))) == ["A0002"]
        assert accessions(found(peer, Query(PatientName="??ukasz*"))) == ["A0002"]
        peer.on_get = lambda request, matches: [Last(0xA900)]
        with pytest.raises(Misconfigured, match=r"what stands for \? is not known: narrow the query, or write \*"):
            found(peer, Query(PatientName="??ukasz*"))


def test_what_a_peer_shows_in_place_of_a_letter_is_no_letter_of_its_own() -> None:
    names = ("Łukasz^A", "Żukasz^A", "Łukasz^AB", "Łukaszek^A")
    made = files(4, SpecificCharacterSet="ISO_IR 192", PatientName=lambda n: names[n])
    with archive(made, answer_charset=("ISO_IR 100", "ISO_IR 100")) as peer:
        assert accessions(found(peer, Query(PatientName="Łukas?^A"))) == ["A0000"]
        assert accessions(found(peer, Query(PatientName="Łuk??z*"))) == ["A0000", "A0002", "A0003"]
        assert accessions(found(peer, Query(PatientName="Łukasz^?"))) == ["A0000"]


def cut_by_a_release() -> list[Step]:
    """How an instance begins, and behind that a request to release the association."""
    command = wire.encode_command({0x00000100: struct.pack("<H", C_STORE_RQ), 0x00000800: struct.pack("<H", 1)})
    return [Raw(wire.p_data(1, command) + wire.p_data(1, bytes(8), command=False, last=False) + RELEASE_RQ_PDU)]


@pytest.mark.parametrize("steps", [[Reset()], [Abort()], cut_by_a_release()], ids=["reset", "abort", "release"])
def test_a_link_that_breaks_while_an_instance_is_read_says_nothing_about_the_query(steps: list[Step]) -> None:
    with hiding_a_letter() as peer:
        peer.on_get = lambda request, matches: steps
        with pytest.raises(Interrupted):
            found(peer, Query(PatientName="Łuk??z*"))
        peer.on_get = None
        assert accessions(found(peer, Query(PatientName="Łuk??z*"))) == ["A0000"]


def test_a_search_is_cancelled_while_an_instance_is_read() -> None:
    def check() -> None:
        if peer.asked(GET):
            raise Cancelled("stopped")

    with hiding_a_letter() as peer:
        peer.on_get = lambda request, matches: [Silence()]
        with finder(Peer("127.0.0.1", peer.port, idle_timeout_s=60), check) as asked, pytest.raises(Cancelled):
            list(PeerSearch(asked).find(Query(PatientName="Łuk??z*")))


def hiding_a_letter() -> AbstractContextManager[Archive]:
    """An archive of one study that shows ? for the first letter of its name."""
    made = files(1, SpecificCharacterSet="ISO_IR 192", PatientName="Łukasz^A")
    return archive(made, answer_charset=("ISO_IR 100", "ISO_IR 100"))
