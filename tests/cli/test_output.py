"""What commands print for people."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import httpx
import pytest
import typer

from talaria.cli import jobs, serve, source
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


class Alone:
    """Access without a server, as a command has it that starts one for its own duration."""

    own = True

    def __init__(self, **answers: Any) -> None:
        self.answers = answers

    def call(self, operation: str, **_: Any) -> Any:
        return self.answers[operation]


@pytest.mark.parametrize(("command", "operation"), [(source.sweep, "sweep_source"), (source.retry, "retry_source")])
def test_a_sweep_that_nobody_begins_is_said_to_be_queued(
    command: Callable[..., None], operation: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It said "swept", and nothing was looked through before somebody started `talaria up`."""
    access = Alone(**{operation: {"name": "inbox", "action": "done"}})
    monkeypatch.setattr(source, "api", lambda: nullcontext(access))
    command("inbox")
    said = capsys.readouterr()
    assert said.out == "inbox: done\n" and said.err == "queued: it runs as soon as `talaria up` does\n"


@pytest.mark.parametrize("same", [0, 9])
def test_ids_are_short_on_a_terminal_and_still_name_one_job(
    same: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On 80 columns an id was folded into three lines, of which nobody could copy it."""
    ids = ["3f2a0000-0000-4000-8000-000000000001", "3f2a0000-0000-4000-8000-000000000001"[:same] + "7" * (36 - same)]
    line = {"state": "Completed", "dispatch_id": "d" * 20, "source": "", "targets": ["pacs"], "begun": None}
    access = Alone(list_jobs={"jobs": [line | {"id": one} for one in ids]})
    monkeypatch.setattr(jobs, "api", lambda: nullcontext(access))
    jobs.list_(limit=50, failed=False, as_json=False)
    assert all(one in capsys.readouterr().out for one in ids[:1])
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    jobs.list_(limit=50, failed=False, as_json=False)
    shown = [row.split("│")[1].strip() for row in capsys.readouterr().out.splitlines() if row.startswith("│ ")]
    assert shown == [one[: max(8, same + 1)] for one in ids]


def test_status_shows_no_targets_where_no_server_says_which_there_are(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    away: dict[str, Any] = {"server": {"ok": False, "url": None}, "workers": [], "queues": {}, "targets": []}
    monkeypatch.setattr(serve, "_status", lambda: dict(away))
    with pytest.raises(typer.Exit):
        serve.status()
    assert capsys.readouterr().out == "server: not running\n"
    monkeypatch.setattr(serve, "_status", lambda: away | {"server": {"ok": True, "url": "u"}})
    with pytest.raises(typer.Exit):
        serve.status()
    assert capsys.readouterr().out.startswith("server: ok u\nworker: none\n")
