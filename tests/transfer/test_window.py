"""Windows of time: past midnight, over the ends of summer time, and every form that is refused."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transfer.window import DAYS, DispatchWindow

BERLIN = ZoneInfo("Europe/Berlin")


def at(text: str, zone: ZoneInfo = BERLIN, fold: int = 0) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=zone, fold=fold)


@pytest.mark.parametrize(
    ("window", "now", "opens"),
    [
        # 2024-03-15 is a Friday.
        ("08:00-17:00 Europe/Berlin", "2024-03-15T07:59:59", "2024-03-15T08:00"),
        ("08:00-17:00 Europe/Berlin", "2024-03-15T08:00", None),
        ("08:00-17:00 Europe/Berlin", "2024-03-15T16:59:59", None),
        ("08:00-17:00 Europe/Berlin", "2024-03-15T17:00", "2024-03-16T08:00"),
        ("08:00-17:00 Mon-Fri Europe/Berlin", "2024-03-15T17:00", "2024-03-18T08:00"),
        ("18:00-06:00 Mon-Fri Europe/Berlin", "2024-03-15T23:00", None),
        ("18:00-06:00 Mon-Fri Europe/Berlin", "2024-03-16T05:59", None),  # the night of Friday
        ("18:00-06:00 Mon-Fri Europe/Berlin", "2024-03-16T06:00", "2024-03-18T18:00"),
        ("18:00-06:00 Mon-Fri Europe/Berlin", "2024-03-18T05:00", "2024-03-18T18:00"),  # Sunday's night isn't
        ("18:00-06:00 Sat,Sun Europe/Berlin", "2024-03-18T05:00", None),
        ("08:00-17:00 Fri-Mon Europe/Berlin", "2024-03-19T09:00", "2024-03-22T08:00"),
        ("08:00-17:00 fri Europe/Berlin", "2024-03-15T17:00", "2024-03-22T08:00"),
        ("00:00-24:00 Europe/Berlin", "2024-03-15T00:00", None),
        ("00:00-24:00 Sun Europe/Berlin", "2024-03-15T12:00", "2024-03-17T00:00"),
        ("12:00-12:00 Fri Europe/Berlin", "2024-03-16T11:59", None),  # a whole day
        ("12:00-12:00 Fri Europe/Berlin", "2024-03-16T12:00", "2024-03-22T12:00"),
        ("8:00-9:30", "2024-03-15T09:15", None),  # UTC: 08:15
        ("8:00-9:30 UTC", "2024-03-15T08:15", "2024-03-15T09:00"),
    ],
)
def test_opens(window: str, now: str, opens: str | None) -> None:
    found = DispatchWindow.parse(window).opens(at(now))
    assert found == (at(opens) if opens else None)


def test_summer_time_ends_within_a_window() -> None:
    """On 2024-10-27 the hour from 2 to 3 comes twice in Berlin."""
    window = DispatchWindow.parse("02:45-06:00 Europe/Berlin")
    assert window.opens(at("2024-10-27T02:30")) == at("2024-10-27T02:45")
    assert window.opens(at("2024-10-27T02:50")) is None
    # The clock says 2:30 again, a quarter to three has been: it stays open.
    assert window.opens(at("2024-10-27T02:30", fold=1)) is None
    assert window.opens(at("2024-10-27T05:59")) is None
    night = DispatchWindow.parse("18:00-06:00 Europe/Berlin")
    opened, closed = at("2024-10-26T18:00").astimezone(UTC), at("2024-10-27T06:00").astimezone(UTC)
    assert closed - opened == timedelta(hours=13)
    assert night.opens(closed - timedelta(seconds=1)) is None
    assert night.opens(closed) == at("2024-10-27T18:00")


def test_summer_time_begins_within_a_window() -> None:
    """On 2024-03-31 the hour from 2 to 3 is left out in Berlin."""
    night = DispatchWindow.parse("18:00-06:00 Europe/Berlin")
    assert night.opens(at("2024-03-31T01:59")) is None
    assert night.opens(at("2024-03-31T03:00")) is None
    assert night.opens(at("2024-03-31T06:00")) == at("2024-03-31T18:00")
    # A window that lies in the hour that isn't: the next day's, and never a time that has been.
    missing = DispatchWindow.parse("02:10-02:50 Europe/Berlin")
    for minute in range(0, 180, 5):
        now = at("2024-03-31T00:30").astimezone(UTC) + timedelta(minutes=minute)
        opens = missing.opens(now)
        assert opens is None or opens > now
    # One of a Sunday: the next Sunday's.
    sundays = DispatchWindow.parse("02:00-03:00 Sun Europe/Berlin")
    for now in ("2024-03-24T03:00", "2024-03-27T12:00", "2024-03-31T03:00"):
        assert sundays.opens(at(now)) == at("2024-04-07T02:00")


TIMES = st.tuples(st.integers(0, 23), st.integers(0, 59)).map(lambda pair: f"{pair[0]:02}:{pair[1]:02}")
ZONES = st.sampled_from(["UTC", "Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "Asia/Kathmandu"])
NOWS = st.datetimes(datetime(2023, 1, 1), datetime(2027, 1, 1)).map(lambda value: value.replace(tzinfo=UTC))


@given(TIMES, TIMES, st.sets(st.sampled_from(DAYS), min_size=1), ZONES, NOWS)
def test_opens_when_it_says(begin: str, end: str, days: set[str], zone: str, now: datetime) -> None:
    """The time that is told comes, and then it is open; just before, it is not."""
    window = DispatchWindow.parse(f"{begin}-{end} {','.join(sorted(days))} {zone}")
    opens = window.opens(now)
    if opens is None:
        return
    assert now < opens < now + timedelta(days=15)
    assert window.opens(opens) is None
    before = opens.astimezone(UTC) - timedelta(seconds=1)
    if before > now:
        assert window.opens(before) == opens


@pytest.mark.parametrize(
    "text",
    [
        "", "18:00", "18-06", "18:00-25:00", "18:60-19:00", "18:00-06:00 Mon-Fry", "18:00-06:00 Mars/Olympus",
        "18:00-06:00 Mon-Tue-Wed", "18:00-06:00 Mon Berlin Germany", "18:00-06:00 ../../etc/passwd",
        "18:00-06:00 /etc/passwd", "18:00-06:00 Europe", "18:00 - 06:00x", "24:30-06:00", "18:00-06:00 Mon,,Tue",
        "18:00-06:00 Mon UTC\nx",
    ],
)  # fmt: skip
def test_refuses(text: str) -> None:
    with pytest.raises(ValueError, match=r"\S"):
        DispatchWindow.parse(text)


@pytest.mark.parametrize(
    ("text", "days", "zone"),
    [
        ("18:00-06:00", 7, "UTC"),
        ("18:00-06:00 Mon-Fri", 5, "UTC"),
        ("18:00-06:00 Europe/Berlin", 7, "Europe/Berlin"),
        ("18:00-06:00 UTC", 7, "UTC"),
        ("  18:00-06:00   MON,wed   Europe/Berlin ", 2, "Europe/Berlin"),
        ("18:00-06:00 Sat-Mon", 3, "UTC"),
        ("18:00-06:00 Mon-Fri,Sun", 6, "UTC"),
        ("18:00-06:00 EST5EDT", 7, "EST5EDT"),
    ],
)
def test_parses(text: str, days: int, zone: str) -> None:
    window = DispatchWindow.parse(text)
    assert len(window.days) == days
    assert window.zone.key == zone


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("18:00-06:00 Mo-Fr", "'Mo-Fr' is not days, as in Mon-Fri, and is not a time zone"),
        ("18:00-06:00 Mon Mars/Olympus", "'Mars/Olympus' is not a time zone, as in Europe/Berlin"),
    ],
)
def test_a_word_that_is_unknown_is_named(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        DispatchWindow.parse(text)


@pytest.mark.parametrize(
    ("one", "other", "meets"),
    [
        ("08:00-20:00", "22:00-06:00", False),
        ("08:00-22:00", "22:00-06:00", False),
        ("08:00-22:01", "22:00-06:00", True),
        ("05:59-08:00", "22:00-06:00", True),
        ("08:00-20:00 Mon-Fri", "00:00-24:00 Sat,Sun", False),
        ("22:00-02:00 Fri", "00:00-01:00 Sat", True),  # the night of Friday
        ("22:00-02:00 Sun", "00:00-01:00 Mon", True),
        ("08:00-20:00 Asia/Tokyo", "22:00-06:00 Europe/Berlin", True),
        ("12:00-20:00 Asia/Tokyo", "22:00-02:00 America/New_York", True),
        ("15:00-20:00 Asia/Tokyo", "22:00-01:00 America/New_York", False),
    ],
)
@pytest.mark.parametrize("now", ["2024-03-15T12:00", "2024-03-29T23:30", "2024-10-26T01:30", "2024-12-31T05:00"])
def test_two_windows_have_some_time_in_common_or_none(one: str, other: str, meets: bool, now: str) -> None:
    first, second = DispatchWindow.parse(one), DispatchWindow.parse(other)
    assert first.meets(second, at(now)) is second.meets(first, at(now)) is meets
