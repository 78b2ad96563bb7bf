"""Searches at a scripted DICOMweb server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from imaging.query import Match, Query
from talaria.testing import studies
from tasks.dicomweb import find
from tests.servers.dicomweb import Scripted, uid_of
from tests.targets.dicomweb import dicomweb_target

EVERYTHING = Query()
PAGE = b"<html><head><title>Sign in</title></head><body><form>password</form></body></html>"


def hold(server: Scripted, *datasets: Any) -> list[str]:
    """Put instances into the server; returns their UIDs."""
    uids = []
    for ds in datasets:
        data = ds if isinstance(ds, bytes) else studies.encoded(ds)
        uids.append(uid_of(data))
        server.stored[uids[-1]] = data
    return uids


def found(server: Scripted, query: Query = EVERYTHING, **settings: Any) -> list[Match]:
    return list(find(dicomweb_target(server.url, **settings), query))


def study_uids(matches: list[Match]) -> set[str]:
    return {match.StudyInstanceUID for match in matches}


def files(folder: Path) -> dict[str, bytes]:
    return {path.stem: path.read_bytes() for path in folder.iterdir()}
