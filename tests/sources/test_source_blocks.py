"""What a source may be: fields and their limits, and the sections of one file that each `apply` takes whole."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from blocks import SOURCES, Source
from blocks.fields import Group, ordered
from blocks.inbox import InboxSource
from talaria import configfile
from talaria.engine.batches import never_comes
from talaria.targetfile import entry, field_names
from transfer.errors import Misconfigured

SECRET = "hunter2"
WHOLE = """
targets:
  pacs: {type: dicom, host: h, aet_target: A}
sources:
  night: {type: inbox, folder: "/data/${WARD}", targets: [pacs], cron: "0 2 * * *", timezone: Europe/Berlin}
  backlog: {type: list, file: /data/todo.csv, targets: [pacs], at_once: 3}
notify:
  team: {on: [dispatch.failed], headers: {Authorization: "${KEY}"}}
"""


def inbox(**fields: Any) -> InboxSource:
    return InboxSource(**{"folder": "/data/in", "targets": ["pacs"], **fields})


def test_each_section_of_one_file_is_read_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WARD", "ct")
    monkeypatch.setenv("KEY", SECRET)
    path = tmp_path / "all.yaml"
    path.write_text(WHOLE)
    assert list(configfile.read_filled(path)) == ["pacs"]
    sources = configfile.read_filled(path, "sources")
    assert sources["night"]["folder"] == "/data/ct"
    assert configfile.read_filled(path, "notify") == {
        "team": {"on": ["dispatch.failed"], "headers": {"Authorization": SECRET}}
    }
    made = {name: entry(Source, SOURCES, name, values) for name, values in sources.items()}
    assert [one.type_name for one in made.values()] == ["inbox", "list"]


@pytest.mark.parametrize(
    ("text", "section", "words"),
    [
        ("sources: {a: {type: inbox}}", "targets", "names no target"),
        ("targets: {a: {type: dicom}}", "sources", "names no source"),
        ("sources: [1]", "sources", "`sources` must be a mapping of names to sources"),
        ("source: {}", "sources", "unknown key 'source': expected `targets` or `sources` or `notify`"),
        ("[1, 2]", "sources", "expected a mapping with the key `targets` or `sources` or `notify`"),
    ],
)
def test_a_section_that_is_not_there_or_no_section(tmp_path: Path, text: str, section: str, words: str) -> None:
    path = tmp_path / "all.yaml"
    path.write_text(text)
    with pytest.raises(Misconfigured, match=re.escape(words)):
        configfile.document(path, section)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"folder": "data"}, "is not an absolute path"),
        ({"targets": []}, "must name one target at least"),
        ({"targets": ["pacs", " "]}, "empty name"),
        ({"after": "move"}, "move_to is given with after: move"),
        ({"move_to": "/sent"}, "move_to is given with after: move"),
        ({"cron": "at night"}, "not in the form of cron"),
        ({"rrule": "weekly"}, "not a recurrence rule"),
        ({"timezone": "Mars/Base"}, "not a time zone"),
        ({"cron": "0 2 * * *", "interval_s": 60}, "one schedule at most"),
        ({"watch": False}, "needs a schedule"),
        ({"contact": "me"}, "not an e-mail address"),
        ({"after": "move", "move_to": "/sent", "move_layout": "{Nothing}"}, "Nothing"),
    ],
)
def test_an_inbox_that_can_not_be(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        inbox(**fields)


def test_an_inbox_keeps_what_it_is_given() -> None:
    one = inbox(targets=["pacs", "cloud", "pacs"], exclude="*.tmp", sender_aet="CT1", rrule="FREQ=WEEKLY;BYDAY=SA")
    assert one.reaches == ("pacs", "cloud")
    assert one.globs == ("*.tmp",)
    assert one.origin.sender_aet == "CT1"
    assert one.scheduled


@pytest.mark.parametrize(
    ("when", "why"),
    [
        ({"cron": "0 2 * * *"}, ""),
        ({"cron": "@daily"}, ""),
        ({"cron": "0 0 2 * * *"}, "write five: minute, hour"),
        ({"cron": "0 0 30 2 *"}, "no such time from now on: correct it"),
        ({"interval_s": 300}, ""),
        ({"rrule": "FREQ=WEEKLY;BYDAY=SA;BYHOUR=3"}, ""),
        ({"rrule": "FREQ=SECONDLY;BYHOUR=2"}, "it would be swept each second"),
        ({"rrule": "FREQ=MINUTELY"}, ""),
        ({"rrule": "FREQ=DAILY;INTERVAL=0"}, "a number from 1 on"),  # the next time was looked for without end
        ({"rrule": "FREQ=DAILY;interval=00;BYHOUR=2"}, "a number from 1 on"),
        ({"rrule": "FREQ=DAILY;INTERVAL=02"}, ""),
        ({"rrule": "FREQ=DAILY;INTERVAL=10"}, ""),
        ({"rrule": "FREQ=YEARLY;BYMONTH=2;BYMONTHDAY=30"}, "no such time from now on: correct it"),
        ({"rrule": "FREQ=DAILY;COUNT=5"}, "or give it a DTSTART from which it counts"),  # Prefect counts from 2020 on
        ({"rrule": "DTSTART:21000101T000000\nRRULE:FREQ=DAILY;COUNT=5"}, ""),
        ({"rrule": "FREQ=DAILY;UNTIL=20200101"}, "no such time from now on: correct it"),
        ({"rrule": "FREQ=DAILY;UNTIL=21000101"}, ""),
        ({"rrule": "FREQ=DAILY;UNTIL=21000101T000000Z"}, "write its times without Z"),  # which its scheduler chokes on
        ({}, ""),
    ],
)
def test_a_schedule_that_never_comes_is_found(when: dict[str, Any], why: str) -> None:
    found = never_comes(inbox(**when))
    assert why in found and bool(why) == bool(found)


def test_a_list_that_can_not_be() -> None:
    values = {"type": "list", "file": "/data/todo.csv", "targets": ["pacs"]}
    for query, target in (("pacs", "pacs"), ("pacs", "dicom/pacs"), ("dicom/pacs", "pacs")):
        with pytest.raises(Misconfigured, match=f"source backlog: query: {query} is among the targets"):
            entry(Source, SOURCES, "backlog", values | {"query": query, "targets": [target]})
    with pytest.raises(Misconfigured, match="normal or offpeak"):
        entry(Source, SOURCES, "backlog", values | {"query": "other", "priority": "urgent"})
    with pytest.raises(Misconfigured, match="copy_first: what is fetched"):
        entry(Source, SOURCES, "backlog", values | {"query": "other", "copy_first": True})
    with pytest.raises(Misconfigured, match="unknown field 'files' of type list: did you mean file"):
        entry(Source, SOURCES, "backlog", {"type": "list", "files": SECRET, "targets": ["pacs"]})
    with pytest.raises(Misconfigured, match="use at most 60 characters"):
        entry(Source, SOURCES, "b" * 61, values)


@pytest.mark.parametrize(
    ("peers", "words"),
    [
        (["10.1.2.3"], r"peers\.0: must be written with its fields, as in \{aet: …\}$"),
        ([{"ip": "10.1.2.3"}], r"peers\.0\.ip: unknown field: there are aet, host, port$"),
    ],
)
def test_how_a_peer_is_written_is_said(peers: list[Any], words: str) -> None:
    with pytest.raises(Misconfigured, match=words):
        entry(Source, SOURCES, "ct", {"type": "dicom", "targets": ["pacs"], "peers": peers})


@pytest.mark.parametrize("name", SOURCES)
def test_every_field_says_how_forms_show_it(name: str) -> None:
    cls, known = SOURCES[name], {str(group) for group in Group}
    shown = ordered(cls)
    assert sorted(one.name for one in shown) == sorted(field_names(cls))
    assert len({one.title for one in shown}) == len(shown), "two fields with one label"
    for one in shown:
        field = cls.model_fields[one.name]
        assert field.title, one.name
        assert one.group in known, one.name
        assert not field.is_required() or one.tier == "basic", one.name
        assert re.fullmatch(r".*\.", str(field.description), re.DOTALL), one.name
        assert not one.name.endswith("_s") or "seconds" in str(field.description).lower(), one.name
