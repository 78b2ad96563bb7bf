"""What commands print for people."""

from __future__ import annotations

import os
import shutil
import sys

import httpx
import pytest

from talaria.cli.follow import clock, size, words_of
from talaria.cli.kinds import shown
from talaria.cli.output import _width, exit_code_of, table


def printed(capsys: pytest.CaptureFixture[str], *arguments: object) -> list[str]:
    table(*arguments)  # type: ignore[arg-type]
    return capsys.readouterr().out.splitlines()


def test_a_table_is_as_wide_as_it_needs_to_be(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys, "Targets", ["name", "type"], [["pacs", "dicom"], ["日本", "folder"]])
    assert lines[0] == "Targets"
    assert len({_width(line) for line in lines[1:]}) == 1
    assert lines[2].split() == ["┃", "name", "┃", "type", "┃"] and "│ 日本 │ folder │" in lines


def test_a_table_fits_a_terminal_and_loses_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(shutil, "get_terminal_size", lambda: os.terminal_size((40, 24)))
    text = "".join(chr(ord("a") + n % 26) for n in range(100))
    lines = printed(capsys, "", ["name", "what"], [["pacs", text]])
    assert max(map(_width, lines)) <= 40
    assert "".join(line.split("│")[2].strip() for line in lines[3:-1]) == text


def test_what_has_no_room_as_a_table_stands_in_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each line of a receipt's table was broken by a terminal of 80 columns."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(shutil, "get_terminal_size", lambda: os.terminal_size((80, 24)))
    columns = [f"column{number:02}" for number in range(12)]
    lines = printed(capsys, "Dispatch", columns, [["value"] * 11 + [""], ["other"] * 12])
    assert lines == [
        *("Dispatch", *(f"{column}: value" for column in columns[:11]), ""),
        *(*(f"{column}: other" for column in columns), ""),
    ]


def test_what_a_terminal_would_obey_is_shown_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys, "", ["what"], [["red \x1b[31m\x07 and\nmore"]])
    assert "│ red \\x1b[31m\\x07 and more │" in lines


def test_progress_is_said_with_bytes_rate_and_time_left() -> None:
    part = {"words": "120 of 500 items to pacs", "bytes": 262_144_000, "moved": 62_914_560, "rate": 31_457_280.0}
    assert words_of(part | {"seconds_left": 6.3}) == "120 of 500 items to pacs, 62.9 MB of 262 MB, 31.5 MB/s, 6 s left"
    assert words_of(part | {"rate": 0.0, "seconds_left": None}) == "120 of 500 items to pacs, 62.9 MB of 262 MB"
    assert words_of({"percent": 3.0, "words": "3 of 7 studies from pacs"}) == "3 of 7 studies from pacs"
    assert [size(count) for count in (0, 999, 1000, 2.5e12, 9e18)] == ["0 B", "999 B", "1.0 kB", "2.5 TB", "9000000 TB"]
    assert [clock(seconds) for seconds in (0.2, 59.4, 61, 3723)] == ["1 s", "59 s", "1:01", "1:02:03"]


def test_settings_are_shown_as_they_are_written() -> None:
    """A rule's were Python's: `on: ['dispatch.failed']`, `port: None`, `enabled: True`."""
    assert [shown(one) for one in (["a", "b"], None, True, False, 0, "")] == ["a, b", "none", "true", "false", "0", ""]
    assert shown([{"modality": "CT", "called": "", "targets": ["pacs"]}]) == "modality CT, targets pacs"


def test_an_error_that_says_nothing_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    """Seen: `the Prefect server did not answer as expected:`, and nothing behind it."""
    assert exit_code_of(httpx.ReadTimeout("")) == 3
    assert capsys.readouterr().err == "talaria: the Prefect server did not answer as expected: ReadTimeout\n"
