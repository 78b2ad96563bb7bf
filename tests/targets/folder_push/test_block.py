"""The fields of a folder target."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from blocks.base import Target
from blocks.dicomweb import DicomWebTarget
from blocks.folder import FolderTarget


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"folder": "relative/path"}, "absolute"),
        ({"folder": ""}, "absolute"),
        ({"folder": "/a\nb"}, "control"),
        ({"layout": "{PatientName}"}, "fields are"),
        ({"layout": "../{PatientID}"}, "relative path"),
        ({"mode": 640}, "quotes"),
        ({"mode": "rw-r--r--"}, "octal"),
        ({"mode": "0999"}, "octal"),
        ({"mode": "0040"}, "owner"),
        ({"dir_mode": "0640"}, "owner"),
        ({"group": " "}, "group"),
        ({"link": "always"}, "never"),
        ({"direction": "query"}, "only store"),
        ({"unknown": 1}, "Extra"),
    ],
)
def test_fields_that_are_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        FolderTarget(**{"folder": "/data", **fields})


def test_modes_are_octal() -> None:
    assert FolderTarget(folder="/data", mode="640", dir_mode="0o2750").mode == "0640"
    assert FolderTarget(folder="/data", dir_mode="0o2750").dir_mode == "2750"


def test_the_endpoint_is_the_place() -> None:
    one = FolderTarget(folder="/data")
    assert one.endpoint_for() == FolderTarget(folder="/data", concurrency=1).endpoint_for()
    assert one.endpoint_for() != FolderTarget(folder="/data2").endpoint_for()
    assert one.endpoint_for() != FolderTarget(folder="/data", layout="{PatientID}").endpoint_for()


def on(host: str, monkeypatch: pytest.MonkeyPatch, *targets: Target) -> list[str]:
    monkeypatch.setenv("TALARIA_HOST_NAME", host)
    return [one.endpoint_for() for one in targets]


def test_a_disk_of_one_of_several_hosts_is_an_endpoint_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one host had put on its disk counted as there on another, on whose disk nothing lay."""
    folders = FolderTarget(folder="/data/archive"), DicomWebTarget(url="file:///data/archive/web")
    server = DicomWebTarget(url="https://pacs.example/data/archive")
    monkeypatch.delenv("TALARIA_LEDGER", raising=False)
    alone = on("a", monkeypatch, *folders, server)
    assert alone == on("b", monkeypatch, *folders, server)
    monkeypatch.setenv("TALARIA_LEDGER", "postgresql://database/talaria")
    first, second = on("a", monkeypatch, *folders, server), on("b", monkeypatch, *folders, server)
    assert len({*first[:2], *second[:2], *alone[:2]}) == 6 and first[2] == second[2] == alone[2]
    for name in ("TALARIA_SHARED_PLACES", "TALARIA_SHARED_SOURCES"):
        monkeypatch.setenv(name, "/data/other,/data/archive/")
        assert on("a", monkeypatch, *folders) == on("b", monkeypatch, *folders) == alone[:2]
        beside = FolderTarget(folder="/data/archives")
        assert on("a", monkeypatch, beside) != on("b", monkeypatch, beside)
        monkeypatch.delenv(name)
