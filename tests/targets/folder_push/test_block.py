"""The fields of a folder target."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

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
