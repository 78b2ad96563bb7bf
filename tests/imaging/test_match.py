"""What keys of a query match: wild cards, lists, names, dates."""

from __future__ import annotations

import datetime
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imaging.match import between, in_days, like, named, of_series, of_study, one_of
from imaging.query import Query
from talaria.testing.process import as_loaded

letters = st.text("abAB*?.^ü", max_size=10)
days = st.dates(datetime.date(1990, 1, 1), datetime.date(2030, 12, 31)).map(lambda day: day.strftime("%Y%m%d"))


def matches(pattern: str, value: str) -> bool:
    """The definition (PS3.4 section C.2.2.2.4), without any thought of speed."""
    if not pattern:
        return not value
    if pattern[0] == "*":
        return matches(pattern[1:], value) or (bool(value) and matches(pattern, value[1:]))
    return bool(value) and pattern[0] in ("?", value[0]) and matches(pattern[1:], value[1:])


@given(letters, letters)
def test_wild_cards_match_by_definition(pattern: str, value: str) -> None:
    assert like(pattern)(value) == matches(pattern.strip().casefold(), value.strip().casefold())


@given(st.text(max_size=20))
def test_any_value_matches_itself_in_any_case_and_a_star(value: str) -> None:
    assert like("*")(value)
    if not set(value) & set("*?"):
        assert like(value)(value)
        assert like(value.upper())(value.upper().lower())
        assert one_of([value])(value) == bool(value.strip())


def test_wild_cards_take_no_time_to_fail() -> None:
    test = like("*a" * 30 + "b")
    begun = time.monotonic()
    assert not test("a" * 60_000)
    assert time.monotonic() - begun < as_loaded(1)


@given(days, days, days)
def test_range_includes_its_ends(first: str, last: str, day: str) -> None:
    low, high = sorted((first, last))
    assert between(f"{low}-{high}")(day) == (low <= day <= high)
    assert between(f"{first}-")(day) == (first <= day)
    assert between(f"-{last}")(day) == (day <= last)
    assert between(first)(day) == (first == day)
    assert between(f"{first}-{first}")(f"{first[:4]}.{first[4:6]}.{first[6:]}")


@given(days)
def test_range_of_months_and_years_includes_the_last(day: str) -> None:
    assert between(f"{day[:4]}-{day[:4]}")(day)
    assert between(f"{day[:6]}-{day[:6]}")(day)
    assert not between(f"-{int(day[:4]) - 1}")(day)
    assert not between("19000101-")("")


@pytest.mark.parametrize(
    ("period", "days"),
    [
        ("20240229", "20240229"),
        (" 20240101-20240131 ", "20240101-20240131"),
        ("2023-2024", "20230101-20241231"),
        ("202302-202402", "20230201-20240229"),
        ("-202302", "-20230228"),
        ("2024-", "20240101-"),
        ("202406-", "20240601-"),
        ("20240101-20240101", "20240101"),
    ],
)
def test_servers_are_asked_for_days(period: str, days: str) -> None:
    assert in_days(period) == days


@pytest.mark.parametrize(
    "period", ["2024", "2024-01-01", "today", "-", "20240101-x", "*", "20240101--20240102", "2024013"]
)
def test_what_is_no_date_is_refused_with_the_remedy(period: str) -> None:
    with pytest.raises(ValueError, match="YYYYMMDD"):
        dict(of_study(Query(StudyDate=period)))


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("Yamada^Tarou", "Yamada^Tarou=山田^太郎=やまだ^たろう", True),
        ("山田*", "Yamada^Tarou=山田^太郎=やまだ^たろう", True),
        ("やまだ^たろう", "Yamada^Tarou=山田^太郎=やまだ^たろう", True),
        ("yamada^tarou=山田^太郎", "Yamada^Tarou=山田^太郎", True),
        ("*太郎", "Yamada^Tarou=山田^太郎=", True),
        ("Doe^John", "Doe^John^^^", True),
        ("Doe^John^^Dr", "Doe^John", False),
        ("Doe", "Doe^John", False),
        ("Doe*", "Doe^John", True),
        ("MÜLLER^jörg", "Müller^Jörg", True),
        ("Muller*", "Müller^Jörg", False),
        ("Two^B", "One^A\\Two^B", True),
        ("", "Doe", False),
    ],
)
def test_names(pattern: str, name: str, expected: bool) -> None:
    assert named(pattern)(name) == expected


@pytest.mark.parametrize("period", ["20240131-20240101", "2025-2024", "202402-202401", "20240601-202405"])
def test_a_range_that_ends_before_it_begins_is_refused(period: str) -> None:
    for read in (between, in_days):
        with pytest.raises(ValueError, match="ends before it begins"):
            read(period)


@given(days)
def test_a_day_and_its_month_and_year_are_ranges_in_any_order(day: str) -> None:
    for period in (f"{day}-{day[:6]}", f"{day[:6]}-{day}", f"{day}-{day[:4]}", f"{day[:4]}-{day}", f"{day}-{day}"):
        assert between(period)(day)


def test_descriptions_match_in_the_case_that_they_are_given_in() -> None:
    query = Query(StudyDescription=("Thorax", " Knie, axial "), SeriesDescription=("T2",))
    of_the_study, of_the_series = dict(of_study(query)), dict(of_series(query))
    described = ("Thorax", "thorax", "Thorax ", "Knie, axial", "Knie, axia", "", "Thor*")
    assert [one for one in described if of_the_study["StudyDescription"](one)] == ["Thorax", "Thorax ", "Knie, axial"]
    assert [one for one in ("T2", "t2", "T2 axial") if of_the_series["SeriesDescription"](one)] == ["T2"]


def test_lists() -> None:
    assert one_of(["A", "b "])(" B")
    assert not one_of(["A*", "?"])("AB")
    assert not one_of(["", " "])("")
    modality = dict(of_series(Query(Modality="CT, M?\\SR")))["Modality"]
    assert [one for one in ("CT", "MR", "MG", "SR", "US", "") if modality(one)] == ["CT", "MR", "MG", "SR"]
    uid = dict(of_study(Query(StudyInstanceUID="1.2\\1.3")))["StudyInstanceUID"]
    assert uid("1.3")
    assert not uid("1.33")


def test_blank_keys_match_everything() -> None:
    assert not dict(of_study(Query(PatientName=" ", PatientID="", StudyDate="  ", StudyInstanceUID=" ")))
    assert not dict(of_series(Query(Modality=" ")))


@pytest.mark.parametrize(
    "period", ["20240231", "20241301", "20240001", "20240100", "20230229-", "-20241331", "202413-202414", "00000101"]
)
def test_what_is_no_date_is_refused(period: str) -> None:
    for read in (between, in_days):
        with pytest.raises(ValueError, match="is not a date"):
            read(period)
