"""Times of day by which searches are halved, as peers write them."""

from __future__ import annotations

import pytest

from protocols.dimse.parts import by_time, seconds


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("", 0), ("12", 43_200), ("1230", 45_000), ("123001.5", 45_001), ("12345.0", 45_290), ("1200.5", 43_200)],
)
def test_whole_seconds_of_what_may_be_no_time(text: str, wanted: int) -> None:
    assert seconds(text) == wanted


def test_a_day_is_halved_whatever_its_times_look_like() -> None:
    found = [{"StudyTime": "12345.0"}, {"StudyTime": "131500"}]
    first, second = by_time({"StudyDate": "20240101"}, found)
    assert first["StudyTime"].endswith(".999999") and second["StudyTime"].endswith("-")
